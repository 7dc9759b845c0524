"""The velocity head on disk, beside a model: `sfr_head.safetensors` and `sfr_config.json`."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors.torch import load, save
from torch import Tensor, nn

from ..atomic import write_atomically
from ..config import SFRConfig
from ..modules import SFRLoss, VelocityHead
from .sharding import fill, gathered, parameters_of, size

HEAD_FILE, CONFIG_FILE = "sfr_head.safetensors", "sfr_config.json"
_OLD = dict(hidden_norm="none", time_power=1.0, layer_index=-1)  # of earlier versions, which wrote none of them
_TRAINED = ("loss", "time_power", "layer_index")  # what a head is trained for, beside its shape


def pairing(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> str:
    """A hash of the model's smallest trained weight, by which `restore_head` knows that both were saved together.
    `state` has the whole weights of a sharded model; without it every process must call this."""
    trained = {n: p for n, p in parameters_of(model).items() if p.requires_grad and "sfr." not in n}
    if not trained:
        return ""
    name = min(trained, key=lambda n: (size(trained[n]), n))
    if state is not None:
        weight = state[name]
    else:
        module, _, own = name.rpartition(".")
        with align_module_device(model.get_submodule(module)):  # brings what accelerate has offloaded
            weight = gathered({own: getattr(model.get_submodule(module), own)})[own]
    return hashlib.sha256(weight.detach().float().cpu().numpy().tobytes()).hexdigest()


def head_in(model: nn.Module, sfr: SFRLoss, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors in a state_dict of the model; empty if it has none."""
    [prefix] = [name for name, module in model.named_modules() if module is sfr]
    names = {name: f"{prefix}.head.{name}" for name, _ in sfr.head.named_parameters()}
    return {name: state[key] for name, key in names.items() if key in state}


def save_head(
    folder: str | os.PathLike, loss: SFRLoss, paired: str = "", tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the head's parameters and the objective's configuration into `folder`. `tensors` are the parameters of a
    sharded head, gathered. RuntimeError if one is not of its shape."""
    folder, digest, shape = Path(folder), None, None
    if loss.head is None:
        (folder / HEAD_FILE).unlink(missing_ok=True)  # of a save before this one
    else:
        shape = asdict(loss.head.shape)
        tensors = gathered(parameters_of(loss.head)) if tensors is None else tensors
        shapes = {name: p.shape for name, p in head_of(shape, "meta").named_parameters()}
        if wrong := [name for name in shapes if name not in tensors or tensors[name].shape != shapes[name]]:
            raise RuntimeError(  # a ValueError is Trainer's sign for another way to save
                f"the velocity head's {wrong[0]} is {_shape(tensors.get(wrong[0]))}, not of shape "
                f"{tuple(shapes[wrong[0]])}, so it is not saved: an engine has not gathered it"
            )
        data = save({n: tensors[n].detach().cpu().contiguous() for n in shapes})
        write_atomically(folder / HEAD_FILE, data)
        digest = hashlib.sha256(data).hexdigest()
    gate = getattr(loss, "gate", None)
    saved = {
        "config": loss.config.to_dict(),
        "head": shape,
        "paired": paired,
        "sha256": digest,
        "fitted": getattr(loss, "fitted", None),
        "flow_weight": getattr(loss, "flow_weight", loss.config.first_weight),
        "gate": None if gate is None or math.isnan(gate.last) else gate.state(),
    }
    write_atomically(folder / CONFIG_FILE, (json.dumps(saved, indent=2) + "\n").encode())


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"


def head_of(shape: dict, device: str = "cpu") -> VelocityHead:
    """A head of a HeadShape's fields; those of earlier versions had no hidden_norm."""
    fields = dict(hidden_norm="none") | shape
    with torch.device(device):
        return VelocityHead(num_layers=fields.pop("num_blocks") + 2, **fields)


def load_head(folder: str | os.PathLike) -> SFRLoss:
    """The objective with its head that `save_pretrained` or a Trainer saved in `folder`, ready for `attach`.
    FileNotFoundError if there is none."""
    folder, head = Path(folder), None
    saved = json.loads((folder / CONFIG_FILE).read_text())
    if shape := saved["head"]:
        head = head_of(shape)
        head.load_state_dict(_read_head(folder, saved))
    config = saved["config"]
    offset = config.pop("mtp_offset", 2)  # earlier versions wrote it, whatever the loss
    if config["loss"] == "mtp" and offset != 2:
        raise ValueError(
            f"{folder / CONFIG_FILE} has mtp_offset={offset}, of an earlier version: such a head has no counterpart "
            "here, where mtp_tokens counts from the token two ahead"
        )
    return SFRLoss(SFRConfig.from_dict(_OLD | config), head)


def _read_head(folder: Path, saved: dict) -> dict[str, Tensor]:
    """The tensors of a head. ValueError if it is not the one beside which `saved` was written."""
    data = (folder / HEAD_FILE).read_bytes()
    if saved.get("sha256", digest := hashlib.sha256(data).hexdigest()) != digest:  # earlier versions wrote none
        raise ValueError(
            f"{folder / HEAD_FILE} is not the head that {CONFIG_FILE} beside it tells of: a save into this folder has "
            "not come to its end, or one of the files is of another save"
        )
    return load(data)


@torch.no_grad()
def restore_head(folder: str | os.PathLike, loss: SFRLoss, paired: str) -> dict[str, Any]:
    """Copies a saved head into `loss`, in place, so that an optimizer keeps its parameters, and returns what else its
    configuration file has, of the run's state λ ("flow_weight"), that of the "gate", and the steps by which the head
    was "fitted"; every process must call it. FileNotFoundError if there is none; ValueError if it was saved with
    another model than that of `paired`."""
    path, remedy = Path(folder) / HEAD_FILE, "give the checkpoint to SFRCallback(resume_from=…)"
    if not ((path.is_file() or loss.head is None) and (Path(folder) / CONFIG_FILE).is_file()):
        raise FileNotFoundError(f"no velocity head at {path}: if the run resumes from another folder, {remedy}")
    saved = json.loads((Path(folder) / CONFIG_FILE).read_text())
    if loss.head is None:
        return saved
    if saved["paired"] != paired:
        raise ValueError(f"the head at {path} belongs to another model than the one resumed: {remedy}")
    now = asdict(loss.head.shape) | {name: getattr(loss.config, name) for name in _TRAINED}
    trained = _OLD | saved["config"]
    then = dict(output_size=now["output_size"], hidden_norm="none") | saved["head"]
    then |= {name: trained[name] for name in _TRAINED}
    if other := [f"{name}={then[name]!r}, not {now[name]!r}" for name in now if then[name] != now[name]]:
        raise ValueError(f"the head at {path} was trained with {'; '.join(other)}: resume with the config of the run")
    fill(loss.head, _read_head(Path(folder), saved))
    return saved

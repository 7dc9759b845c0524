"""The velocity head on disk, beside a model: `sfr_head.safetensors` and `sfr_config.json`."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..atomic import write_atomically
from ..config import SFRConfig
from ..modules import SFRLoss, VelocityHead

HEAD_FILE, CONFIG_FILE = "sfr_head.safetensors", "sfr_config.json"
_OLD = dict(hidden_norm="none", time_power=1.0)  # of earlier versions, which wrote neither


def pairing(model: nn.Module) -> str:
    """A hash of the model's smallest trained weight, by which `restore_head` knows that both were saved together."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "sfr." not in n}
    if not trained:
        return ""
    name = min(trained, key=lambda n: (trained[n].numel(), n))
    return hashlib.sha256(trained[name].detach().float().cpu().numpy().tobytes()).hexdigest()


def save_head(folder: str | os.PathLike, loss: SFRLoss, paired: str = "") -> None:
    """Writes the head's parameters and the objective's configuration into `folder`."""
    folder = Path(folder)
    if loss.head is not None:
        tensors = {name: p.detach().cpu().contiguous() for name, p in loss.head.state_dict().items()}
        write_atomically(folder / HEAD_FILE, save(tensors))
    shape = None if loss.head is None else asdict(loss.head.shape)
    saved = {"config": loss.config.to_dict(), "head": shape, "paired": paired}
    saved["flow_weight"] = getattr(loss, "flow_weight", loss.config.first_weight)
    text = json.dumps(saved, indent=2) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())


def load_head(folder: str | os.PathLike) -> SFRLoss:
    """What `save_head` wrote, ready for `attach`. FileNotFoundError if there is none."""
    folder, head = Path(folder), None
    saved = json.loads((folder / CONFIG_FILE).read_text())
    if shape := saved["head"]:
        head = VelocityHead(num_layers=shape.pop("num_blocks") + 2, **dict(hidden_norm="none") | shape)
        head.load_state_dict(load_file(folder / HEAD_FILE))
    config = saved["config"]
    offset = config.pop("mtp_offset", 2)  # earlier versions wrote it, whatever the loss
    if config["loss"] == "mtp" and offset != 2:
        raise ValueError(
            f"{folder / CONFIG_FILE} has mtp_offset={offset}, of an earlier version: such a head has no counterpart "
            "here, where mtp_tokens counts from the token two ahead"
        )
    return SFRLoss(SFRConfig.from_dict(_OLD | config), head)


def saved_weight(folder: str | os.PathLike) -> float | None:
    """λ when a checkpoint was saved; None if it is not known."""
    path = Path(folder) / CONFIG_FILE
    return json.loads(path.read_text()).get("flow_weight") if path.is_file() else None


@torch.no_grad()
def restore_head(folder: str | os.PathLike, loss: SFRLoss, paired: str) -> None:
    """Copies a saved head into `loss`, in place, so that an optimizer keeps its parameters. FileNotFoundError if there
    is none; ValueError if it was saved with another model than that of `paired`."""
    if loss.head is None:
        return
    path, remedy = Path(folder) / HEAD_FILE, "give the checkpoint to SFRCallback(resume_from=…)"
    if not path.is_file():
        raise FileNotFoundError(f"no velocity head at {path}: if the run resumes from another folder, {remedy}")
    saved = json.loads((Path(folder) / CONFIG_FILE).read_text())
    if saved["paired"] != paired:
        raise ValueError(f"the head at {path} belongs to another model than the one resumed: {remedy}")
    now = asdict(loss.head.shape) | {name: getattr(loss.config, name) for name in ("loss", "time_power")}
    trained = _OLD | saved["config"]
    then = dict(output_size=now["output_size"], hidden_norm="none") | saved["head"]
    then |= {name: trained[name] for name in ("loss", "time_power")}
    if other := [f"{name}={then[name]!r}, not {now[name]!r}" for name in now if then[name] != now[name]]:
        raise ValueError(f"the head at {path} was trained with {'; '.join(other)}: resume with the config of the run")
    loss.head.load_state_dict(load_file(path))

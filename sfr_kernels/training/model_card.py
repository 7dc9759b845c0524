"""What a model card, README.md beside a model, says about the training: a section between two marks, and a tag."""

import os
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from .._version import __version__
from ..atomic import write_atomically
from ..config import SFRConfig
from ..targets import OnlineTargets, TargetStore
from .checkpoint import HEAD_FILE
from .objectives import Attachment, CrossEntropyAttachment

CARD_FILE = "README.md"
_BEGIN, _END = "<!-- sfr_kernels -->", "<!-- /sfr_kernels -->"
_SFR = "Semantic Flow Regularization ([arXiv 2605.27971](https://arxiv.org/abs/2605.27971))"
_OBJECTIVES = {
    "flow": f"{_SFR}: cross-entropy + λ · a conditional flow-matching loss",
    "mse": f"the regression limit of {_SFR}: cross-entropy + λ · the mean squared error of the text that follows",
    "cosine": f"a variant of {_SFR}: cross-entropy + λ · (1 − the cosine to the text that follows)",
    "cka": f"a variant of {_SFR}: cross-entropy + λ · (1 − linear CKA with the texts of the responses)",
    "mtp": "multi-token prediction ([arXiv 2404.19737](https://arxiv.org/abs/2404.19737)): cross-entropy of the next "
    "token + λ · that of further ones",
}


def write_card(folder: str | os.PathLike, model: nn.Module, sfr: Attachment | CrossEntropyAttachment) -> None:
    """Adds to the card in `folder`, or replaces there, the section on the training of `model` with the objective `sfr`.
    Where there is no card, makes a small one. One that cannot be read is left as it is, with a warning."""
    path = Path(folder) / CARD_FILE
    try:
        card = ModelCard.load(path) if path.is_file() else _new_card(model)
        given = _written_tags(path)
        if isinstance(given, str):  # which huggingface_hub takes for a list of letters
            card.data.tags = [given]
    except (ValueError, TypeError, yaml.YAMLError) as error:
        warnings.warn(f"{path} does not say how the model was trained, for it cannot be read: {error}", stacklevel=2)
        return
    section = f"{_BEGIN}\n{_section(sfr, path.with_name(HEAD_FILE).is_file())}\n{_END}"
    card.text, count = re.subn(f"{_BEGIN}.*?{_END}", lambda _: section, card.text, count=1, flags=re.DOTALL)
    if not count:
        card.text += ("\n" if card.text.endswith("\n") else "\n\n") + section + "\n"
    if (tag := _tag(sfr)) is not None and tag not in (tags := card.data.tags or []):
        card.data.tags = [*tags, tag]
    write_atomically(path, str(card).encode())


def _written_tags(path: Path) -> Any:
    """As they stand in a card's header."""
    header = re.match(r"---\n(.*?)\n---", path.read_text(), re.DOTALL) if path.is_file() else None
    return None if header is None else (yaml.safe_load(header[1]) or {}).get("tags")


def _tag(sfr: Attachment | CrossEntropyAttachment) -> str | None:
    if not isinstance(sfr, Attachment):
        return None
    return "mtp" if sfr.config.loss == "mtp" else "sfr"


def _new_card(model: Any) -> ModelCard:
    name = getattr(model.config, "_name_or_path", None)
    data = ModelCardData(library_name="transformers", base_model=None if _is_local(name) else name)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# A fine-tuned language model\n")


def _section(sfr: Any, has_head: bool) -> str:
    versions = f"sfr_kernels {__version__}, Transformers {transformers.__version__}, "
    versions += f"PyTorch {torch.__version__.split('+')[0]}"
    if not isinstance(sfr, Attachment):
        return f"## Training objective\n\nCross-entropy alone, fused with the lm_head.\n\nTrained with {versions}."
    config = sfr.config
    lines = [f"- λ: {_weight(sfr)}", f"- optimizer steps: {sfr.step}"]
    if sfr.head is not None and sfr.fitted is not None:
        steps = f"{sfr.fitted} steps of the head alone" if sfr.fitted else "none"
        lines.append(f"- before training, to fit the velocity head to the model: {steps}")
    if config.loss != "mtp" and (store := sfr.store) is not None:
        encoder = _encoder(store)
        by = "" if encoder is None else f" by the sentence encoder `{encoder}`"
        lines.append(f"- targets: embeddings of {store.target_size} numbers{by}")
    default = SFRConfig()
    other = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    given = ", ".join(f"{name}={getattr(config, name)!r}" for name in other)
    lines.append(f"- configuration: `SFRConfig({given})`" + (", all else the default" if given else ", the default"))
    head = f" The head lies beside it in `{HEAD_FILE}`, for further training." if has_head else ""
    return (
        f"## Training objective\n\nTrained with {_OBJECTIVES[config.loss]}.\n\n"
        + "\n".join(lines)
        + "\n\nInference needs "
        f"nothing of this: the model is a plain one.{head}\n\n"
        f"Trained with {versions}."
    )


def _weight(sfr: Attachment) -> str:
    config = sfr.config
    moves = f", from a warm-up over {config.flow_warmup:.0%} of the run on" if config.flow_warmup else ""
    if config.flow_schedule != "constant":
        moves += f", falling to 0 ({config.flow_schedule})"
    if config.flow_weight != "auto":
        return f"{sfr.flow_weight:g}{moves}"
    wanted = f'"auto", for a share of {sfr.config.wanted_share:g} of the gradient of cross-entropy'
    return (
        f"{wanted}; {sfr.flow_weight:.4g} was reached{moves}"
        if sfr.shared
        else f"{wanted}; 1, as no share was measured"
    )


def _encoder(store: TargetStore | OnlineTargets) -> str | None:
    """The name of the encoder of the targets, without a folder of the machine; None if it is not known."""
    if isinstance(store, OnlineTargets):
        name = getattr(store.encoder, "sfr_name", None)
    else:
        name = store.manifest.get("encoder", {}).get("name")
    return Path(name).name if name and _is_local(name) else name


def _is_local(name: str | None) -> bool:
    """Whether a name is not one of the hub."""
    return not name or os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name)

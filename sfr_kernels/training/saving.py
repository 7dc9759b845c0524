"""Saving an attached model: the plain model, as if it were not attached, and beside it the velocity head and a model
card that says how it was trained."""

import sys
from typing import Any

from accelerate import Accelerator
from torch import nn

from .checkpoint import CONFIG_FILE, HEAD_FILE, head_in, pairing, save_head
from .guard import watch_of
from .methods import plain
from .model_card import write_card
from .objectives import Attachment, attachment_of
from .sharding import is_sharded


def without_head(module: Any, state: dict, prefix: str, _) -> None:
    """Leaves the head out of the state_dict for Accelerator.save_model and PEFT's save_pretrained, which save the plain
    model, but do not read `_keys_to_ignore_on_save`."""
    frame = None if module._sfr_watch.saving else sys._getframe()
    while frame is not None and frame.f_code is not Accelerator.save_model.__code__:
        frame = frame.f_back
    if frame is not None or module._sfr_watch.saving:
        for name in [name for name in state if name.startswith(f"{prefix}sfr.")]:
            del state[name]


def save_pretrained(self: nn.Module, save_directory, *args, **kwargs):
    """The model's own save_pretrained, without the head, which is saved beside it, and with our section in its card."""
    if (sfr := attachment_of(self)) is None:  # the model inside this PEFT model was detached
        return plain(self, "save_pretrained")(save_directory, *args, **kwargs)
    is_main = kwargs.get("is_main_process", True)
    found = _saved_head(self, sfr, kwargs.get("state_dict")) if is_main else None
    watch = watch_of(self)
    try:
        # first, since push_to_hub=True uploads the folder, and so that a save that is cut short is known by its head
        if found is not None:
            save_head(save_directory, sfr, *found)
    finally:  # the model is saved even where its head cannot be
        watch.saving = True
        try:
            result = plain(self, "save_pretrained")(save_directory, *args, **kwargs)
        finally:
            watch.saving = False
    if is_main:
        write_card(save_directory, self, sfr)
    return result


def upload(self: nn.Module, working_dir, repo_id, files_timestamps, *args, **kwargs):
    """The model's own upload of a folder to the hub: of what has changed since these times, before which the head was
    saved; transformers has written the card anew since."""
    if (sfr := attachment_of(self)) is not None:
        write_card(working_dir, self, sfr)
    others = {name: time for name, time in files_timestamps.items() if name not in (HEAD_FILE, CONFIG_FILE)}
    return plain(self, "_upload_modified_files")(working_dir, repo_id, others, *args, **kwargs)


def adapter_card(self: nn.Module, output_dir):
    """PEFT's own card, which keeps no tags but its own, with ours."""
    plain(self, "create_or_update_model_card")(output_dir)
    if (sfr := attachment_of(self)) is not None:
        write_card(output_dir, self, sfr)


def _saved_head(model: nn.Module, sfr: Any, state: dict | None) -> tuple[str, dict | None] | None:
    """What `save_head` needs beside the objective, None where it is not to be called."""
    if not isinstance(sfr, Attachment):
        return None
    if not is_sharded(model):
        return pairing(model), None
    if not state and state is not None:  # Trainer, before DeepSpeed writes its shards: SFRCallback saves the head
        return None
    head = {} if state is None or sfr.head is None else head_in(model, sfr, state)
    if state is None or (sfr.head is not None and not head):
        raise RuntimeError(
            "state_dict must be given to save_pretrained with the weights of a sharded model, the head's among them: "
            "accelerator.get_state_dict(model) or get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True)), on every process"
        )
    return pairing(model, state), head

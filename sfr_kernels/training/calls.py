"""The way of a call through an attached model's lm_head, at whose end the loss is computed.

`run` has the model's own forward run with a `Call` in progress. When the model calls its output embeddings then,

    _copies_forward   PEFT's modules_to_save, where there is one, passes the call on to the copy in use;
    _lora_forward     LoRA, where there is one, calls its modules, each within the call of the one before
    _adapter_forward  (lora_A, lora_B, …, the linear layer), so that an engine has gathered the weights of all of them
    _linear_forward   when the linear layer computes the loss, and returns it in place of logits;
    _catch            the last hook of the output embeddings keeps what has come back through all the others.

Without a call in progress every one of them does what it did before attach. Copies and adapters are those of the
moment: which are in use is asked at each call, and those that are added later are covered, too.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import SFROutput
from ..targets.online import PendingTargets
from .inner_layer import check_inner
from .lm_head import check_copy, copies, copy_in_use, covered_linear, has_copies
from .lora import active_adapters, adapter_modules, decoder_options
from .methods import cover, is_covered, plain, uncover


class Call:
    """One forward of the model in which the lm_head is to return a loss, or a probe in place of its logits."""

    def __init__(self, base: Any, inputs: dict[str, Any] | None = None, probe: Tensor | None = None):
        self.sfr, self.inputs, self.probe = base.sfr, inputs or {}, probe
        self.outer = base.get_output_embeddings()  # which may have `copy` among others, and that may have `linear`
        self.copy, self.linear = copy_in_use(self.outer), covered_linear(base)
        self.layer = base.get_submodule(base.sfr.inner) if base.sfr.inner else None
        self.inner: list = []  # what the layer was given
        self.adapters: list[str] = []  # of a LoRA layer in place of the linear one, those in use
        self.path: list[nn.Module] = []  # and its modules, of which each is called within the call of the one before
        self.out: SFROutput | None = None
        self.reached = False  # the linear layer was called
        self.returned: Tensor | None = None  # by `outer`, after every hook


# The calls in progress. Not attributes of the modules: a compiler takes the sizes of such tensors for fixed.
_calls: list[Call] = []


def run(base: nn.Module, call: Call, args: tuple, options: dict):
    """The model's own forward, with `call` in progress."""
    if list(call.outer._forward_hooks.values())[-1:] != [_catch]:
        _hook_last(call.outer)
    if any(other.linear is call.linear for other in _calls):
        raise RuntimeError("an attached model computes one loss at a time: it is in use, perhaps by another thread")
    _calls.append(call)
    try:
        return plain(base, "forward")(*args, **{"use_cache": False, **options, "return_dict": True})
    finally:
        _calls.remove(call)


def run_probe(base: nn.Module, probe: Tensor, inputs: dict):
    """A forward whose lm_head returns `probe`: the model's outputs; what the output embeddings returned, None if they
    were not called; whether the attached lm_head was called."""
    call = Call(base, probe=probe)
    outputs = run(base, call, (), inputs)
    return outputs, call.returned, call.reached


def cover_lm_head(base: Any) -> None:
    """Makes every module on the way heed the calls in progress."""
    outer = base.get_output_embeddings()
    if has_copies(outer):
        _cover_forward(outer, _copies_forward)
        cover(outer, "update", _update)
    for layer in copies(outer):
        _cover_layer(layer)
    outer.register_forward_hook(_catch)
    if base.sfr.inner:
        base.get_submodule(base.sfr.inner).register_forward_pre_hook(_catch_inner)


def uncover_lm_head(base: Any) -> None:
    for module in base.get_output_embeddings().modules():  # none is covered if the embeddings were resized
        if is_covered(module):
            uncover(module)
        unhook(module._forward_hooks, _catch)
    if base.sfr.inner:
        unhook(base.get_submodule(base.sfr.inner)._forward_pre_hooks, _catch_inner)


def unhook(hooks: dict, hook: Callable) -> None:
    for key in [key for key, other in hooks.items() if other is hook]:
        del hooks[key]


def _cover_forward(module: nn.Module, function: Callable) -> None:
    """An engine that offloads weights has put its forward over the module's; ours goes under it."""
    cover(module, "forward", function, "_old_forward" if hasattr(module, "_hf_hook") else None)


def _cover_layer(layer: Any) -> None:
    if hasattr(layer, "base_layer"):
        _cover_forward(layer, _lora_forward)
        cover(layer, "update_layer", _update_layer)
        _cover_adapters(layer)
        layer = layer.base_layer
    _cover_forward(layer, _linear_forward)


def _cover_adapters(layer: Any) -> None:
    for module in (*layer.lora_A.values(), *layer.lora_B.values()):
        if not is_covered(module):
            _cover_forward(module, _adapter_forward)


def _update(self, *args, **kwargs) -> None:
    """Of modules_to_save: adds a copy, which is covered already if it is one of the original."""
    plain(self, "update")(*args, **kwargs)
    for layer in copies(self):
        if not is_covered(layer):
            check_copy(layer)
            _cover_layer(layer)


def _update_layer(self, *args, **kwargs) -> None:
    """Of a LoRA layer: adds an adapter."""
    plain(self, "update_layer")(*args, **kwargs)
    _cover_adapters(self)


def _copies_forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
    """Of modules_to_save."""
    for call in _calls:
        if call.outer is self:
            _refuse_mixed(kwargs)
    return plain(self, "forward")(hidden, *args, **kwargs)


def _lora_forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
    """Of a LoRA layer."""
    for call in _calls:
        if call.copy is self:
            break
    else:
        return plain(self, "forward")(hidden, *args, **kwargs)
    _refuse_mixed(kwargs)
    if self.disable_adapters and self.merged:  # as PEFT's own forward
        self.unmerge()
    call.adapters = active_adapters(self)
    call.path = [*adapter_modules(self, call.adapters), self.base_layer]
    return call.path[0](hidden)


def _refuse_mixed(options: dict) -> None:
    if options.get("adapter_names") is not None:
        raise ValueError("adapter_names, which mixes adapters in a batch, is not served where a loss is asked for")


def _adapter_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    """Of lora_A and lora_B: in a call what the rest of its path returns."""
    for call in _calls:
        for module, following in pairwise(call.path):
            if module is self:
                return following(hidden)
    return plain(self, "forward")(hidden)


def _linear_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    """Of the linear layer: its logits; in a call the loss, shaped like one logit, or the probe."""
    for call in _calls:
        if call.linear is self:
            break
    else:
        return plain(self, "forward")(hidden)
    call.reached = True
    if call.probe is not None:
        return call.probe
    options = decoder_options(call.copy, call.adapters, self.bias, hidden) | _on_device(call.inputs, hidden.device)
    if call.layer is not None:
        options["flow_hidden"] = check_inner(call.inner, hidden, call.sfr.config.layer_index)
    call.out = call.sfr(hidden, self.weight, **options)
    return call.out.loss.reshape(1, 1, 1)


_wait = torch.compiler.disable(PendingTargets.wait)


def _settled(targets: Tensor | PendingTargets) -> Tensor:
    """The embeddings, waited for where they are being made."""
    return _wait(targets) if isinstance(targets, PendingTargets) else targets


def _on_device(inputs: dict, device: torch.device) -> dict:
    """The loss's arguments where the lm_head is, which may be on another device than the batch and the first layers."""
    inputs = inputs | {"targets": _settled(inputs["targets"])} if "targets" in inputs else inputs
    away = [name for name, value in inputs.items() if getattr(value, "device", device) != device]
    return inputs | {name: inputs[name].to(device) for name in away}


def _catch(module: nn.Module, args: tuple, output: Tensor) -> None:
    """The last hook of the output embeddings: keeps what they return."""
    for call in _calls:
        if call.outer is module:
            call.returned = output if call.probe is None else output.clone()  # some models write over their logits


def _catch_inner(module: nn.Module, args: tuple) -> None:
    """A hook of the layer that is given the head's hidden states: keeps them."""
    for call in _calls:
        if call.layer is module:
            call.inner.append(args[0] if args else None)


@torch.compiler.disable
def _hook_last(module: nn.Module) -> None:
    """Moves our hook behind those of an engine that came after attach: gradients must flow through what they return."""
    unhook(module._forward_hooks, _catch)
    module.register_forward_hook(_catch)

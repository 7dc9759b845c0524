"""Which lm_heads a fused loss can replace: a linear layer whose logits are hidden · weightᵀ + bias, LoRA on one, and
PEFT's modules_to_save, which has several of these, one in use."""

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .lora import active_adapters, is_lora
from .methods import is_covered

REPLACED_FORWARD = (
    "the lm_head's forward was replaced after attach, and the loss with it: restore it, or detach the model and attach "
    "it again"
)


def has_copies(out: Any) -> bool:
    """Whether the output embeddings are PEFT's modules_to_save: the original, and a copy for some of the adapters."""
    return hasattr(out, "modules_to_save") and hasattr(out, "original_module")


def copies(out: Any) -> list[nn.Module]:
    """The output embeddings alone, or the original and all its copies."""
    return [out.original_module, *out.modules_to_save.values()] if has_copies(out) else [out]


def copy_in_use(out: Any) -> nn.Module:
    """The one of `copies` that a forward goes through, by the rule of PEFT's own."""
    if not has_copies(out):
        return out
    for name in out.active_adapters:  # one at most
        if not out.disable_adapters and name in out.modules_to_save:
            return out.modules_to_save[name]
    return out.original_module


def covered_linear(base: nn.Module) -> nn.Linear:
    """The linear layer of an attached model's lm_head, of the copy in use."""
    out = copy_in_use(base.get_output_embeddings())
    if hasattr(out, "base_layer"):
        if is_covered(out):
            return out.base_layer
        raise RuntimeError(
            "the model's lm_head was given an adapter after attach: detach the model and attach it again"
        )
    for module in out.modules():
        if is_covered(module):
            return module
    raise RuntimeError("the model's lm_head was replaced after attach: resize or wrap it first, then attach")


def weight_shape(linear: nn.Linear) -> tuple[int, int]:
    """(V, H). PEFT's ensure_weight_tying makes a layer of (H, V) and puts a weight of (V, H) in it; but an engine that
    shards weights may leave none to look at."""
    wanted, weight = (linear.out_features, linear.in_features), linear.weight
    return wanted[::-1] if tuple(weight.shape) == wanted[::-1] else wanted


def output_linear(base: nn.Module) -> nn.Linear:
    """The linear layer behind the model's logits, of the copy in use. TypeError or ValueError if they, or those of
    another copy, come from anything else."""
    if hasattr(getattr(base, "module", None), "get_output_embeddings"):  # DistributedDataParallel, FSDP, DeepSpeed
        raise TypeError(f"model is wrapped in {type(base).__name__}: attach the model inside, then wrap it")
    if not hasattr(base, "get_output_embeddings"):
        raise TypeError(f"model must be a transformers causal LM, got {type(base).__name__}")
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a causal LM, {type(base).__name__} is an encoder-decoder")
    out = base.get_output_embeddings()
    if out is None:
        raise TypeError(f"model has no lm_head: a causal LM is needed, …ForCausalLM, got {type(base).__name__}")
    for layer in copies(out):
        check_copy(layer)
    used = copy_in_use(out)
    return used.base_layer if is_lora(used) else used


def check_copy(out: Any) -> None:
    """TypeError or ValueError if it is neither a linear layer nor LoRA on one."""
    if is_lora(out):
        active_adapters(out)
        for module in (*out.lora_A.values(), *out.lora_B.values()):
            _check_layer(module)
        _check_forward(out)
        out = out.base_layer
    if hasattr(out, "base_layer"):
        raise TypeError(
            f"model's lm_head carries an adapter that is no plain LoRA, {type(out).__module__}.{type(out).__name__}, "
            "whose share of the logits a fused loss would drop: leave the lm_head out of target_modules, or train it "
            "whole with modules_to_save"
        )
    if hasattr(out, "token_adapter"):  # of tied embeddings
        raise TypeError(
            "model's lm_head has trained tokens of its own (trainable_token_indices of tied embeddings), which a fused "
            "loss would drop: train the embeddings whole with modules_to_save, or untie them"
        )
    if not isinstance(out, nn.Linear):
        raise TypeError(f"model's lm_head must be a torch.nn.Linear, got {type(out).__module__}.{type(out).__name__}")
    if is_covered(out):
        raise ValueError("model's lm_head belongs to another attached model, too: detach that one first")
    _check_layer(out)


def _check_layer(linear: nn.Linear) -> None:
    kind = type(linear)
    if kind.forward is not nn.Linear.forward:
        raise TypeError(
            f"model's lm_head is a {kind.__module__}.{kind.__name__}, whose forward is not that of nn.Linear: a fused "
            "loss would not compute its logits. If it is quantised, keep it out of the quantisation"
        )
    _check_forward(linear)
    weight = linear.weight
    wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    if wrapped or not weight.is_floating_point() or weight.itemsize < 2:
        raise TypeError(
            "the weight of model's lm_head must be a plain tensor of 16 bits or more, got "
            f"{type(weight).__name__} of {weight.dtype}: keep the lm_head out of the quantisation"
        )


def _check_forward(module: nn.Module) -> None:
    # accelerate replaces forward, and keeps the one it found
    own = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        raise TypeError("the forward of model's lm_head was replaced, and a fused loss would not call it: restore it")

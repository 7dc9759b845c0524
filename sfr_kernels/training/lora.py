"""LoRA on the lm_head: what of a PEFT layer goes into the fused loss. `calls` covers the forward of its modules."""

from typing import Any

from torch import Tensor, nn

from ..ops import LoRA


def is_lora(module: nn.Module) -> bool:
    """Whether it is PEFT's plain LoRA layer; quantised ones and other adapters have layers of their own."""
    if not hasattr(module, "base_layer"):
        return False
    from peft.tuners.lora.layer import Linear  # late: what has a base layer has imported it

    return type(module) is Linear


def active_adapters(layer: Any) -> list[str]:
    """The names of the adapters that the layer adds, in its order. TypeError for one that is not plain."""
    if layer.disable_adapters or layer.merged:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        if (variant := layer.lora_variant.get(name)) is not None:
            raise TypeError(
                f"the adapter {name!r} on the lm_head is no plain LoRA ({type(variant).__name__}), and a fused loss "
                "would not compute its logits: leave the lm_head out of its target_modules"
            )
    return names


def adapter_modules(layer: Any, names: list[str]) -> list[nn.Module]:
    return [module[name] for name in names for module in (layer.lora_A, layer.lora_B)]


def decoder_options(layer: Any, names: list[str], bias: Tensor | None, hidden: Tensor) -> dict[str, Any]:
    """The loss's `lora` and `bias`. Read within the calls of all modules that have the weights, which are cast to the
    dtype of hidden: PEFT keeps those of a 16-bit model in float32."""
    adapters = []
    for name in names:
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        scale, weights = layer.scaling[name], (module.weight.to(hidden.dtype) for module in (down, up))
        adapters.append(LoRA(*weights, scale, dropout.p if dropout.training and hasattr(dropout, "p") else 0.0))
        if up.bias is not None:  # lora_bias
            added = scale * up.bias.to(hidden.dtype)
            bias = added if bias is None else bias + added
    return dict(lora=adapters, bias=bias)

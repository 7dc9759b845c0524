"""The hidden state of `SFRConfig.layer_index`, where that is not the last: what the decoder layer after it is given.

A layer's input is a tensor in every architecture, as its output is not, and comes from outside of what gradient
checkpointing runs again, so that the graph knows it. With `output_hidden_states` every layer's would be kept.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NOT_TRAINED = (
    "layer_index={index}: the flow loss would reach no parameter of the model, since none before this hidden state is "
    "trained, or it is detached. Train some, or choose a later one"
)


def layer_of(base: Any, index: int) -> str | None:
    """The name within a transformers model of the layer that is given hidden state `index`; None for the last one.
    ValueError if there is no such layer, or it cannot be found."""
    if index == -1:
        return None
    count = getattr(base.config.get_text_config(), "num_hidden_layers", 0)
    if not -count - 1 <= index <= count:
        raise ValueError(
            f"layer_index must be within −{count + 1} and {count} for a model of {count} layers, got {index}"
        )
    index %= count + 1
    if index == count:
        return None
    decoder = base.get_decoder()
    lists = [(name.count("."), m) for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList)]
    lists = [(depth, m) for depth, m in lists if len(m) == count]
    found = [m for depth, m in lists if depth == min(depth for depth, _ in lists)]  # experts are further inside
    if len(found) != 1:
        raise ValueError(
            f"layer_index={index} needs a decoder with a torch.nn.ModuleList of its {count} layers, and "
            f"{type(decoder).__name__} has {len(found)} such lists: leave layer_index at −1"
        )
    return next(name for name, m in base.named_modules() if m is found[0][index])


def check_trained(base: Any, name: str, index: int) -> None:
    """RuntimeError if layers are trained, and none of them comes before the one with this name. That its hidden states
    need a gradient would not do: `enable_input_require_grads` makes those of frozen embeddings need one."""
    parent, _, place = name.rpartition(".")
    layers = [*base.get_submodule(parent)]
    before = (base.get_input_embeddings(), *layers[: int(place)])
    if not _any_trained(before) and _any_trained(layers[int(place) :]):
        raise RuntimeError(_NOT_TRAINED.format(index=index))


def _any_trained(modules: Iterable[nn.Module]) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def check_inner(found: list, hidden: Tensor, index: int) -> Tensor:
    """The hidden states of all calls of the layer, made to be those of the head, beside the last ones.
    ValueError or RuntimeError if they cannot be."""
    if len(found) != 1:
        raise RuntimeError(
            f"layer_index={index}: the layer that is given this hidden state was called {len(found)} times, not once. "
            "If it was replaced or wrapped after attach, do that first; else leave layer_index at −1"
        )
    (inner,) = found
    if not isinstance(inner, Tensor) or inner.shape != hidden.shape:
        shape = tuple(inner.shape) if isinstance(inner, Tensor) else type(inner).__name__
        raise ValueError(
            f"hidden state layer_index={index} must be like the last one, {tuple(hidden.shape)}, got {shape}: "
            "leave layer_index at −1"
        )
    if torch.is_grad_enabled() and hidden.requires_grad and not inner.requires_grad:
        raise RuntimeError(_NOT_TRAINED.format(index=index))
    return inner.to(hidden.device)

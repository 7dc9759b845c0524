"""Parameters that an engine has spread over processes: FSDP2's, which are DTensors, and those of DeepSpeed's ZeRO.

ZeRO-3 leaves of a parameter an empty tensor with `ds_…` attributes. Every stage steps float32 copies of its own, from
which it writes the parameters anew at each step. DeepSpeed is imported only where it is in use.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_FLAT = (
    "FullyShardedDataParallel (FSDP1) has made flat tensors of the velocity head's parameters, which the loss cannot "
    "use: take FSDP2, which is torch's fully_shard, fsdp_version=2 for accelerate, "
    'fsdp_config={"version": 2} for Trainer'
)


def _is_zero3(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """By name. FSDP2 may have left the whole ones of the last forward in their place, until it is asked for a
    state_dict."""
    state = module.state_dict(keep_vars=True)
    return {name: p for name, p in state.items() if isinstance(p, nn.Parameter)}


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) or _is_zero3(p) for p in parameters_of(module).values())


def has_copies(module: nn.Module) -> bool:
    """Whether DeepSpeed steps float32 copies of the parameters in their place."""
    return any(_is_zero3(p) or hasattr(p, "_hp_mapping") for p in module.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters are used; CPU offload keeps them elsewhere."""
    p = next(iter(parameters_of(module).values()))
    return torch.device(p.device_mesh.device_type) if isinstance(p, DTensor) else p.device


def size(parameter: Tensor) -> int:
    """Elements of the whole parameter."""
    return parameter.ds_numel if _is_zero3(parameter) else parameter.numel()


def check_gathered(module: nn.Module) -> None:
    """RuntimeError in a call that uses the module's parameters together, if FSDP2 shards a part of it by itself."""
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise RuntimeError(
            "a part of the velocity head is a unit of fully_shard's own, and not gathered where the loss uses it: "
            "fully_shard the layers and the model, and leave the head to that of the model"
        )


def check_not_flat(module: nn.Module) -> None:
    """RuntimeError for a module whose parameters FSDP1 has flattened. In a forward they are views, not parameters."""
    parameters = list(module.parameters())
    managed = getattr(module, "_is_fsdp_managed_module", False)  # by FSDP2, too
    flat = any(not isinstance(p, nn.Parameter) or getattr(p, "_fsdp_flattened", False) for p in parameters)
    if not parameters or (managed and flat):
        raise RuntimeError(_FLAT)


def _whole(parameters: list[Tensor], writer: int | None = None) -> AbstractContextManager:
    """A context in which ZeRO-3's among the parameters are whole; `writer` is the process whose changes are kept."""
    sharded = [p for p in parameters if _is_zero3(p)]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer)


@torch.no_grad()
def gathered(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU of some of `parameters_of`. Where they are sharded, every process must call it."""
    with _whole(list(parameters.values())):
        return {name: _full(p.detach()).to("cpu", copy=True).contiguous() for name, p in parameters.items()}


def _full(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


@torch.no_grad()
def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Gives the parameters these whole values, in place; every process must call it. Those that have them already are
    left alone, with the float32 copies of which they may be the rounding."""
    if not is_sharded(module) and not has_copies(module):
        module.load_state_dict(values)
        return
    parameters = parameters_of(module)
    for name, now in gathered(parameters).items():
        p, value = parameters[name], values[name].to(parameters[name].dtype)
        if torch.equal(now, value):
            continue
        if isinstance(p, DTensor):
            p.copy_(distribute_tensor(value.to(p.device_mesh.device_type), p.device_mesh, p.placements).to(p.device))
            continue
        with _whole([p], writer=0):
            p.copy_(value)
        if has_copies(module):
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(p, values[name].to(p.device, torch.float32))

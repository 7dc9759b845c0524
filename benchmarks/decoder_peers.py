"""What people use for a linear layer's cross-entropy, on the same tensors: hidden (N, H), weight (V, H), labels (N,).

Libraries are used where they are installed; `missing` names the others. Each is called as its documentation says, with
its defaults, and gives the mean over the labels that are not −100.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels)


def liger_float32(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, accum_dtype=torch.float32)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


def quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels)


LIBRARIES: dict[str, tuple[str, Loss]] = {
    "Liger": ("liger_kernel", liger),
    "Liger, float32 dW": ("liger_kernel", liger_float32),
    "cut-cross-entropy": ("cut_cross_entropy", cut_cross_entropy),
    "quack": ("quack", quack),
}


def installed(device: torch.device) -> dict[str, Loss]:
    """Every way that can be tried on this machine."""
    found = {"eager": eager}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = torch_linear_cross_entropy
    if device.type == "cuda":  # which the others are made for
        found["torch.compile"] = torch.compile(eager, dynamic=False)
        found |= {name: loss for name, (module, loss) in LIBRARIES.items() if importlib.util.find_spec(module)}
    return found


def missing(device: torch.device) -> list[str]:
    """The names of the others."""
    names = ("F.linear_cross_entropy", "torch.compile", *LIBRARIES)
    return [name for name in names if name not in installed(device)]

"""What people use for a linear layer's cross-entropy, on the same tensors: hidden (N, H), weight (V, H), labels (N,).

Libraries are used where they are installed. Each is called as its documentation says, with its defaults, and gives the
mean over the labels that are not −100.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
EAGER, COMPILED, EAGER_ROWS = "eager", "torch.compile", "eager, supervised rows"


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def eager_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As one would spare the other rows by hand; on a GPU it waits for their number."""
    kept = labels != -100
    return eager(hidden[kept], weight, labels[kept])


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


def absent(name: str, device: torch.device) -> str | None:
    """Why a peer cannot be tried on this machine, None if it can."""
    if name == "F.linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} does not have it (2.13 does)"
    if name == COMPILED and device.type != "cuda":
        return "compiling for a CPU takes longer than all the rest"
    return library(LIBRARIES[name][0], device) if name in LIBRARIES else None


def library(module: str, device: torch.device) -> str | None:
    """Why a library made for GPUs cannot be tried."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return None if device.type == "cuda" else f"{module} needs a GPU"


def reasons(device: torch.device) -> dict[str, str | None]:
    """Every peer, and why it cannot be tried."""
    return {name: absent(name, device) for name in (EAGER, COMPILED, "F.linear_cross_entropy", *LIBRARIES)}


def loss_of(name: str) -> Loss:
    if name in (EAGER, EAGER_ROWS):
        return eager if name == EAGER else eager_rows
    if name == COMPILED:
        return torch.compile(eager, dynamic=False)
    return torch_linear_cross_entropy if name == "F.linear_cross_entropy" else LIBRARIES[name][1]

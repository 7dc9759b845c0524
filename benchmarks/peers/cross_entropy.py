"""What people use for a linear layer's cross-entropy, on the same tensors: hidden (N, H), weight (V, H), labels (N,).

Libraries are used where they are installed. Each is called as its documentation says, with its defaults, and gives the
mean over the labels that are not −100.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import Run
from ..problem import Problem

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
EAGER, COMPILED, EAGER_ROWS, TORCH = "eager", "torch.compile", "eager, supervised rows", "F.linear_cross_entropy"


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def eager_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As one would spare the other rows by hand; on a GPU it waits for their number."""
    kept = labels != -100
    return eager(hidden[kept], weight, labels[kept])


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels, **options)


def liger_float32(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return liger(hidden, weight, labels, accum_dtype=torch.float32)


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
    if name == TORCH and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} does not have it (2.13 does)"
    if name == COMPILED and device.type != "cuda":
        return "compiling for a CPU takes longer than all the rest"
    if name in LIBRARIES:
        module = LIBRARIES[name][0]
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        return None if device.type == "cuda" else f"{module} needs a GPU"
    return None


def reasons(device: torch.device) -> dict[str, str | None]:
    """Every peer, and why it cannot be tried."""
    return {name: absent(name, device) for name in (EAGER, COMPILED, TORCH, *LIBRARIES)}


def loss_of(name: str) -> Loss:
    own = {EAGER: eager, EAGER_ROWS: eager_rows, TORCH: torch_linear_cross_entropy}
    if name == COMPILED:
        return torch.compile(eager, dynamic=False)
    return own.get(name) or LIBRARIES[name][1]


def run_of(problem: Problem, name: str) -> Run:
    loss_of_name, leaves, labels = loss_of(name), list(problem.leaves.values()), problem.labels.flatten()

    def run() -> list[Tensor]:
        loss = loss_of_name(problem.hidden.flatten(0, 1), problem.weight, labels)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return run

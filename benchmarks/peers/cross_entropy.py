"""What people use for a linear layer's cross-entropy, on the same tensors: hidden (N, H), weight (V, H), labels (N,).

Libraries are used where they are installed. Each is called as its documentation says, with its defaults, and gives the
mean over the labels that are not −100.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import Run
from ..problem import Problem

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
EAGER, COMPILED, EAGER_ROWS, TORCH = "eager", "torch.compile", "eager, supervised rows", "F.linear_cross_entropy"
LIBRARIES = {"Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "quack": "quack"}  # and their modules


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def eager_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    kept = labels != -100  # as one would spare the other rows by hand; on a GPU it waits for their number
    return eager(hidden[kept], weight, labels[kept])


def compiled(name: str, function: Callable) -> Callable:
    return torch.compile(function, dynamic=False) if name == COMPILED else function


def loss_of(name: str) -> Loss:
    if name in (EAGER, COMPILED):
        return compiled(name, eager)
    if name == EAGER_ROWS:
        return eager_rows
    if name == TORCH:
        return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
    if name == "cut-cross-entropy":
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy
    if name == "quack":
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def absent(name: str, device: torch.device) -> str | None:
    """Why a peer cannot be tried on this machine, None if it can."""
    if name == TORCH and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} does not have it (2.13 does)"
    if name == COMPILED and device.type != "cuda":
        return "compiling for a CPU takes longer than all the rest"
    module = LIBRARIES.get(name)
    if module is not None and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return f"{module} needs a GPU" if module and device.type != "cuda" else None


def run_of(problem: Problem, name: str) -> Run:
    loss, leaves, labels = loss_of(name), list(problem.leaves.values()), problem.labels.flatten()

    def run() -> list[Tensor]:
        value = loss(problem.hidden.flatten(0, 1), problem.weight, labels)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return run

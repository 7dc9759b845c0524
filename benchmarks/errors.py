"""Errors against float64, and the verdict on them: no more than 1.5 times what eager torch makes in the same dtype.

Eager torch is the reference, run in that dtype on that device. Errors are L2 norms of the loss and of each gradient,
taken over several draws of hidden states and noise: one number, or a bias of forty, can be right by chance.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problems import Problem

FACTOR = 1.5
FLOOR = 2.0**-22  # of the norm: one rounding of a float32 result, or two
COARSE = 2.0**-4  # of the norm, where eager torch gives nothing to compare with
UPSTREAM = 1024.0  # a loss scaler's factor, without which fp16 loses gradients below its smallest number, everyone's
CHUNK = 2**26  # numbers that are compared at a time


@dataclass
class Error:
    """Of one output: squares of the norms, summed over the draws."""

    ours: float = 0.0
    eager: float = 0.0
    exact: float = 0.0  # of the output itself
    factor: float = FACTOR

    @property
    def ratio(self) -> float:
        """The error over its bound; above 1 is wrong, and so is what is not a number. Where eager torch overflowed, or
        ran out of memory, the bound is a coarse one."""
        if not (math.isfinite(self.ours) and math.isfinite(self.exact)):
            return math.inf
        if self.ours == 0:
            return 0.0
        if not math.isfinite(self.eager):
            return (self.ours / self.exact) ** 0.5 / COARSE if self.exact else math.inf
        bound = self.factor * self.eager**0.5 + FLOOR * self.exact**0.5
        return self.ours**0.5 / bound if bound else math.inf

    def to_dict(self) -> dict[str, float | None]:
        """Relative errors, and what they are relative to; None for what is not a finite number."""
        norm = self.exact**0.5
        scale = norm or 1.0
        values = dict(ours=self.ours**0.5 / scale, eager=self.eager**0.5 / scale, norm=norm, ratio=self.ratio)
        return {name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in values.items()}


def judge(
    problem: Problem, backends: Iterable[str], draws: int, factor: float = FACTOR
) -> tuple[dict[str, dict[str, Error]], dict[str, str]]:
    """Every output's error of each backend, and what the others raised."""
    names = ["loss", *problem.leaves]
    errors, raised = {b: {name: Error(factor=factor) for name in names} for b in backends}, {}
    twin = problem.in_float64()
    for draw in range(draws):
        problem.redraw(draw)
        with torch.no_grad():
            twin.hidden.copy_(problem.hidden)
        exact = exact_outputs(twin)
        norms = [_square(t) for t in exact]
        try:
            eager = [_square_error(t, e) for t, e in zip(_outputs(problem, "reference"), exact, strict=True)]
        except torch.OutOfMemoryError:  # at shapes that are not meant for eager torch, it bounds nothing
            eager = [math.inf] * len(exact)
        for backend in [b for b in errors if b not in raised]:
            try:
                ours = [_square_error(t, e) for t, e in zip(_outputs(problem, backend), exact, strict=True)]
            except Exception as error:  # one kernel that fails must not hide the others
                raised[backend] = message(error)
                continue
            for name, *squares in zip(names, ours, eager, norms, strict=True):
                e = errors[backend][name]
                e.ours, e.eager, e.exact = (a + b for a, b in zip((e.ours, e.eager, e.exact), squares, strict=True))
    return {b: e for b, e in errors.items() if b not in raised}, raised


def message(error: Exception) -> str:
    """One line. The error itself would keep alive what its frames hold, gigabytes if that is what it is about."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def exact_outputs(problem: Problem) -> list[Tensor]:
    """The loss and UPSTREAM times every gradient, piece after piece."""
    leaves = list(problem.leaves.values())
    total, sums = torch.zeros((), dtype=torch.float64, device=problem.device), [torch.zeros_like(p) for p in leaves]
    for piece in problem.oracle():
        loss = piece()
        if loss.requires_grad:
            for s, g in zip(sums, torch.autograd.grad(loss * UPSTREAM, leaves, allow_unused=True), strict=True):
                if g is not None:
                    s += g
        total += loss.detach()
    return [total, *sums]


def _outputs(problem: Problem, backend: str) -> list[Tensor]:
    loss = problem.loss(backend, judged=True)
    grads = torch.autograd.grad(loss, list(problem.leaves.values()), torch.full_like(loss, UPSTREAM))
    return [loss.detach(), *grads]


def _square(t: Tensor) -> float:
    return sum(part.double().square().sum().item() for part in t.flatten().split(CHUNK))


def _square_error(found: Tensor, exact: Tensor) -> float:
    pairs = zip(found.flatten().split(CHUNK), exact.flatten().split(CHUNK), strict=True)
    return sum((f.double() - e).square().sum().item() for f, e in pairs)

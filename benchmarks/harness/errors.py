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
COARSE = 2.0**-4  # of the norm: of peers, and where eager torch gives nothing to compare with
UPSTREAM = 1024.0  # a loss scaler's factor, without which fp16 loses gradients below its smallest number, everyone's
CHUNK = 2**26  # numbers that are compared at a time


class WrongResultError(AssertionError):
    """Something else was computed than what is to be timed."""


@dataclass
class Error:
    """Of one output: squares of the norms, summed over the draws."""

    ours: float = 0.0
    eager: float = 0.0
    exact: float = 0.0  # of the output itself
    factor: float = FACTOR
    slack: float = 0.0  # what is allowed besides: eager's error of a single number may be small by chance

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
        bound = self.factor * self.eager**0.5 + FLOOR * self.exact**0.5 + self.slack**0.5
        return self.ours**0.5 / bound if bound else math.inf

    def __add__(self, other: "Error") -> "Error":
        sums = (getattr(self, name) + getattr(other, name) for name in ("ours", "eager", "exact"))
        return Error(*sums, self.factor, self.slack + other.slack)

    def to_dict(self) -> dict[str, float | None]:
        """Relative errors, and what they are relative to; None for what is not a finite number."""
        norm = self.exact**0.5
        scale = norm or 1.0
        values = dict(ours=self.ours**0.5 / scale, eager=self.eager**0.5 / scale, norm=norm, ratio=self.ratio)
        return {name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in values.items()}


class Oracle:
    """Results in float64, and how far from them eager torch comes in the dtype that is judged."""

    def __init__(
        self,
        names: list[str],
        exact: list[Tensor],
        eager: list[Tensor] | None,  # None: it ran out of memory, and bounds nothing
        slack: dict[str, float] | None = None,  # relative, by name
    ):
        self.names, self.exact, self.slack = names, exact, slack or {}
        self.norms = [square(t) for t in exact]
        self.eager = [math.inf] * len(exact) if eager is None else self._squares(eager)

    @classmethod
    def of(cls, problem: Problem, draw: int = 0) -> "Oracle":
        """Of a problem, at one draw of its hidden states and noise: the loss, and UPSTREAM times every gradient.

        The loss is a mean of n rows, each rounded in the dtype: it may err by eps / √n besides.
        """
        problem.redraw(draw)
        exact = exact_outputs(problem.in_float64())
        try:
            eager = outputs_of(problem, "reference")
        except torch.OutOfMemoryError:  # at shapes that are not meant for it
            eager = None
        slack = torch.finfo(problem.dtype).eps / problem.num_rows**0.5
        return cls(["loss", *problem.leaves], exact, eager, dict(loss=slack))

    @classmethod
    def timed(cls, problem: Problem) -> "Oracle":
        """The same at the times that the problem's call draws from its seed: only `distance` has a use for it."""
        problem.redraw(0)
        names = ["loss", *problem.leaves]
        return cls(names, exact_outputs(problem.in_float64(), judged=False), None)

    def _squares(self, found: list[Tensor]) -> list[float]:
        return [square_error(f, e) for f, e in zip(found, self.exact, strict=True)]

    def errors(self, found: list[Tensor], factor: float = FACTOR) -> dict[str, Error]:
        rows = zip(self.names, self._squares(found), self.eager, self.norms, strict=True)
        return {name: Error(*squares, factor, self.slack.get(name, 0.0) ** 2 * squares[2]) for name, *squares in rows}

    def distance(self, found: list[Tensor], gradients: float = 1.0) -> float:
        """The largest relative error; of all results but the first, `gradients` times what was found. Where only the
        sum of a result was found, that is compared with the sum."""
        worst = 0.0
        for number, (f, exact, norm) in enumerate(zip(found, self.exact, self.norms, strict=True)):
            e = square_error(f, exact if f.shape == exact.shape else exact.sum(), gradients if number else 1.0)
            error = (e / norm) ** 0.5 if norm else float(f.any())
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst


def judge(
    problem: Problem, backends: Iterable[str], draws: int, factor: float = FACTOR
) -> tuple[dict[str, dict[str, Error]], dict[str, str]]:
    """Every output's error of each backend over several draws, and what the others raised."""
    errors, raised = {b: {} for b in backends}, {}
    for draw in range(draws):
        oracle = Oracle.of(problem, draw)
        for backend in [b for b in errors if b not in raised]:
            try:
                found = oracle.errors(outputs_of(problem, backend), factor)
            except Exception as error:  # one kernel that fails must not hide the others
                raised[backend] = message(error)
                continue
            for name, e in found.items():
                errors[backend][name] = errors[backend].get(name, Error(factor=factor)) + e
    return {b: e for b, e in errors.items() if b not in raised}, raised


def verdict(found: dict[str, Error]) -> dict:
    """Fields of a result: every error, and the name of the worst. WrongResultError if that is too large."""
    worst = max(found, key=lambda name: found[name].ratio)
    if not found[worst].ratio <= 1:
        raise WrongResultError(describe(worst, found[worst]))
    return dict(errors={name: e.to_dict() for name, e in found.items()}, worst=worst)


def peer_verdict(distance: float) -> dict:
    """The same of a peer, which need only compute the same thing."""
    if not distance <= COARSE:
        raise WrongResultError(f"differs from float64 by {distance:.1e}")
    return dict(error=float(f"{distance:.3g}"))


def describe(name: str, error: Error) -> str:
    e = error.to_dict()
    ours, eager = ("not finite" if e[k] is None else f"{e[k]:.1e}" for k in ("ours", "eager"))
    return f"{name}: error {ours}, eager torch {eager}"


def message(error: Exception) -> str:
    """One line. The error itself would keep alive what its frames hold, gigabytes if that is what it is about."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def exact_outputs(problem: Problem, *, judged: bool = True) -> list[Tensor]:
    """The loss and UPSTREAM times every gradient, piece after piece."""
    leaves = list(problem.leaves.values())
    total, sums = torch.zeros((), dtype=torch.float64, device=problem.device), [torch.zeros_like(p) for p in leaves]
    for piece in problem.oracle(judged):
        loss = piece()
        if loss.requires_grad:
            for s, g in zip(sums, torch.autograd.grad(loss * UPSTREAM, leaves, allow_unused=True), strict=True):
                if g is not None:
                    s += g
        total += loss.detach()
    return [total, *sums]


def outputs_of(problem: Problem, backend: str) -> list[Tensor]:
    """The judged loss and UPSTREAM times every gradient."""
    return problem.with_gradients(problem.loss(backend, judged=True), UPSTREAM)


def square(t: Tensor) -> float:
    return sum(part.double().square().sum().item() for part in t.flatten().split(CHUNK))


def square_error(found: Tensor, exact: Tensor, scale: float = 1.0) -> float:
    pairs = zip(found.flatten().split(CHUNK), exact.flatten().split(CHUNK), strict=True)
    return sum((f.double() * scale - e).square().sum().item() for f, e in pairs)

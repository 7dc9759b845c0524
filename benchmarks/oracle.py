"""Errors against float64: nothing is timed, and no kernel trusted, that has not been judged here.

A result of ours may err 1.5 times as much as eager torch (the reference, in that dtype on that device) does. Errors are
L2 norms of the loss and of each gradient; where they are summed over several draws of hidden states and noise, no bias
of forty numbers is right by chance. A peer need only compute the same thing, to a sixteenth: its error is recorded.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import WrongResultError
from .problem import Problem

FACTOR = 1.5
FLOOR = 2.0**-22  # of the norm: one rounding of a float32 result, or two
COARSE = 2.0**-4  # of the norm: of peers, and where eager torch gives nothing to compare with
CHUNK = 2**26  # numbers that are compared at a time


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
        """Over its bound; above 1 is wrong. Where eager torch overflowed or ran out of memory, the bound is coarse."""
        if not (math.isfinite(self.ours) and math.isfinite(self.exact)):
            return math.inf
        if self.ours == 0:
            return 0.0
        bound = COARSE * self.exact**0.5
        if math.isfinite(self.eager):
            bound = self.factor * self.eager**0.5 + FLOOR * self.exact**0.5 + self.slack**0.5
        return self.ours**0.5 / bound if bound else math.inf

    def __add__(self, other: "Error") -> "Error":
        sums = (getattr(self, name) + getattr(other, name) for name in ("ours", "eager", "exact"))
        return Error(*sums, other.factor, self.slack + other.slack)

    def to_dict(self) -> dict[str, float | None]:
        """Relative errors, and what they are relative to; None for what is not a finite number."""
        norm = self.exact**0.5
        scale = norm or 1.0
        values = dict(ours=self.ours**0.5 / scale, eager=self.eager**0.5 / scale, norm=norm, ratio=self.ratio)
        return {name: float(f"{value:.4g}") if math.isfinite(value) else None for name, value in values.items()}


class Oracle:
    """Results in float64, and how far from them eager torch comes in the dtype that is judged."""

    def __init__(self, names: Iterable[str], exact: list[Tensor], eager: list[Tensor] | None, slack=None):
        """eager: None where it ran out of memory, and bounds nothing. slack: relative, by name."""
        self.names, self.exact, self.slack = list(names), exact, slack or {}
        self.norms = [_square(t) for t in exact]
        self.eager = [math.inf] * len(exact) if eager is None else self._squares(eager)

    @classmethod
    def of(cls, problem: Problem, draw: int = 0) -> "Oracle":
        """Of a problem at one draw. The loss is a mean of n rows, each rounded: it may err by eps / √n besides."""
        problem.redraw(draw)
        exact, rows = problem.exact(), problem.num_flow if problem.weight is None else problem.num_ce
        try:
            eager = problem.judged("reference")
        except torch.OutOfMemoryError:  # at shapes that are not meant for it
            eager = None
        slack = torch.finfo(problem.dtype).eps / max(1, rows) ** 0.5
        return cls(["loss", *problem.leaves], exact, eager, dict(loss=slack))

    def _squares(self, found: list[Tensor]) -> list[float]:
        return [_square_error(f, e) for f, e in zip(found, self.exact, strict=True)]

    def errors(self, found: list[Tensor], factor: float = FACTOR) -> dict[str, Error]:
        rows = zip(self.names, self._squares(found), self.eager, self.norms, strict=True)
        return {name: Error(*squares, factor, self.slack.get(name, 0.0) ** 2 * squares[2]) for name, *squares in rows}

    def verdict(self, found: list[Tensor], factor: float = FACTOR) -> dict:
        return verdict(self.errors(found, factor))

    def peer_verdict(self, found: list[Tensor], gradients: float = 1.0) -> dict:
        """The same of a peer: the largest relative error; of all results but the first, `gradients` times what was
        found. Where only the sum of a result was found, that is compared with the sum."""
        worst = 0.0
        for number, (f, exact, norm) in enumerate(zip(found, self.exact, self.norms, strict=True)):
            e = _square_error(f, exact if f.shape == exact.shape else exact.sum(), gradients if number else 1.0)
            error = (e / norm) ** 0.5 if norm else float(f.any())
            worst = max(worst, error if math.isfinite(error) else math.inf)
        if not worst <= COARSE:
            raise WrongResultError(f"differs from float64 by {worst:.1e}")
        return dict(error=float(f"{worst:.3g}"))


def _square(t: Tensor) -> float:
    return sum(part.double().square().sum().item() for part in t.flatten().split(CHUNK))


def _square_error(found: Tensor, exact: Tensor, scale: float = 1.0) -> float:
    pairs = zip(found.flatten().split(CHUNK), exact.flatten().split(CHUNK), strict=True)
    return sum((f.double() * scale - e).square().sum().item() for f, e in pairs)


def judge(problem: Problem, backend: str, draws: int) -> dict[str, Error]:
    """Every output's error of a backend over several draws."""
    total: dict[str, Error] = {}
    for draw in range(draws):
        found = Oracle.of(problem, draw).errors(problem.judged(backend))
        total = {name: total.get(name, Error()) + error for name, error in found.items()}
    return total


def verdict(errors: dict[str, Error]) -> dict:
    """Fields of a result of ours: every error, and the name of the worst. WrongResultError if that is too large."""
    worst = max(errors, key=lambda name: errors[name].ratio)
    found = {name: error.to_dict() for name, error in errors.items()}
    if not errors[worst].ratio <= 1:
        ours, eager = ("not finite" if found[worst][k] is None else f"{found[worst][k]:.1e}" for k in ("ours", "eager"))
        raise WrongResultError(f"{worst}: error {ours}, eager torch {eager}")
    return dict(errors=found, worst=worst)

"""What a benchmark is made of: a suite has cases, a case is made into work, and every provider runs that work.

A provider is a way to compute the op: one of our backends, or what people would use instead (a peer). Files
`bench_<op>.py` hold a `SUITE` each; `race.py` judges and times, `conftest.py` makes a pytest test of every case and
provider.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import WrongResultError
from .floor import Gemm
from .timing import LEAST_RUNS, Graph

OURS = ("triton", "cuda", "torch")
PRODUCTS, LIMIT = "products", "limit"  # what bounds a case, timed beside its providers
GRAPH = ", graph"  # ends the name of a provider whose launches a CUDA graph replays
__all__ = ["GRAPH", "LIMIT", "OURS", "PRODUCTS", "Case", "Goal", "Run", "Suite", "Work", "WrongResultError"]
Run = Callable[[], list[Tensor]]  # does the work once and returns its results, the loss and the gradients say


@dataclass(frozen=True)
class Goal:
    """What the project wants of its own backends at a case; see `goals.py`."""

    of_products: float | None = None  # at most so many times the matrix products alone
    of_limit: float | None = None  # at most so many times the limit
    peer: float | None = None  # the fastest peer takes at least so many times as long
    rivals: tuple[tuple[str, float], ...] = ()  # and these providers so many times
    ms: float | None = None
    weights: float | None = None  # peak memory, in sizes of the lm_head's weight
    backends: tuple[str, ...] | None = None  # of whom; None: every one of ours


@dataclass(frozen=True)
class Case:
    """A problem's sizes, and how it is measured."""

    op: str
    label: str  # without op and dtype
    sizes: dict[str, int | float | str | bool]  # flat: "model", "tokens", "hidden_size", "vocab", "supervised", …
    dtype: torch.dtype
    shape: object = None  # what the suite's `make` needs beyond that
    sweeps: tuple[dict, ...] = ()  # "axis", "x", "series": of the curves that it is a point of
    main: bool = True  # it is shown by itself, not only as a point of curves
    goal: Goal = Goal()
    seconds: float = 2.0  # of timing, for all providers together
    least_runs: int = LEAST_RUNS  # of each provider; fewer where one takes seconds
    on_host: bool = False  # done when it returns: timed by the CPU's clock, on any device
    providers: tuple[str, ...] | None = None  # those of the suite that take part; None: all
    quick: bool = False  # part of the five-minute selection

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def group(self) -> str:
        return f"{self.op}: {self.label}, {self.dtype_name}"


@dataclass
class Work:
    """A case on its device: what every provider runs, what judges it, and what bounds it."""

    run: Callable[[str], Run]  # provider → its run; called once, the first run may compile
    judge: Callable[[str, Run], dict]  # (provider, its run) → fields for the result; WrongResultError if it is wrong
    gemms: list[Gemm] = field(default_factory=list)  # the matrix products that cannot be avoided
    factors: Callable[[list[Gemm]], dict[Gemm, tuple[Tensor, Tensor]]] | None = None  # those that have tensors
    bytes: int = 0  # that must be read or written besides
    prepare: Callable[[], object] | None = None  # before every run, outside the measured time
    judged: Callable[[], object] | None = None  # after the last judgement: frees what judged
    check_graph: Callable[[Graph, Run], None] | None = None  # raises if a replay is not the launched call
    draw: Callable[[], object] | None = None  # before every replay of a graph: fresh noise
    measure_memory: bool = True
    keep: object = None  # lives as long as the work: a temporary folder
    weight_bytes: int | None = None  # of the lm_head, in which memory is counted
    extra: Callable[[str, float], dict] | None = None  # (provider, median ms) → further fields of its result
    goals: Callable[[dict[str, float], dict[str, int]], dict[str, list[str]]] | None = None
    # (median ms, peak bytes of every provider) → what those of ours missed, beside the case's Goal


@dataclass(frozen=True)
class Suite:
    """The cases of an op, and the providers that run them."""

    op: str
    cases: Callable[[torch.device], list[Case]]  # all of them; those marked quick make the five-minute selection
    make: Callable[[Case, torch.device], Work]
    providers: Callable[[torch.device], dict[str, str | None]]  # name → why it cannot run here, or None
    ours: tuple[str, ...] = OURS
    bounds: tuple[str, ...] = ()  # PRODUCTS, LIMIT: what its work is timed beside
    limits: tuple[str, ...] = ()  # providers that do only what cannot be avoided

    def is_ours(self, provider: str) -> bool:
        return provider.removesuffix(GRAPH) in self.ours

    def kind(self, provider: str) -> str:
        if provider in (*self.bounds, *self.limits):
            return "limit"
        return "ours" if self.is_ours(provider) else "peer"

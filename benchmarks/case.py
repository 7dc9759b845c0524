"""What is measured: a suite has cases, a case becomes work on a device, and every provider does that work.

A provider is one of our backends, or what people would use instead (a peer). Each file `bench_<op>.py` holds a `SUITE`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

OURS = ("triton", "cuda", "torch")
PRODUCTS, LIMIT = "products", "limit"  # what bounds a case, timed beside its providers (limit.py)
GRAPH = ", graph"  # ends the name of a provider whose launches a CUDA graph replays
MAIN, WHOLE, MORE, SWEEP = range(4)  # worth: main cases of each op; joint loss and training step; the rest; curves
Run = Callable[[], list[Tensor]]  # does the work once and returns its results, such as the loss and the gradients


class WrongResultError(AssertionError):
    """Something else was computed than what is to be timed."""


@dataclass(frozen=True)
class Gemm:
    """(m, k) @ (k, n); a transposed factor is stored the other way round."""

    m: int
    k: int
    n: int
    transposed: str  # "", "a" or "b"


@dataclass(frozen=True)
class Case:
    """A problem's sizes, and how it is measured."""

    op: str
    label: str  # without op and dtype
    sizes: dict[str, int | float | str | bool | None]  # flat: "model", "tokens", "hidden_size", "vocab", …
    dtype: torch.dtype
    shape: object = None  # what the suite's `make` needs beyond that
    worth: int = MORE  # cases are measured in this order; the quick selection is MAIN and WHOLE
    axes: tuple[str, ...] = ()  # of `sizes`: of the curves that it is a point of
    # provider → wanted at most: "ms"; times "of NAME" or, of the fastest, "of peer"; "lm_heads" and "memory of NAME"
    goals: dict[str, dict[str, float]] = field(default_factory=dict)
    reference: str | None = LIMIT  # the provider whose time the others are compared with
    seconds: float = 2.0  # of timing, for all providers together
    rounds: int = 10  # of each provider at least; fewer where one takes seconds
    on_host: bool = False  # done when it returns: timed by the CPU's clock, on any device
    providers: tuple[str, ...] | None = None  # those of the suite that take part; None: all
    time_limit: float = 600.0  # seconds, after which the case is stopped

    @property
    def fields(self) -> dict:
        """What identifies the case in a result file."""
        return dict(op=self.op, label=self.label, dtype=str(self.dtype).removeprefix("torch."))

    @property
    def name(self) -> str:
        return "{op}: {label}, {dtype}".format(**self.fields)


@dataclass
class Work:
    """A case on its device: what every provider runs, what judges it, and what bounds it."""

    run: Callable[[str], Run]  # provider → its run; called once, the first run may compile
    judge: Callable[[str, Run], dict]  # (provider, its run) → fields of its result; WrongResultError if it is wrong
    gemms: list[Gemm] = field(default_factory=list)  # the matrix products that cannot be avoided
    factors: Callable[[], dict[Gemm, tuple[Tensor, Tensor]]] | None = None  # those that have tensors of their own
    bytes: int = 0  # that must be read or written besides
    prepare: Callable[[], object] = lambda: None  # before every run, outside the measured time
    judged: Callable[[], object] = lambda: None  # after the last judgement: frees what judged
    check_graph: Callable[[object, Run], None] | None = None  # (graph, run): raises if a replay is not the run
    draw: Callable[[], object] = lambda: None  # before every replay of a graph: fresh noise
    extra: Callable[[str, float], dict] | None = None  # (provider, median ms) → further fields of its result
    fields: dict = field(default_factory=dict)  # further fields of every result


@dataclass(frozen=True)
class Suite:
    """Cases of an op, and the providers that do their work."""

    cases: Callable[[torch.device], list[Case]]
    make: Callable[[Case, torch.device], Work]
    providers: Callable[[torch.device], dict[str, str | None]]  # name → why it cannot run here, or None
    ours: tuple[str, ...] = OURS
    bounds: tuple[str, ...] = ()  # PRODUCTS, LIMIT: timed beside the providers
    limits: tuple[str, ...] = ()  # providers that do only what cannot be avoided

    def kind(self, provider: str) -> str:
        if provider in (*self.bounds, *self.limits):
            return "limit"
        return "ours" if provider.removesuffix(GRAPH) in self.ours else "peer"

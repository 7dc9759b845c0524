"""Work of the leaf kernels: bounded by the bytes they must read and write, at the rate of a copy.

A leaf of ours may err 1.5 times as much as the torch leaf does in the same dtype, against float64, in every result. A
peer need only compute the same thing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sfr_kernels.leaves import FlowPath, fastest
from sfr_kernels.ops.dispatch import leaves, unavailable

from ..peers.cross_entropy import COMPILED, EAGER, absent
from .errors import Oracle, peer_verdict, verdict
from .shapes import BF16, FP16, FP32
from .work import LIMIT, OURS, Case, Goal, Run, Suite, Work

OF_COPY = 0.8  # of a copy's bandwidth, wanted of the cuda backend


@dataclass
class Numbers:
    """Where the tensors of a case come from: the same numbers for every dtype, rounded to `rounded` first."""

    n: int
    width: int
    device: torch.device
    rounded: torch.dtype
    dtype: torch.dtype

    def __post_init__(self):
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.wide = torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=self.rounded, device=self.device).normal_(generator=self.generator)
        return drawn.to(self.dtype)

    def integers(self, most: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(most, (self.n,), dtype=dtype, device=self.device, generator=self.generator)

    def path(self) -> FlowPath:
        anchors = max(1, self.n // 32)
        targets = self.normal(anchors, self.width) / self.width**0.5
        anchor, index = (self.integers(k, torch.int32) for k in (anchors, 256))
        times = torch.arange(0.5, 256, device=self.device, dtype=self.wide) / 256
        identity, seed = torch.arange(self.n, device=self.device), torch.ones(1, dtype=torch.int64, device=self.device)
        return FlowPath(targets, times, identity, anchor, index, seed, self.width**0.5, 1.0)


@dataclass
class Leaf:
    """A call of a leaf on tensors of its own, and what people would write in its place on the same tensors."""

    call: Callable[[object], list[Tensor]]  # of the leaves of a backend; its results
    names: tuple[str, ...]  # of the results
    bytes: int  # that must be read or written
    first: object  # the argument that says in which class of size it is
    restore: Callable[[], object] | None = None  # puts back what the call writes over
    peers: dict[str, Callable[[], Run]] = field(default_factory=dict)
    judged: dict[str, Run] = field(default_factory=dict)  # of peers that draw noise of their own: the same with ours


def leaf_work(make: Callable[[Numbers], Leaf], case: Case, device: torch.device) -> Work:
    leaf = make(Numbers(*case.shape, device, case.dtype, case.dtype))
    oracle = []

    def judge(provider: str, run: Run) -> dict:
        if not oracle:
            exact, eager = (
                make(Numbers(*case.shape, device, case.dtype, dtype)).call(leaves("torch"))
                for dtype in (torch.float64, case.dtype)
            )
            oracle.append(Oracle(list(leaf.names), exact, eager))
        if leaf.restore is not None:
            leaf.restore()
        if provider in OURS:
            return verdict(oracle[0].errors(run()))
        return peer_verdict(oracle[0].distance(leaf.judged.get(provider, run)()))

    return Work(
        run=lambda name: partial(leaf.call, leaves(name)) if name in OURS else leaf.peers[name](),
        judge=judge,
        judged=oracle.clear,
        bytes=leaf.bytes,
        prepare=leaf.restore,
        extra=lambda provider, ms: dict(size=fastest.size_of(leaf.first)),
    )


def providers(*libraries: str) -> Callable[[torch.device], dict[str, str | None]]:
    """Those of a leaf: ours, eager torch, torch.compile, and of the libraries those that have one."""

    def reasons(device: torch.device) -> dict[str, str | None]:
        found = {name: unavailable(name, device) for name in OURS} | {EAGER: None}
        return found | {name: absent(name, device) for name in (COMPILED, *libraries)}

    return reasons


def leaf_case(
    op: str, n: int, width: int, goal: Goal, device: torch.device, dtype: torch.dtype = BF16, *, quick: bool = False
) -> Case:
    if device.type != "cuda":
        n, width, goal, dtype = n // 16, width // 8, Goal(), FP32
    sizes = dict(model=None, rows=n, width=width)
    return Case(op, f"{n} rows, width {width}", sizes, dtype, (n, width), goal=goal, seconds=0.5, quick=quick)


def row_cases(*ops: str) -> Callable[[torch.device], list[Case]]:
    """Of leaves that work on the head's rows: many, and so few that a launch is what they cost."""

    def cases(device: torch.device) -> list[Case]:
        goal = Goal(of_limit=1 / OF_COPY, backends=("cuda",))
        found = [leaf_case(op, 8192, 1024, goal, device, quick=True) for op in ops]
        found += [leaf_case(op, 512, 1024, Goal(), device) for op in ops]
        if device.type == "cuda":
            found += [leaf_case(op, 8192, 1024, Goal(), device, dtype) for op in ops for dtype in (FP16, FP32)]
        return found

    return cases


def suite(op: str, cases, make: Callable[[Case, torch.device], Work], *libraries: str) -> Suite:
    return Suite(op, cases, make, providers(*libraries), bounds=(LIMIT,))

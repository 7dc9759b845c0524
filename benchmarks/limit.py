"""The limit of an op: its matrix products through cuBLAS, then a copy of the bytes that must move besides (README.md).

Each product's rows are in 1, 2 or 4 blocks, whichever is fastest (cuBLAS chooses badly for some row counts); all are
timed as one chain, in a CUDA graph, so that no launch is counted.
"""

from functools import partial

import torch
from torch import Tensor

from .case import LIMIT, PRODUCTS, Gemm, Work
from .problem import Problem
from .timing import Candidate, Graph, compare

NEARLY_ALL = 0.95
ROOM = 512 * 2**20  # most bytes of a copy's source, and of its target: far more than any L2
BLOCKS, TRIALS = (1, 2, 4), 5


def gemms_of(problem: Problem) -> list[Gemm]:
    """Forward and backward: of the head without a gradient of x_t, x_t and h side by side as one product may take
    them; of a decoder logits, dh and, if it is trained, dW."""
    s, n, found = problem.shape, problem.num_flow, []

    def layer(inputs: int, outputs: int, grad_of: int) -> list[Gemm]:  # y = x Wᵀ, dW = dyᵀ x, dx = dy W
        return [Gemm(n, inputs, outputs, "b"), Gemm(outputs, n, inputs, "a"), Gemm(n, outputs, grad_of, "")]

    if problem.head is not None:
        found += layer(s.target_size + s.hidden_size, s.width, s.hidden_size)
        found += layer(s.width, s.width, s.width) * (s.num_layers - 2) + layer(s.width, s.target_size, s.width)
    if problem.weight is not None:
        n = problem.num_ce
        found += [Gemm(n, s.hidden_size, s.vocab, "b"), Gemm(n, s.vocab, s.hidden_size, "")]
        found += [Gemm(s.vocab, n, s.hidden_size, "a")] * (not s.frozen)
    return found


def bytes_of(problem: Problem) -> int:
    s, flow = problem.shape, problem.num_flow if problem.head is not None else 0
    tokens = s.batch * s.length
    n = max(flow, problem.num_ce if problem.weight is not None else 0)
    numbers = 0 if n > NEARLY_ALL * tokens else s.hidden_size * (3 * n + tokens)
    numbers += 2 * problem.num_ce * s.vocab if problem.weight is not None else 0
    numbers += flow * (3 * s.target_size + s.width * (5 + 6 * (s.num_layers - 2)))
    return problem.dtype.itemsize * numbers


class Copy:
    """Moves so many bytes: half of them read, half written."""

    def __init__(self, size: int, device: torch.device):
        half = size // 2
        self.bytes = 2 * half
        self.times, self.rest = divmod(half, ROOM)
        self.source = torch.randint(256, (min(half, ROOM),), dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        for _ in range(self.times):
            self.target.copy_(self.source)
        if self.rest:
            self.target[: self.rest].copy_(self.source[: self.rest])


class Products:
    """The products on the given factors, else on random numbers: zeros would run cool, and fast."""

    def __init__(self, gemms: list[Gemm], dtype: torch.dtype, device: torch.device, given: dict | None = None):
        self.chain, self.factors, self.blocks = gemms, {}, {}
        for gemm in set(gemms):
            a, b = (given or {}).get(gemm) or random_factors(gemm, dtype, device)
            out = torch.empty(gemm.m, gemm.n, dtype=dtype, device=device)
            ways = {str(n): Candidate(partial(multiply, a, b, out, n)) for n in BLOCKS if n <= gemm.m}
            times = compare(ways, device, seconds=0.05, rounds=TRIALS)
            self.factors[gemm] = a, b, out
            self.blocks[gemm] = int(min(times, key=lambda name, t=times: t[name].ms))
        self.run = Graph(self._chain).replay if device.type == "cuda" else self._chain

    def _chain(self) -> list[Tensor]:
        for gemm in self.chain:
            multiply(*self.factors[gemm], self.blocks[gemm])
        return []


def random_factors(gemm: Gemm, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:  # as the op has them
    found = []
    for name, rows, columns in (("a", gemm.m, gemm.k), ("b", gemm.k, gemm.n)):
        shape = (columns, rows) if gemm.transposed == name else (rows, columns)
        t = torch.empty(shape, dtype=dtype, device=device).normal_()
        found.append(t.T if gemm.transposed == name else t)
    return tuple(found)


def multiply(a: Tensor, b: Tensor, out: Tensor, blocks: int) -> None:
    """out = a b, in so many blocks of rows."""
    for rows, result in zip(a.chunk(blocks), out.chunk(blocks), strict=True):
        torch.mm(rows, b, out=result)


def bounds(work: Work, dtype: torch.dtype, device: torch.device) -> dict[str, Candidate]:
    """What to time beside the providers of a case: its products alone, if it has any, and its limit."""
    copy = Copy(work.bytes, device)
    if not work.gemms:
        return {LIMIT: Candidate(copy)}
    products = Products(work.gemms, dtype, device, work.factors() if work.factors else None)
    return {PRODUCTS: Candidate(products.run), LIMIT: Candidate(lambda: (products.run(), copy()))}

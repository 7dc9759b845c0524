"""The GEMM floor of an op: the time of its matrix products alone, on its supervised rows alone.

Each product is cuBLAS through `torch.mm`, its output rows in 1, 2 or 4 blocks, whichever is fastest (cuBLAS chooses
badly for some row counts); all of them are then timed as one chain, in a CUDA graph, so that no launch is counted.
Products of the time embedding have M rows, not n, and are left out.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .timing import Candidate, Graph, compare

BLOCKS = (1, 2, 4)
TRIALS = 5  # of each


@dataclass(frozen=True)
class Gemm:
    """(m, k) @ (k, n); a transposed factor is stored the other way round."""

    m: int
    k: int
    n: int
    transposed: str  # "", "a" or "b"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    @property
    def numbers(self) -> int:
        """In its factors and its product."""
        return self.m * self.k + self.k * self.n + self.m * self.n


def flow_gemms(n: int, hidden_size: int, target_size: int, width: int, num_layers: int) -> list[Gemm]:
    """Forward, then backward, of the velocity head on n rows: no gradient of x_t."""

    def layer(inputs: int, outputs: int, *, input_grad: bool = True) -> list[Gemm]:
        products = [Gemm(n, inputs, outputs, "b"), Gemm(outputs, n, inputs, "a")]  # y = x Wᵀ, dW = dyᵀ x
        return products + [Gemm(n, outputs, inputs, "")] * input_grad  # dx = dy W

    blocks = [g for _ in range(num_layers - 2) for g in layer(width, width)]
    # x_t and h side by side, as one product may take them
    inputs = [*layer(target_size + hidden_size, width, input_grad=False), Gemm(n, width, hidden_size, "")]
    return inputs + blocks + layer(width, target_size)


def cross_entropy_gemms(n: int, hidden_size: int, vocab: int, trained: bool) -> list[Gemm]:
    """Logits, dh and, for a trained decoder, dW."""
    products = [Gemm(n, hidden_size, vocab, "b"), Gemm(n, vocab, hidden_size, "")]
    return products + [Gemm(vocab, n, hidden_size, "a")] * trained


class Floor:
    """The products, each in its best number of blocks: on the given factors, else on random numbers (zeros would run
    cool, and fast)."""

    def __init__(
        self,
        gemms: list[Gemm],
        dtype: torch.dtype,
        device: torch.device,
        factors: dict[Gemm, tuple[Tensor, Tensor]] | None = None,  # (m, k) and (k, n), stored as the op stores them
    ):
        self.flops, self.blocks = sum(g.flops for g in gemms), {}
        self.factors = {}
        for gemm in set(gemms):
            a, b = (factors or {}).get(gemm) or factors_of(gemm, dtype, device)
            self.factors[gemm] = a, b, torch.empty(gemm.m, gemm.n, dtype=dtype, device=device)
        for gemm, (a, b, out) in self.factors.items():
            ways = {str(n): Candidate(partial(multiply, a, b, out, n)) for n in BLOCKS if n <= gemm.m}
            times = compare(ways, device, seconds=0.05, least_runs=TRIALS)
            self.blocks[gemm] = int(min(times, key=lambda name, t=times: t[name].ms))
        self.chain = gemms
        self.graph = Graph(self._chain) if device.type == "cuda" else None

    def _chain(self) -> list[Tensor]:
        for gemm in self.chain:
            multiply(*self.factors[gemm], self.blocks[gemm])
        return []

    def run(self) -> None:
        self.graph.replay() if self.graph else self._chain()


def factors_of(gemm: Gemm, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both factors, random and stored as the op stores them."""

    def normal(rows, columns, transposed):
        shape = (columns, rows) if transposed else (rows, columns)
        t = torch.empty(shape, dtype=dtype, device=device).normal_()
        return t.T if transposed else t

    return normal(gemm.m, gemm.k, gemm.transposed == "a"), normal(gemm.k, gemm.n, gemm.transposed == "b")


def multiply(a: Tensor, b: Tensor, out: Tensor, blocks: int) -> None:
    """out = a b, in so many blocks of rows."""
    for rows, result in zip(a.chunk(blocks), out.chunk(blocks), strict=True):
        torch.mm(rows, b, out=result)

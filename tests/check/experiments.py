"""What the package might do instead, each against what it does, with Triton on a GPU: one read of the logits instead of
two; the head's output layer and the matching loss in one kernel instead of two."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.case import LIMIT, PRODUCTS, Case, Gemm, Run, Suite, Work
from benchmarks.oracle import Oracle
from sfr_kernels.kernels.backend import unavailable
from sfr_kernels.kernels.flow import flow_mse
from sfr_kernels.kernels.softmax_xent import softmax_xent

ONE_READ, FUSED = "one_read", "fused_output"
TWICE, APART = "softmax_xent", "cuBLAS + flow_mse"  # what the package does
WARPS = {f"one read, {warps} warps": warps for warps in (16, 32)}
TILES = {"{}x{}x{}, {} warps, {} stages".format(*tile): tile for tile in (
    (128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (64, 64, 64, 4, 4), (64, 128, 64, 8, 3)
)}  # fmt: skip
LOOSE = 4.0  # times of eager's error: one that loses no digit is good enough to be timed


def cases(device: torch.device) -> list[Case]:
    common, found = dict(dtype=torch.bfloat16, seconds=1.0), []
    if device.type != "cuda":
        return found
    for op, label, sizes in (
        (ONE_READ, "n {rows}, V {vocab}", dict(rows=4096, vocab=32000)),
        (FUSED, "n {rows}, d {width}, D {width}", dict(rows=6144, width=1024)),
    ):
        names = (TWICE, *WARPS) if op == ONE_READ else (APART, *TILES)
        found.append(Case(op, label.format(**sizes), sizes, shape=tuple(sizes.values()), providers=names, **common))
    return found


def providers(device: torch.device) -> dict[str, str | None]:
    return dict.fromkeys((TWICE, *WARPS, APART, *TILES), unavailable("triton", device))


def make(case: Case, device: torch.device) -> Work:
    return (one_read if case.op == ONE_READ else fused_output)(*case.shape, case.dtype, device)


def one_read(n: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Work:
    from .one_read import one_read as experiment

    g = torch.Generator(device).manual_seed(0)
    source = torch.empty(n, vocab, dtype=dtype, device=device).normal_(generator=g)
    labels, logits = torch.randint(vocab, (n,), device=device, generator=g), source.clone()

    def call(name: str, z: Tensor) -> list[Tensor]:
        return [experiment(z, labels, WARPS[name]) if name in WARPS else softmax_xent("triton", z, labels)[0], z]

    def torch_call(z: Tensor) -> list[Tensor]:
        return [softmax_xent("torch", z, labels)[0], z]

    oracle = Oracle(["loss", "dlogits"], torch_call(source.double()), torch_call(source.clone()))

    def judge(name: str, run: Run) -> dict:
        logits.copy_(source)
        return oracle.verdict(run(), LOOSE)

    return Work(lambda name: partial(call, name, logits), judge, bytes=2 * logits.nbytes,
                prepare=lambda: logits.copy_(source))  # fmt: skip


def fused_output(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Work:
    from .fused_output import fused_output as experiment

    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=g)

    a, w, b, u, v = normal(n, width), normal(width, width) / 32, normal(width), normal(n, width), normal(n, width)
    coefficient = torch.ones(n, dtype=torch.float32, device=device)

    def apart(a: Tensor, w: Tensor, b: Tensor, u: Tensor, v: Tensor, backend: str) -> list[Tensor]:
        wide = torch.promote_types(a.dtype, torch.float32)
        loss, db = flow_mse(backend, torch.addmm(b, a, w.T, out=v), u, coefficient.to(wide))
        return [loss, v, db]

    def run_of(name: str) -> Run:
        if name in TILES:
            return lambda: [*experiment(a, w, b, u, coefficient, TILES[name])]
        return partial(apart, a, w, b, u, v, "triton")

    exact = [t.double() for t in (a, w, b, u, v)]
    oracle = Oracle(["loss", "dv", "db"], apart(*exact, "torch"), apart(a, w, b, u, torch.empty_like(v), "torch"))
    return Work(
        run=run_of, judge=lambda name, run: oracle.verdict(run(), LOOSE), gemms=[Gemm(n, width, width, "b")],
        bytes=2 * u.nbytes,
    )  # fmt: skip


SUITE = Suite(cases, make, providers, ours=(TWICE, APART), bounds=(PRODUCTS, LIMIT))

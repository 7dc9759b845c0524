"""What the package might do instead, each against what it does, with Triton on a GPU: one read of the logits instead of
two; no preference for them in L2; noise whose bits are the chip's own; the head's output layer and the matching loss in
one kernel instead of two."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import bench_kernels
from benchmarks.case import LIMIT, PRODUCTS, Case, Gemm, Run, Suite, Work
from benchmarks.oracle import Oracle
from sfr_kernels.kernels.backend import kernels_of, unavailable
from sfr_kernels.kernels.flow import flow_mse

TRITON, APART = "triton", "cuBLAS + flow_mse"  # what the package does
WARPS = {f"one read, {warps} warps": warps for warps in (16, 32)}
POLICIES = {"no policy": "", "evict_first": "evict_first"}
NOISE = {"contracted": False, "hardware functions": True}
TILES = {"{}x{}x{}, {} warps, {} stages".format(*tile): tile for tile in (
    (128, 64, 64, 8, 3), (128, 64, 64, 8, 4), (64, 64, 64, 4, 4), (64, 128, 64, 8, 3)
)}  # fmt: skip
FUSED = "fused_output"
# of the other experiments, the kernel that each would replace
OPS = dict(one_read=bench_kernels.SOFTMAX, eviction=bench_kernels.SOFTMAX, hardware_noise=bench_kernels.PATH)
LOOSE = 4.0  # times of eager's error: one that loses no digit is good enough to be timed


def cases(device: torch.device) -> list[Case]:
    if device.type != "cuda":
        return []
    found = []
    for op, sizes, names in (
        ("one_read", dict(rows=4096, vocab=32000), (TRITON, *WARPS)),
        ("eviction", dict(rows=4096, vocab=128256), (TRITON, *POLICIES)),
        ("hardware_noise", dict(rows=8192, width=1024), (TRITON, *NOISE)),
        (FUSED, dict(rows=6144, width=1024), (APART, *TILES)),
    ):
        label = ", ".join(f"{name} {size}" for name, size in sizes.items())
        options = dict(shape=tuple(sizes.values()), providers=names, reference=names[0], seconds=1.0)
        found.append(Case(op, label, sizes, torch.bfloat16, **options))
    return found


def providers(device: torch.device) -> dict[str, str | None]:
    return dict.fromkeys((TRITON, APART, *WARPS, *POLICIES, *NOISE, *TILES), unavailable("triton", device))


def make(case: Case, device: torch.device) -> Work:
    if case.op == FUSED:
        return fused_output(*case.shape, case.dtype, device)
    return bench_kernels.make(replace(case, op=OPS[case.op]), device, kernels, LOOSE)


def kernels(name: str) -> SimpleNamespace:
    """The package's, with one in the place of another."""
    from sfr_kernels.kernels.softmax_xent import triton as twice

    from .hardware_noise import path_without_equal_bits
    from .one_read import one_read

    found = kernels_of("triton")
    if name in WARPS:
        found.softmax_xent = lambda logits, labels: (one_read(logits, labels, WARPS[name]), None)
    elif name in POLICIES:

        def with_policy(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
            with patch.object(twice, "KEPT", POLICIES[name]):
                return twice.softmax_xent(logits, labels)

        found.softmax_xent = with_policy
    elif name in NOISE:
        found.flow_path = partial(path_without_equal_bits, hardware=NOISE[name])
    return found


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


SUITE = Suite(cases, make, providers, ours=(TRITON, APART), bounds=(PRODUCTS, LIMIT))

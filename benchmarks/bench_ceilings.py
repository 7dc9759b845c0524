"""What this device can do at best: copying a large tensor, and multiplying large matrices through torch.mm.

Measured in every run, beside everything else; the roofs of the report's roofline.
"""

import torch

from .harness.errors import peer_verdict
from .harness.floor import Gemm, factors_of, multiply
from .harness.limit import Copy
from .harness.shapes import BF16, CPU_SECONDS, FP16, FP32
from .harness.work import Case, Run, Suite, Work, WrongResultError

COPY, MATMUL = "copy", "matmul"
BYTES = 2 * 2**30  # half of them read, half written
SIZE = 8192  # of the square matrices


def cases(device: torch.device) -> list[Case]:
    on_gpu = device.type == "cuda"
    seconds = 1.0 if on_gpu else CPU_SECONDS
    found = [Case("ceilings", "copy", {}, torch.uint8, seconds=seconds, providers=(COPY,), quick=True)]
    for dtype in (BF16, FP16, FP32) if on_gpu else (FP32,):
        size = SIZE if on_gpu else SIZE // 8
        options = dict(shape=size, seconds=seconds, providers=(MATMUL,), quick=dtype in (BF16, FP32))
        found.append(Case("ceilings", f"{size} x {size} matrices", dict(size=size), dtype, **options))
    return found


def make(case: Case, device: torch.device) -> Work:
    if case.shape is None:
        return _copy(Copy(BYTES if device.type == "cuda" else BYTES // 16, device))
    gemm = Gemm(case.shape, case.shape, case.shape, "b")
    a, b = factors_of(gemm, case.dtype, device)
    out = torch.empty(gemm.m, gemm.n, dtype=case.dtype, device=device)

    def run() -> list[torch.Tensor]:
        multiply(a, b, out, 1)
        return []

    def judge(provider: str, run: Run) -> dict:
        run()
        exact = a[:64].double() @ b.double()
        return peer_verdict(((out[:64].double() - exact).norm() / exact.norm()).item())

    return Work(lambda provider: run, judge, gemms=[gemm])


def _copy(copy: Copy) -> Work:
    def run() -> list[torch.Tensor]:
        copy()
        return []

    def judge(provider: str, run: Run) -> dict:
        run()
        if not torch.equal(copy.source, copy.target):
            raise WrongResultError("the copy differs from its source")
        return {}

    return Work(lambda provider: run, judge, bytes=copy.bytes)


SUITE = Suite("ceilings", cases, make, lambda device: {COPY: None, MATMUL: None}, ours=())


def test_ceilings(race):
    race()

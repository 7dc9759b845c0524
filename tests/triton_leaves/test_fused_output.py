"""The experimental output layer with the matching loss in its epilogue, against the leaves that it would replace."""

import pytest
import torch
from device import DEVICE, DTYPES, assert_as_good, only_triton

only_triton()

from benchmarks.experiments.fused_output import fused_output  # noqa: E402
from sfr_kernels.leaves import torch as eager  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, width, d", [(1, 16, 4), (37, 70, 50)])  # less than a tile; several, all ragged
def test_fused_output(n, width, d, dtype):
    g = torch.Generator().manual_seed(1)
    shapes = (n, width), (d, width), (d,), (n, d)
    a, w, b, u = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    coefficient = torch.randn(n, generator=g)

    def in_torch(wide):
        v = torch.addmm(b.to(wide), a.to(wide), w.to(wide).T)
        loss, db = eager.flow_mse(v, u, coefficient)
        return loss, v, db

    found = fused_output(*(t.to(DEVICE) for t in (a, w, b, u)), coefficient.to(DEVICE), (16, 32, 16, 1, 1))
    for mine, theirs, exact in zip(found, in_torch(dtype), in_torch(torch.float64), strict=True):
        assert_as_good(mine, theirs, exact)

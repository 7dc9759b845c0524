"""scale and scatter_rows, bit for bit those of the torch kernels, and split to its sixteen bits more."""

from importlib import import_module

import pytest
import torch
from device import BACKEND, DEVICE, DTYPES, eager, kernels

FACTOR = torch.tensor(1.7)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def both(name: str, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel and the torch kernel give for the same arguments."""
    on_device = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    return getattr(kernels, name)(*on_device).cpu(), getattr(eager, name)(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_scale_and_scatter(dtype, out):
    x = normal(5, 2100).to(dtype)  # two blocks of columns
    token_row = torch.tensor([3, -1, 4, 0, 5, 1, 2, 77], dtype=torch.int32)  # −1, 5 and 77 are no rows
    before = x.clone()
    for found, wanted in (both("scale", x, FACTOR, out), both("scatter_rows", x, FACTOR, token_row, out)):
        assert found.dtype == out and torch.equal(found, wanted)
    assert torch.equal(x, before)
    shifted = x.to(DEVICE).flatten()[1:]  # not aligned to what a vector takes
    found = kernels.scale(shifted, FACTOR.to(DEVICE), out)
    assert torch.equal(found.cpu(), eager.scale(x.flatten()[1:], FACTOR, out))
    empty, _ = both("scatter_rows", x[:0], FACTOR, token_row, out)
    assert torch.equal(empty, torch.zeros(8, 2100, dtype=out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(5, 2100), (1, 1), (0, 7)])  # three blocks, with a ragged end
def test_scale_in_place(rows, width, dtype):
    x = normal(rows, width).to(dtype)
    for factor in (FACTOR, torch.tensor(1.0)):
        mine, theirs = x.to(DEVICE, copy=True), x.clone()
        assert kernels.scale_(mine, factor.to(DEVICE)) is mine and eager.scale_(theirs, factor) is theirs
        assert torch.equal(mine.cpu(), theirs) and torch.equal(theirs, eager.scale(x, factor, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_blocks_than_programs(dtype, monkeypatch):
    """As an lm_head's gradient has: each program takes several, in strides."""
    monkeypatch.setattr(import_module(f"sfr_kernels.kernels.scale.{BACKEND}"), "MAX_PROGRAMS", 2)
    x = normal(9, 2100).to(dtype)
    found = kernels.scale_(x.to(DEVICE, copy=True), FACTOR.to(DEVICE))
    assert torch.equal(found.cpu(), eager.scale(x, FACTOR, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts, gated", [(1, False), (2, False), (2, True), (1, True)])
def test_split(parts, gated, dtype):
    x, z = normal(parts * 7, 333), normal(7, 333).flip(0).to(dtype) if gated else None
    found, theirs = both("split", x, 7, dtype, z)
    exact = eager.split(x.double(), 7, torch.float64, None if z is None else z.double())
    assert found.dtype == dtype and len(found) == (7 if dtype == torch.float32 else 14)
    whole = found.double().view(-1, 7, 333).sum(0)
    # what is left out of two parts: half a unit in the last place of the second, or the least number of float16
    assert ((whole - exact).abs() <= 2.0**-16 * exact.abs() + 2.0**-24).all()
    assert torch.equal(found[:7], theirs[:7]) or gated

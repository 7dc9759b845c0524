"""norm_act and its backward, against the torch kernels in float64."""

import pytest
import torch
from device import DEVICE, DTYPES, assert_as_good, eager, every_other, few_row_blocks, kernels

# one number; below and above the smallest block; not a power of two; several rows a program; more than one block of
# columns, forward and backward
SHAPES = [(1, 1), (5, 10), (3, 100), (9, 16), (4, 5000)]


@pytest.fixture(autouse=True)
def several_row_blocks(monkeypatch):
    few_row_blocks(monkeypatch)


def make(n, width, dtype, rows_of_bias=4):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    # a mean of its own, that the statistics have to take away
    values = dict(y=normal(n, width) + 3, dout=normal(n, width), residual=normal(n, width))
    values = {k: v.to(dtype) for k, v in values.items()}
    values |= dict(gamma=1 + 0.3 * normal(width), beta=0.3 * normal(width), row_bias=normal(rows_of_bias, width))
    values["row_index"] = torch.randint(rows_of_bias, (n,), generator=g, dtype=torch.int32)
    return values


def moved(x: dict, device, dtype=None) -> dict:
    return {k: v.to(device, dtype if v.is_floating_point() and dtype else v.dtype, copy=True) for k, v in x.items()}


def forward(module, x: dict, bias: bool, residual: bool):
    options = dict(row_bias=x["row_bias"], row_index=x["row_index"]) if bias else {}
    options |= dict(residual=x["residual"]) if residual else {}
    found = module.norm_act(x["y"], x["gamma"], x["beta"], **options)
    return dict(zip(("out", "mean", "rstd", "y"), (*found, x["y"]), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias, residual", [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize("n, width", SHAPES)
def test_norm_act(n, width, bias, residual, dtype):
    x = make(n, width, dtype)
    exact, theirs = (forward(eager, moved(x, "cpu", kind), bias, residual) for kind in (torch.float64, None))
    found = forward(kernels, moved(x, DEVICE), bias, residual)
    assert found["out"].dtype == dtype and found["mean"].dtype == torch.float32
    # an operator that gives back both may not give two views of one
    assert found["mean"].untyped_storage().data_ptr() != found["rstd"].untyped_storage().data_ptr()
    if not bias:
        assert torch.equal(found["y"].cpu(), x["y"])
    for name in exact:
        assert_as_good(found[name], theirs[name], exact[name])


def backward(module, x: dict, index: bool, **options):
    y = x["y"].contiguous().to(torch.promote_types(x["y"].dtype, torch.float32))
    mean = y.mean(1)
    rstd = (y.var(1, unbiased=False) + 1e-5).rsqrt()
    if index:
        options |= dict(row_index=x["row_index"], num_bias=len(x["row_bias"]))
    found = module.norm_act_backward(x["dout"], x["y"], x["gamma"], x["beta"], mean, rstd, **options)
    return dict(zip(("dy", "dgamma", "dbeta", "dbias"), found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("n, width", SHAPES[1:])
def test_norm_act_backward(n, width, index, dtype):
    x = make(n, width, dtype)
    exact, theirs = (backward(eager, moved(x, "cpu", kind), index) for kind in (torch.float64, None))
    mine = moved(x, DEVICE)
    found = backward(kernels, mine, index)
    assert torch.equal(mine["y"].cpu(), x["y"]) and torch.equal(mine["dout"].cpu(), x["dout"])
    for name in exact:
        assert found[name].shape == exact[name].shape
        if name == "dbias" and index and dtype != torch.float32:
            # the table adds up dy as it was stored; the torch kernel, before it is rounded
            floor = n**0.5 * torch.finfo(dtype).eps * exact["dy"].abs().max()
            assert (found[name].cpu().double() - exact[name]).abs().max() <= floor
        else:
            assert_as_good(found[name], theirs[name], exact[name])


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("place", ["y", "dout"])
def test_dy_may_be_written_over_what_it_is_made_from(place):
    """And the sums over rows are in a fixed order: another call gives the same bits."""
    x = make(9, 100, torch.float32)
    apart, mine = backward(kernels, moved(x, DEVICE), True), moved(x, DEVICE)
    within = backward(kernels, mine, True, dy=mine[place])
    assert within["dy"] is mine[place] and same(apart, within)


def test_strided_rows_and_columns():
    """Every other column, and rows that are no whole number of 16-byte accesses but begin on 16 bytes."""
    x = make(5, 101, torch.float32)
    apart, outs = backward(kernels, moved(x, DEVICE), True), forward(kernels, moved(x, DEVICE), True, True)
    for columns in (slice(1, 203, 2), slice(0, 101)):
        mine = moved(x, DEVICE)
        for name in ("y", "dout", "residual"):
            wide = torch.zeros(5, 204, device=DEVICE)
            wide[:, columns] = mine[name]
            mine[name] = wide[:, columns]
        mine["row_index"] = every_other(mine["row_index"])
        assert same(apart, backward(kernels, mine, True)) and same(outs, forward(kernels, mine, True, True))


def test_no_rows():
    x = make(0, 10, torch.float32)
    assert forward(kernels, moved(x, DEVICE), True, True)["out"].shape == (0, 10)
    for index in (False, True):
        dy, *sums = backward(kernels, moved(x, DEVICE), index).values()
        assert dy.shape == (0, 10) and not any(g.any() for g in sums)

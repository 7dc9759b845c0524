"""norm_act, its backward and the sums over rows in Triton, against the torch leaves in float64."""

import pytest
import torch
from device import BACKEND, DEVICE, DTYPES, assert_as_good, index_sum, kernels, scales, sums

from sfr_kernels.kernels.backend import kernels_of

eager = kernels_of("torch")

# one number; below and above the smallest block; not a power of two; several rows a program; more than one block of
# columns, forward and backward
SHAPES = [(1, 1), (5, 10), (3, 100), (9, 16), (4, 5000)]


@pytest.fixture(autouse=True)
def few_row_blocks(monkeypatch):
    """Nine rows are three programs of three, as thousands would be."""
    monkeypatch.setattr(sums, "MAX_PARTS", 4)


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
    out, mean, rstd = module.norm_act(
        x["y"], x["gamma"], x["beta"], residual=x["residual"] if residual else None, **options
    )
    return {"out": out, "mean": mean, "rstd": rstd, "y": x["y"]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias, residual", [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize("n, width", SHAPES)
def test_norm_act(n, width, bias, residual, dtype):
    x = make(n, width, dtype)
    exact = forward(eager, moved(x, "cpu", torch.float64), bias, residual)
    theirs = forward(eager, moved(x, "cpu"), bias, residual)
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
    exact = backward(eager, moved(x, "cpu", torch.float64), index)
    theirs = backward(eager, moved(x, "cpu"), index)
    mine = moved(x, DEVICE)
    found = backward(kernels, mine, index)
    assert torch.equal(mine["y"].cpu(), x["y"]) and torch.equal(mine["dout"].cpu(), x["dout"])
    for name in exact:
        assert found[name].shape == exact[name].shape
        if name == "dbias" and index and dtype != torch.float32:
            # the table adds up dy as it was stored; the torch leaf, before it is rounded
            floor = n**0.5 * torch.finfo(dtype).eps * exact["dy"].abs().max()
            assert (found[name].cpu().double() - exact[name]).abs().max() <= floor
        else:
            assert_as_good(found[name], theirs[name], exact[name])


@pytest.mark.parametrize("place", ["y", "dout"])
def test_dy_may_be_written_over_what_it_is_made_from(place):
    x = make(5, 100, torch.float32)
    apart = backward(kernels, moved(x, DEVICE), True)
    mine = moved(x, DEVICE)
    within = backward(kernels, mine, True, dy=mine[place])
    assert within["dy"] is mine[place]
    assert all(torch.equal(apart[name], within[name]) for name in apart)


def test_strided_rows_and_columns():
    """Every other column, and rows that are no whole number of 16-byte accesses but begin on 16 bytes."""
    x = make(5, 101, torch.float32)
    apart = backward(kernels, moved(x, DEVICE), True)
    outs = forward(kernels, moved(x, DEVICE), True, True)
    for columns in (slice(1, 203, 2), slice(0, 101)):
        mine = moved(x, DEVICE)
        for name in ("y", "dout", "residual"):
            wide = torch.zeros(5, 204, device=DEVICE)
            wide[:, columns] = mine[name]
            mine[name] = wide[:, columns]
        mine["row_index"] = torch.stack([mine["row_index"], mine["row_index"] * 0], dim=1)[:, 0]
        found = backward(kernels, mine, True)
        assert all(torch.equal(apart[name], found[name]) for name in apart)
        found = forward(kernels, mine, True, True)
        assert all(torch.equal(outs[name], found[name]) for name in outs)


def test_no_rows():
    x = make(0, 10, torch.float32)
    assert forward(kernels, moved(x, DEVICE), True, True)["out"].shape == (0, 10)
    for index in (False, True):
        found = backward(kernels, moved(x, DEVICE), index)
        assert found["dy"].shape == (0, 10)
        assert all(torch.equal(g.cpu(), torch.zeros(g.shape)) for name, g in found.items() if name != "dy")


def test_sums_over_rows_are_in_a_fixed_order():
    x = make(9, 16, torch.float32)
    first, second = (backward(kernels, moved(x, DEVICE), True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("parts, width", [(0, 5), (1, 5), (128, 33), (513, 70)])  # none, one, whole blocks, ragged ones
def test_column_sum(parts, width):
    partial = torch.randn(2, parts, width, generator=torch.Generator().manual_seed(0))
    found = sums.column_sum(partial.to(DEVICE))
    assert_as_good(found, partial.sum(1), partial.double().sum(1))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 6145])
def test_row_blocks_cover_every_row_once(n):
    parts, rows = sums.parts_for(n)
    assert parts <= 4 and (parts - 1) * rows < n <= parts * rows


# no row; an index nobody has; one for all; row blocks with a ragged end; more of them than are worth a product
@pytest.mark.parametrize("n, size, width", [(0, 3, 5), (4, 9, 5), (20, 1, 130), (300, 70, 7), (50, 1025, 5)])
def test_sum_by_index(n, size, width):
    g = torch.Generator().manual_seed(0)
    x, index = torch.randn(n, width, generator=g), torch.randint(size, (n,), generator=g, dtype=torch.int32)
    exact = torch.zeros(size, width, dtype=torch.float64).index_add_(0, index, x.double())
    theirs = torch.zeros(size, width).index_add_(0, index, x)
    assert_as_good(index_sum.sum_by_index(x.to(DEVICE), index.to(DEVICE), size), theirs, exact)


@pytest.mark.skipif(BACKEND != "cuda", reason="the cuda backend alone sorts by itself")
def test_an_index_of_many_values(monkeypatch):
    """More than a block of threads, in several blocks of rows; and what torch has to sort."""
    g = torch.Generator().manual_seed(0)
    x, index = torch.randn(700, 5, generator=g), torch.randint(600, (700,), generator=g, dtype=torch.int32)
    x, index = x.to(DEVICE), index.to(DEVICE)
    found = sums.sum_by_index(x, index, 600)
    monkeypatch.setattr(sums, "MOST_GROUPS", 599)
    assert torch.equal(sums.sum_by_index(x, index, 600), found)
    exact = torch.zeros(600, 5, dtype=torch.float64).index_add_(0, index.cpu(), x.double().cpu())
    torch.testing.assert_close(found.double().cpu(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_scale_and_scatter(dtype, out):
    x = torch.randn(5, 2100, generator=torch.Generator().manual_seed(0)).to(dtype)  # two blocks of columns
    token_row = torch.tensor([3, -1, 4, 0, 5, 1, 2, 77], dtype=torch.int32)  # −1, 5 and 77 are no rows
    factor, before = torch.tensor(1.7), x.clone()
    for found, wanted in (
        (kernels.scale(x.to(DEVICE), factor.to(DEVICE), out), eager.scale(x, factor, out)),
        (
            kernels.scatter_rows(x.to(DEVICE), factor.to(DEVICE), token_row.to(DEVICE), out),
            eager.scatter_rows(x, factor, token_row, out),
        ),
    ):
        assert found.dtype == out and torch.equal(found.cpu(), wanted)
    assert torch.equal(x, before)
    shifted = x.to(DEVICE).flatten()[1:]  # not aligned to what a vector takes
    assert torch.equal(kernels.scale(shifted, factor.to(DEVICE), out).cpu(), eager.scale(x.flatten()[1:], factor, out))
    empty = kernels.scatter_rows(x[:0].to(DEVICE), factor.to(DEVICE), token_row.to(DEVICE), out)
    assert torch.equal(empty.cpu(), torch.zeros(8, 2100, dtype=out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, width", [(5, 2100), (1, 1), (0, 7)])  # three blocks, with a ragged end
def test_scale_in_place(rows, width, dtype):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    for factor in (torch.tensor(1.7), torch.tensor(1.0)):
        mine, theirs = x.to(DEVICE, copy=True), x.clone()
        assert kernels.scale_(mine, factor.to(DEVICE)) is mine and eager.scale_(theirs, factor) is theirs
        assert torch.equal(mine.cpu(), theirs) and torch.equal(theirs, eager.scale(x, factor, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_blocks_than_programs(dtype, monkeypatch):
    """As a lm_head's gradient has: each program takes several, in strides."""
    monkeypatch.setattr(scales, "MAX_PROGRAMS", 2)
    x = torch.randn(9, 2100, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = kernels.scale_(x.to(DEVICE, copy=True), torch.tensor(1.7).to(DEVICE))
    assert torch.equal(found.cpu(), eager.scale(x, torch.tensor(1.7), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts, gated", [(1, False), (2, False), (2, True), (1, True)])
def test_split(parts, gated, dtype):
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(parts * 7, 333, generator=g), torch.randn(7, 333, generator=g).to(dtype) if gated else None
    found = kernels.split(x.to(DEVICE), 7, dtype, None if z is None else z.to(DEVICE))
    exact = eager.split(x.double(), 7, torch.float64, None if z is None else z.double())
    assert found.dtype == dtype and len(found) == (7 if dtype == torch.float32 else 14)
    whole = found.cpu().double().view(-1, 7, 333).sum(0)
    # what is left out of two parts: half a unit in the last place of the second, or the least number of float16
    assert ((whole - exact).abs() <= 2.0**-16 * exact.abs() + 2.0**-24).all()
    assert torch.equal(found[:7].cpu(), eager.split(x, 7, dtype, z)[:7]) or gated

"""The sums over rows, against torch's in float64."""

import pytest
import torch
from device import BACKEND, DEVICE, assert_as_good, few_row_blocks, sums


@pytest.mark.parametrize(
    "num_blocks, width", [(0, 5), (1, 5), (128, 33), (513, 70)]
)  # none, one, whole blocks, ragged ones
def test_column_sum(num_blocks, width):
    partial = torch.randn(2, num_blocks, width, generator=torch.Generator().manual_seed(0))
    found = sums.column_sum(partial.to(DEVICE))
    assert_as_good(found, partial.sum(1), partial.double().sum(1))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 6145])
def test_row_blocks_cover_every_row_once(n, monkeypatch):
    few_row_blocks(monkeypatch)
    num_blocks, rows = sums.blocks_for(n)
    assert num_blocks <= 4 and (num_blocks - 1) * rows < n <= num_blocks * rows


# no row; an index nobody has; one for all; row blocks with a ragged end; more of them than are worth a product
@pytest.mark.parametrize("n, size, width", [(0, 3, 5), (4, 9, 5), (20, 1, 130), (300, 70, 7), (50, 1025, 5)])
def test_sum_by_index(n, size, width):
    g = torch.Generator().manual_seed(0)
    x, index = torch.randn(n, width, generator=g), torch.randint(size, (n,), generator=g, dtype=torch.int32)
    exact = torch.zeros(size, width, dtype=torch.float64).index_add_(0, index, x.double())
    theirs = torch.zeros(size, width).index_add_(0, index, x)
    assert_as_good(sums.sum_by_index(x.to(DEVICE), index.to(DEVICE), size), theirs, exact)


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

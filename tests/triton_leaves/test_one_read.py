"""The experimental softmax_xent with one read, against the leaf that it would replace."""

import pytest
import torch
from device import DEVICE, DTYPES, assert_as_good, only_triton
from test_softmax_xent import make

only_triton()

from benchmarks.experiments.one_read import WIDEST, one_read  # noqa: E402
from sfr_kernels.leaves import torch as eager  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 331, 512])
def test_one_read(vocab, dtype):
    logits, labels, _ = make(5, vocab, dtype)
    exact, theirs, mine = logits.double(), logits.clone(), logits.to(DEVICE, copy=True)
    wanted, _ = eager.softmax_xent(exact, labels)
    eager_loss, _ = eager.softmax_xent(theirs, labels)
    assert_as_good(one_read(mine, labels.to(DEVICE), warps=1), eager_loss, wanted)
    assert_as_good(mine, theirs, exact)


def test_a_row_too_wide_is_refused():
    with pytest.raises(ValueError, match="columns"):
        one_read(torch.zeros(1, WIDEST + 1), torch.zeros(1).long())

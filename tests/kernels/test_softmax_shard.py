"""The two halves of softmax_xent in Triton, over a vocabulary in parts, against the torch leaf of the whole."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from device import DEVICE, DTYPES, assert_as_good, kernels

from sfr_kernels.kernels.backend import kernels_of

eager = kernels_of("torch")
from test_softmax_xent import OPTIONS, make

from sfr_kernels.ops.vocab_parallel import sharded_softmax_xent


class Stopped(Exception):
    pass


@dataclass
class Part:
    """Stands for a process: first it keeps what it would send, then it is given what all have sent."""

    start: int
    debug: bool = False
    sent: torch.Tensor | None = None
    given: torch.Tensor | None = None

    def gather(self, x):
        self.sent = x
        if self.given is None:
            raise Stopped
        return self.given


def in_parts(cuts, logits, labels, weight, **options):
    """loss, dlogits and statistics of logits whose columns are cut in so many parts."""
    ends = torch.tensor([0, *cuts]).cumsum(0).tolist()
    columns = [logits[:, a:b].to(DEVICE, copy=True) for a, b in pairwise(ends)]
    labels, weight = labels.to(DEVICE), None if weight is None else weight.to(DEVICE)
    parts = [Part(start) for start in ends[:-1]]
    for x, part in zip(columns, parts, strict=True):
        with pytest.raises(Stopped):
            sharded_softmax_xent(x, labels, weight, leaves=leaves, shard=part, need_stats=True, **options)
    for part in parts:
        part.given = torch.stack([other.sent for other in parts])
    results = [
        sharded_softmax_xent(x, labels, weight, leaves=leaves, shard=part, need_stats=True, **options)
        for x, part in zip(columns, parts, strict=True)
    ]
    loss, stats = results[0]
    for other, more in results[1:]:
        assert torch.equal(loss, other) and all(map(torch.equal, stats, more))
    return loss, torch.cat(columns, 1), stats


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("cuts", [(330, 1), (256, 512, 16)])  # one class; whole vectors
def test_a_vocabulary_in_parts_is_the_whole(cuts, options, dtype):
    logits, labels, weight = make(5, sum(cuts), dtype)
    labels[1:3] = torch.tensor([cuts[0] - 1, cuts[0]])  # either side of a cut
    for row_weight in (weight, None):
        exact_dx, eager_dx = logits.double(), logits.clone()
        exact, exact_stats = eager.softmax_xent(exact_dx, labels, row_weight, need_stats=True, **options)
        theirs, _ = eager.softmax_xent(eager_dx, labels, row_weight, **options)
        loss, dx, stats = in_parts(cuts, logits, labels, row_weight, **options)
        assert_as_good(loss, theirs, exact)
        assert_as_good(dx, eager_dx, exact_dx)
        torch.testing.assert_close(stats.lse.cpu().double(), exact_stats.lse, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(stats.entropy.cpu().double(), exact_stats.entropy, rtol=2e-5, atol=2e-6)
        assert torch.equal(stats.correct.cpu(), stats.predicted.cpu() == labels)
        if "softcap" not in options:  # whose rounding makes equals of many
            assert torch.equal(stats.predicted.cpu(), exact_stats.predicted)


def test_a_part_of_minus_infinity_and_strided_logits():
    logits, labels, weight = make(3, 300, torch.float32)
    logits[:, :100] = float("-inf")  # the first part has no probability
    labels[:] = 150
    exact = logits.double()
    wanted, _ = eager.softmax_xent(exact, labels, weight)
    loss, dx, _ = in_parts((100, 200), logits, labels, weight)
    torch.testing.assert_close(loss.cpu().double(), wanted, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(dx.cpu().double(), exact, rtol=2e-6, atol=1e-7)
    wide = torch.zeros(3, 600, device=DEVICE)
    view = wide[:, 1:601:2]
    view.copy_(logits)
    found = kernels.softmax_partials(view, labels.to(DEVICE), need_rest=True, need_stats=True)
    wanted = eager.softmax_partials(logits, labels, need_rest=True, need_stats=True)
    for values, same in zip(found, wanted, strict=True):
        torch.testing.assert_close(values.cpu(), same, rtol=2e-6, atol=1e-6)


def test_a_label_that_no_part_or_two_have():
    logits, labels, _ = make(3, 60, torch.float32)
    labels[1] = 60
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="60 is on 0"):
            in_parts((30, 30), logits, labels, None)
    else:
        loss, *_ = in_parts((30, 30), logits, labels, None)
        assert loss.isnan().tolist() == [False, True, False]

"""softmax_xent and its two halves over a vocabulary in parts, against the torch kernel in float64."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from device import BACKEND, DEVICE, DTYPES, assert_as_good, eager, kernels
from marks import long_but

from sfr_kernels.ops.vocab_parallel import sharded_softmax_xent

OPTIONS = {
    "plain": {},
    "scale": dict(logit_scale=0.37),
    "softcap": dict(softcap=3.0),
    "scale and softcap": dict(logit_scale=1.7, softcap=2.0),
    "smoothing": dict(label_smoothing=0.2),
    "z_loss": dict(z_loss=0.05),
    "everything": dict(logit_scale=1.3, softcap=4.0, label_smoothing=0.1, z_loss=0.02),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
none_and_all = pytest.mark.parametrize("options", [{}, OPTIONS["everything"]])


def make(n, vocab, dtype):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(n, vocab, generator=g)).to(dtype)
    labels = torch.randint(vocab, (n,), generator=g)
    labels[0], labels[-1:] = 0, vocab - 1  # both ends of a row
    return logits, labels, torch.rand(n, generator=g)


def results(module, x, labels, weight, **options) -> dict[str, torch.Tensor]:
    loss, stats = module.softmax_xent(x, labels, weight, need_stats=True, **options)
    return {"loss": loss, "dlogits": x, **stats._asdict()}


def exact(logits, labels, weight, **options):
    return results(eager, logits.double(), labels, weight, **options)


def ours(logits, labels, weight, **options):
    """With every row of the logits on 16 bytes, as the losses keep them; nothing between the rows is written."""
    n, vocab = logits.shape
    room = torch.full((n, (vocab // 64 + 2) * 64), -7.0, dtype=logits.dtype, device=DEVICE)
    room[:, :vocab] = logits.to(DEVICE)
    weight = None if weight is None else weight.to(DEVICE)
    found = results(kernels, room[:, :vocab], labels.to(DEVICE), weight, **options)
    assert (room[:, vocab:] == -7).all()
    return found


def assert_near(found, wanted, names: str, rtol: float, atol: float):
    for name in names.split():
        torch.testing.assert_close(found[name].cpu().double(), wanted[name].cpu().double(), rtol=rtol, atol=atol)


def check(logits, labels, weight, **options):
    wanted = exact(logits, labels, weight, **options)
    theirs = results(eager, logits.clone(), labels, weight, **options)
    found = ours(logits, labels, weight, **options)
    assert found["dlogits"].dtype == logits.dtype and found["loss"].dtype == torch.float32
    # a class whose logit is the highest, up to the rounding of a cap that many of them have reached
    z = logits.double() * options.get("logit_scale", 1.0)
    z = options["softcap"] * torch.tanh(z / options["softcap"]) if "softcap" in options else z
    chosen = z.gather(1, found["predicted"].cpu().unsqueeze(1))
    assert (chosen >= z.amax(1, keepdim=True) - 1e-6 * ("softcap" in options)).all()
    assert torch.equal(found["correct"].cpu(), found["predicted"].cpu() == labels)
    for name in ("loss", "dlogits", "lse", "entropy"):
        # the entropy of nearly certain rows is no number that an error is relative to
        if name != "entropy" or (found[name].cpu().double() - wanted[name]).abs().max() > 1e-6:
            assert_as_good(found[name], theirs[name], wanted[name])


# one class; fewer than any block; whole 16-byte loads in one block and in several; one block and several with an end
# that no vector fits
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 331, 512, 40960, 20001])
def test_every_width(vocab, dtype):
    check(*make(3, vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@every_option
@pytest.mark.parametrize("vocab", [331, 512])
def test_every_option(vocab, options, dtype):
    logits, labels, weight = make(5, vocab, dtype)
    check(logits, labels, weight, **options)
    check(logits, labels, None, **options)


def test_one_row_and_a_weight_of_zero():
    logits, labels, weight = make(4, 50, torch.float32)
    check(logits[:1], labels[:1], weight[:1])
    weight[1] = 0.0
    found = ours(logits, labels, weight)
    assert found["loss"][1] == 0 and (found["dlogits"][1] == 0).all() and (found["dlogits"][2] != 0).any()


@pytest.mark.parametrize("label", [50, -1, -100])
def test_a_label_outside_the_vocabulary_reads_nothing(label):
    """The losses refuse it; should one come so far, it must not be an address."""
    logits, labels, _ = make(3, 50, torch.float32)
    labels[1] = label
    loss, _ = kernels.softmax_xent(logits.to(DEVICE), labels.to(DEVICE))
    assert loss.isnan().tolist() == [False, True, False]


def test_no_rows():
    logits = torch.empty(0, 50, device=DEVICE)
    loss, stats = kernels.softmax_xent(logits, torch.empty(0, dtype=torch.int64, device=DEVICE), need_stats=True)
    assert loss.shape == stats.lse.shape == stats.predicted.shape == stats.entropy.shape == (0,)


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_an_offset_common_to_all_logits_costs_no_digit(offset):
    """Where the offset itself is exact: integers in float32."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randint(-8, 9, (4, 400), generator=g).float(), torch.randint(400, (4,), generator=g)
    for options in ({}, dict(label_smoothing=0.1)):
        plain, moved = (ours(x, labels, None, **options) for x in (logits, logits + offset))
        assert_near(moved, plain, "loss dlogits", rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("vocab", [7, 1000])
@pytest.mark.parametrize("size", [1e32, 3e38, -1e32])
def test_huge_logits(size, vocab):
    """Where the distance between two maxima is beyond float32."""
    logits, labels, _ = make(3, vocab, torch.float32)
    logits[0, vocab - 2] = size
    logits[1] = size
    logits[2, 0], logits[2, 1:] = size, -size
    found, wanted = ours(logits, labels, None), exact(logits, labels, None)
    assert_near(found, wanted, "lse entropy dlogits", rtol=1e-5, atol=1e-5)


def test_minus_infinity_is_a_class_of_no_probability():
    logits, labels, weight = make(3, 331, torch.float32)
    logits[:, 50:300] = float("-inf")  # whole lanes of a block
    logits[1, :40] = float("-inf")
    labels[:] = 320
    found, wanted = ours(logits, labels, weight), exact(logits, labels, weight)
    assert_near(found, wanted, "loss dlogits lse entropy", rtol=2e-6, atol=1e-7)
    assert (found["dlogits"][:, 50:300] == 0).all()


@pytest.mark.parametrize("vocab", [331, 512, 20001])
def test_the_first_of_equal_logits_is_predicted(vocab):
    logits, labels, _ = make(4, vocab, torch.float32)
    logits[0] = 1.0
    logits[1, [vocab // 3, vocab - 1]] = 100.0
    logits[2, [17, 18, vocab // 2]] = 100.0
    found = ours(logits, labels, None)["predicted"]
    assert found[:3].tolist() == [0, vocab // 3, 17] and found[3] == logits[3].argmax()


@none_and_all
def test_strided_logits(options):
    logits, labels, weight = make(4, 331, torch.float32)
    wanted = ours(logits, labels, weight, **options)
    wide, columns = torch.zeros(4, 700, device=DEVICE), torch.zeros(331, 4, device=DEVICE)
    for view in (wide[:, 5:336], wide[:, 1:663:2], columns.T, torch.empty_like(logits, device=DEVICE)):
        view.copy_(logits)
        found = results(kernels, view, labels.to(DEVICE), weight.to(DEVICE), **options)
        assert_near(found, wanted, "loss dlogits", rtol=1e-6, atol=1e-9)
        assert_near(found, wanted, "entropy", rtol=1e-5, atol=1e-6)
        assert torch.equal(found["predicted"], wanted["predicted"])
    assert (wide[:, 663:] == 0).all() and (wide[:, 0] == 0).all()  # and nothing beside it


@none_and_all
def test_without_a_gradient_the_logits_stay(options):
    logits, labels, weight = make(3, 331, torch.float32)
    mine = logits.to(DEVICE, copy=True)
    loss, stats = kernels.softmax_xent(mine, labels.to(DEVICE), weight.to(DEVICE), need_grad=False, **options)
    assert stats is None and torch.equal(mine.cpu(), logits)
    wanted, _ = eager.softmax_xent(logits.double(), labels, weight, **options)
    torch.testing.assert_close(loss.cpu().double(), wanted, rtol=1e-5, atol=1e-6)


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

    def run(part, x):
        return sharded_softmax_xent(BACKEND, part, x, labels, weight, need_stats=True, **options)

    for part, x in zip(parts, columns, strict=True):
        with pytest.raises(Stopped):
            run(part, x)
    for part in parts:
        part.given = torch.stack([other.sent for other in parts])
    (loss, stats), *others = map(run, parts, columns)
    for other, more in others:
        assert torch.equal(loss, other) and all(map(torch.equal, stats, more))
    return {"loss": loss, "dlogits": torch.cat(columns, 1), **stats._asdict()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", long_but(OPTIONS, "plain", "everything"))
@pytest.mark.parametrize("cuts", [(330, 1), (256, 512, 16)])  # one class; whole vectors
def test_a_vocabulary_in_parts_is_the_whole(cuts, name, dtype):
    options = OPTIONS[name]
    logits, labels, weight = make(5, sum(cuts), dtype)
    labels[1:3] = torch.tensor([cuts[0] - 1, cuts[0]])  # either side of a cut
    for row_weight in (weight, None):
        wanted = exact(logits, labels, row_weight, **options)
        theirs = results(eager, logits.clone(), labels, row_weight, **options)
        found = in_parts(cuts, logits, labels, row_weight, **options)
        for of in ("loss", "dlogits"):
            assert_as_good(found[of], theirs[of], wanted[of])
        assert_near(found, wanted, "lse", rtol=2e-6, atol=2e-6)
        assert_near(found, wanted, "entropy", rtol=2e-5, atol=2e-6)
        assert torch.equal(found["correct"].cpu(), found["predicted"].cpu() == labels)
        if "softcap" not in options:  # whose rounding makes equals of many
            assert torch.equal(found["predicted"].cpu(), wanted["predicted"])


def test_a_part_of_minus_infinity_and_strided_logits():
    logits, labels, weight = make(3, 300, torch.float32)
    logits[:, :100] = float("-inf")  # the first part has no probability
    labels[:] = 150
    found, wanted = in_parts((100, 200), logits, labels, weight), exact(logits, labels, weight)
    assert_near(found, wanted, "loss dlogits", rtol=2e-6, atol=1e-7)
    view = torch.zeros(3, 600, device=DEVICE)[:, 1::2]
    view.copy_(logits)
    found = kernels.softmax_partials(view, labels.to(DEVICE), need_rest=True, need_stats=True)
    wanted = eager.softmax_partials(logits, labels, need_rest=True, need_stats=True)
    for values, same in zip(found, wanted, strict=True):
        torch.testing.assert_close(values.cpu(), same, rtol=2e-6, atol=1e-6)


def test_a_label_that_no_part_has():
    logits, labels, _ = make(3, 60, torch.float32)
    labels[1] = 60
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="60 is on 0"):
            in_parts((30, 30), logits, labels, None)
    else:
        found = in_parts((30, 30), logits, labels, None)
        assert found["loss"].isnan().tolist() == [False, True, False]

"""softmax_xent in Triton, against the torch leaf in float64."""

import pytest
import torch
from device import DEVICE, DTYPES, assert_as_good, kernels

from sfr_kernels.kernels.backend import kernels_of

eager = kernels_of("torch")

OPTIONS = {
    "plain": {},
    "scale": dict(logit_scale=0.37),
    "softcap": dict(softcap=3.0),
    "scale and softcap": dict(logit_scale=1.7, softcap=2.0),
    "smoothing": dict(label_smoothing=0.2),
    "z_loss": dict(z_loss=0.05),
    "everything": dict(logit_scale=1.3, softcap=4.0, label_smoothing=0.1, z_loss=0.02),
}
# one class; fewer than any block; whole 16-byte loads in one block and in several; one block and several with an end
# that no vector fits
VOCABULARIES = [1, 7, 331, 512, 40960, 20001]


def make(n, vocab, dtype, offset=0.0):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(n, vocab, generator=g) + offset).to(dtype)
    labels = torch.randint(vocab, (n,), generator=g)
    labels[0], labels[-1:] = 0, vocab - 1  # both ends of a row
    return logits, labels, torch.rand(n, generator=g)


def aligned(logits) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits on the device with every row on 16 bytes, as the losses keep them; and what lies between the rows."""
    n, vocab = logits.shape
    room = torch.full((n, (vocab // 64 + 2) * 64), -7.0, dtype=logits.dtype, device=DEVICE)
    room[:, :vocab] = logits.to(DEVICE)
    return room[:, :vocab], room[:, vocab:]


def outputs(module, logits, labels, weight, dtype=None, device="cpu", **options) -> dict[str, torch.Tensor]:
    if module is leaves:
        x, between = aligned(logits)
    else:
        x = logits.to(device, dtype or logits.dtype, copy=True)
    weight = None if weight is None else weight.to(device)
    loss, stats = module.softmax_xent(x, labels.to(device), weight, need_stats=True, **options)
    assert module is not leaves or (between == -7).all()
    return {"loss": loss, "dlogits": x, "lse": stats.lse, "entropy": stats.entropy, "predicted": stats.predicted}


def check(logits, labels, weight, k=1.5, **options):
    exact = outputs(eager, logits, labels, weight, torch.float64, **options)
    theirs = outputs(eager, logits, labels, weight, **options)
    found = outputs(leaves, logits, labels, weight, device=DEVICE, **options)
    assert found["dlogits"].dtype == logits.dtype and found["loss"].dtype == torch.float32
    # a class whose logit is the highest, up to the rounding of a cap that many of them have reached
    z = logits.double() * options.get("logit_scale", 1.0)
    z = options["softcap"] * torch.tanh(z / options["softcap"]) if "softcap" in options else z
    chosen = z.gather(1, found.pop("predicted").cpu().unsqueeze(1))
    assert (chosen >= z.amax(1, keepdim=True) - 1e-6 * ("softcap" in options)).all()
    for name, mine in found.items():
        floor = 1e-6 if name == "entropy" else 0.0  # of nearly certain rows, which it is no number relative to
        if floor and (mine.cpu().double() - exact[name]).abs().max() <= floor:
            continue
        assert_as_good(mine, theirs[name], exact[name], k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_every_width(vocab, dtype):
    check(*make(3, vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("vocab", [331, 512])
def test_every_option(vocab, options, dtype):
    logits, labels, weight = make(5, vocab, dtype)
    check(logits, labels, weight, **options)
    check(logits, labels, None, **options)


def test_one_row_and_a_weight_of_zero():
    logits, labels, weight = make(4, 50, torch.float32)
    check(logits[:1], labels[:1], weight[:1])
    weight[1] = 0.0
    found = outputs(leaves, logits, labels, weight, device=DEVICE)
    assert found["loss"][1] == 0 and (found["dlogits"][1] == 0).all() and (found["dlogits"][2] != 0).any()


@pytest.mark.parametrize("label", [50, -1, -100])
def test_a_label_outside_the_vocabulary_reads_nothing(label):
    """Composites refuse it; should one come so far, it must not be an address."""
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
        plain, moved = (outputs(leaves, x, labels, None, device=DEVICE, **options) for x in (logits, logits + offset))
        torch.testing.assert_close(moved["loss"], plain["loss"], rtol=2e-6, atol=0)
        torch.testing.assert_close(moved["dlogits"], plain["dlogits"], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("vocab", [7, 1000])
@pytest.mark.parametrize("size", [1e32, 3e38, -1e32])
def test_huge_logits(size, vocab):
    """Where the distance between two maxima is beyond float32."""
    logits, labels, _ = make(3, vocab, torch.float32)
    logits[0, vocab - 2] = size
    logits[1] = size
    logits[2, 0], logits[2, 1:] = size, -size
    found = outputs(leaves, logits, labels, None, device=DEVICE)
    exact = outputs(eager, logits, labels, None, torch.float64)
    for name in ("lse", "entropy", "dlogits"):
        torch.testing.assert_close(found[name].cpu().double(), exact[name], rtol=1e-5, atol=1e-5)


def test_minus_infinity_is_a_class_of_no_probability():
    logits, labels, weight = make(3, 331, torch.float32)
    logits[:, 50:300] = float("-inf")  # whole lanes of a block
    logits[1, :40] = float("-inf")
    labels[:] = 320
    found = outputs(leaves, logits, labels, weight, device=DEVICE)
    exact = outputs(eager, logits, labels, weight, torch.float64)
    for name in ("loss", "dlogits", "lse", "entropy"):
        torch.testing.assert_close(found[name].cpu().double(), exact[name], rtol=2e-6, atol=1e-7)
    assert (found["dlogits"][:, 50:300] == 0).all()


@pytest.mark.parametrize("vocab", [331, 512, 20001])
def test_the_first_of_equal_logits_is_predicted(vocab):
    logits, labels, _ = make(4, vocab, torch.float32)
    logits[0] = 1.0
    logits[1, [vocab // 3, vocab - 1]] = 100.0
    logits[2, [17, 18, vocab // 2]] = 100.0
    found = outputs(leaves, logits, labels, None, device=DEVICE)["predicted"]
    assert found[:3].tolist() == [0, vocab // 3, 17] and found[3] == logits[3].argmax()


@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]])
def test_strided_logits(options):
    logits, labels, weight = make(4, 331, torch.float32)
    wanted = outputs(leaves, logits, labels, weight, device=DEVICE, **options)
    wide, columns = torch.zeros(4, 700, device=DEVICE), torch.zeros(331, 4, device=DEVICE)
    for view in (wide[:, 5:336], wide[:, 1:663:2], columns.T, torch.empty_like(logits, device=DEVICE)):
        view.copy_(logits)
        loss, stats = kernels.softmax_xent(view, labels.to(DEVICE), weight.to(DEVICE), need_stats=True, **options)
        torch.testing.assert_close(loss, wanted["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(view, wanted["dlogits"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(stats.entropy, wanted["entropy"], rtol=1e-5, atol=1e-6)
        assert torch.equal(stats.predicted, wanted["predicted"])
    assert (wide[:, 663:] == 0).all() and (wide[:, 0] == 0).all()  # and nothing beside it


@pytest.mark.parametrize("options", [{}, OPTIONS["everything"]])
def test_without_a_gradient_the_logits_stay(options):
    logits, labels, weight = make(3, 331, torch.float32)
    mine = logits.to(DEVICE, copy=True)
    loss, stats = kernels.softmax_xent(mine, labels.to(DEVICE), weight.to(DEVICE), need_grad=False, **options)
    assert stats is None and torch.equal(mine.cpu(), logits)
    wanted, _ = eager.softmax_xent(logits.double(), labels, weight, **options)
    torch.testing.assert_close(loss.cpu().double(), wanted, rtol=1e-5, atol=1e-6)

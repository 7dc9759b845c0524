"""`linear_cross_entropy`: every option and gradient against the float64 reference."""

from types import SimpleNamespace

import pytest
import torch
from cases import assert_as_good_as_eager, assert_same, small_config
from decoder_cases import IGNORE, LEAVES, OPTIONS, again, leaves_only, make, oracle, ours
from operations import Operations
from torch import Tensor

from sfr_kernels import SupervisedRows, linear_cross_entropy, reference
from sfr_kernels.ops.cross_entropy import warn_of_no_rows

pytestmark = pytest.mark.usefixtures("one_thread")
META = torch.zeros(1, device="meta")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_in_float64(options):
    x = make()
    options = options | {name: x.row_weight for name in options if name == "row_weight"}
    if "ignore_index" in options:
        x.labels[x.labels == IGNORE] = options["ignore_index"]
    assert_same(ours(x, **options), oracle(x, **options))
    assert_same(ours(x, backend="reference", **options), oracle(x, **options))


@pytest.mark.parametrize("dtype, k", [(torch.float32, 1.2), (torch.bfloat16, 1.1), (torch.float16, 1.1)])
@pytest.mark.parametrize("chunk_rows", [None, 16])  # dW in one product, and accumulated over chunks
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_as_good_as_eager(dtype, k, options, chunk_rows):
    x = make((5, 41), hidden_size=64, vocab=203, dtype=dtype)  # enough rows for errors to be statistics
    options = options | {name: x.row_weight for name in options if name == "row_weight"}
    if "ignore_index" in options:
        x.labels[x.labels == IGNORE] = options["ignore_index"]
    result = ours(x, chunk_rows=chunk_rows, **options)
    assert result["value"].dtype == torch.float32
    assert all(result[name].dtype == dtype for name in LEAVES)
    eager, exact = oracle(again(x, dtype), **options), oracle(again(x, torch.float64), **options)
    assert_as_good_as_eager(result, eager, exact, k)


def test_float32_logits_of_bfloat16():
    x = make((5, 41), hidden_size=64, vocab=203, dtype=torch.bfloat16)
    exact = oracle(again(x, torch.float64))
    result = ours(x, logits_dtype=torch.float32)
    torch.testing.assert_close(result["value"].double(), exact["value"], rtol=2e-6, atol=0)  # no 16-bit logit left
    assert_as_good_as_eager(result, oracle(again(x, torch.bfloat16)), exact, k=1.0)


def test_reductions_with_an_upstream_gradient_for_each_row():
    x, upstream = make(), torch.randn(3, 11, dtype=torch.float64)

    def run(**options):
        return linear_cross_entropy(x.hidden, x.weight, x.labels, bias=x.bias, **options)

    none = leaves_only(x, lambda: (run(reduction="none", row_weight=x.row_weight) * upstream).sum())
    assert_same(none, oracle(x, lambda rows: (rows * upstream.flatten()).sum(), row_weight=x.row_weight))
    per_row = run(reduction="none")
    assert per_row.shape == x.labels.shape and (per_row[x.labels == IGNORE] == 0).all()
    assert_same(ours(x, reduction="sum"), oracle(x, Tensor.sum))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("preset", ["default", "official"])  # the latter has rows with flow only, before those with CE
def test_supervised_rows_instead_of_labels(preset, reduction, autocast):
    """The same values, at the same tokens, as labels shifted; the rows lie in an order of their own."""
    x = make((3, 31), dtype=torch.float32 if autocast else torch.float64)
    x.labels[0, :6] = IGNORE
    rows = SupervisedRows.from_labels(x.labels, small_config(preset))
    assert (rows.ce_start > 0) == (preset == "official") and not torch.equal(rows.rows, rows.rows.sort().values)
    options = dict(bias=x.bias, reduction=reduction, row_weight=x.row_weight)

    def run(labels, **more):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = linear_cross_entropy(x.hidden, x.weight, labels, **options | more)
        assert reduction != "none" or loss.shape == x.labels.shape
        return loss if reduction != "none" else (loss * x.row_weight).sum()

    wanted = leaves_only(x, lambda: run(x.labels, shift=True))
    found = leaves_only(x, lambda: run(rows))
    for name, value in wanted.items():
        rtol = 2e-2 if autocast else 1e-10
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-3 if autocast else 1e-14)
    loss, stats = linear_cross_entropy(x.hidden, x.weight, rows, reduction="none", return_stats=True)
    picked = rows.rows[rows.ce_start :]
    logits = x.hidden.flatten(0, 1)[picked] @ x.weight.T
    assert torch.equal(stats.predicted, logits.argmax(1))
    assert torch.equal(stats.correct, logits.argmax(1) == rows.labels[rows.ce_start :])
    exact = torch.nn.functional.cross_entropy(logits, rows.labels[rows.ce_start :], reduction="none")
    torch.testing.assert_close(loss.flatten()[picked], exact)


@pytest.mark.parametrize("normalizer", [7.5, 3, torch.tensor(7.5), torch.tensor([3])])
def test_normalizer_is_a_number_or_a_tensor(normalizer):
    x = make()
    assert_same(ours(x, normalizer=normalizer), oracle(x, lambda rows: rows.sum() / float(normalizer)))


def test_upstream_gradient_and_second_backward_change_nothing_saved():
    x = make(dtype=torch.bfloat16)
    leaves = [getattr(x, name) for name in LEAVES]
    before = [t.detach().clone() for t in leaves]
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x.hidden, x.weight, x.labels, bias=x.bias, reduction=reduction)
        upstream = torch.rand_like(loss)
        first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        doubled = torch.autograd.grad(loss, leaves, 2 * upstream, retain_graph=True)
        last = torch.autograd.grad(loss, leaves, upstream)
        # a power of two is exact in every dtype: nothing may differ
        assert all(torch.equal(a, c) and torch.equal(2 * a, b) for a, b, c in zip(first, doubled, last, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


@pytest.mark.parametrize("chunk_rows", [1, 7, 10**6])  # one row at a time, a ragged last chunk, more than there are
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_change_nothing_beyond_rounding(chunk_rows, reduction):
    x = make()
    exact = oracle(x, None if reduction == "mean" else lambda rows: rows.view(3, 11))
    assert_same(ours(x, reduction=reduction, chunk_rows=chunk_rows), exact, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_the_loss_by_float32_rounding_and_runs_by_nothing(dtype):
    x = make((7, 43), hidden_size=24, vocab=57, dtype=dtype)
    first, second = ours(x), ours(x)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for chunk_rows in (1, 13, 100):
        other = ours(x, chunk_rows=chunk_rows)
        torch.testing.assert_close(other["value"], first["value"], rtol=4e-7, atol=0)
        torch.testing.assert_close(other["hidden"], first["hidden"], rtol=0.02, atol=1e-6)


def test_the_accumulator_of_the_weight_gradient_is_float32_unless_asked():
    x = make((5, 41), hidden_size=64, vocab=203, dtype=torch.bfloat16)
    exact = oracle(again(x, torch.float64))["weight"]

    def error(**options):
        return (ours(x, chunk_rows=1, **options)["weight"].double() - exact).norm()

    assert error(accum_dtype=torch.float32) == error()
    assert 1.2 * error() < error(accum_dtype=torch.bfloat16) < 30 * error()
    assert ours(x, accum_dtype=torch.bfloat16)["weight"].equal(ours(x)["weight"])  # one chunk has no accumulator


@pytest.mark.parametrize("shift, ahead", [(False, 0), (True, 1), (0, 0), (1, 1), (2, 2), (10, 10), (11, 11), (12, 11)])
def test_shift_predicts_a_later_token_of_the_same_sequence(shift, ahead):
    x = make()
    shifted = torch.tensor([[*row[ahead:], *[IGNORE] * ahead] for row in x.labels.tolist()])
    assert_same(ours(x, shift=shift), oracle(x, labels=shifted))
    rows = linear_cross_entropy(x.hidden, x.weight, x.labels, bias=x.bias, shift=shift, reduction="none")
    assert torch.equal(rows != 0, shifted != IGNORE)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_class_of_no_probability(backend):
    g = torch.Generator().manual_seed(0)
    h, w, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 8), (11, 8), (11,)))
    bias[3], labels = -torch.inf, torch.tensor([1, 2, 0, 5])
    h.requires_grad_()
    loss = linear_cross_entropy(h, w, labels, bias=bias, backend=backend)
    wanted = torch.nn.functional.cross_entropy(torch.addmm(bias, h, w.T), labels)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, h)[0] for x in (loss, wanted)))


@pytest.mark.parametrize("shape, vocab, hidden_size", [((1,), 2, 1), ((1, 1), 5, 3), ((2, 2, 3), 31, 7)])
def test_odd_sizes_and_one_row(shape, vocab, hidden_size):
    x = make(shape, hidden_size, vocab, used=1.0)
    assert_same(ours(x), oracle(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_an_exact_zero_still_connected(dtype, reduction):
    x = make(dtype=dtype, used=0.0)
    options = dict(bias=x.bias, reduction=reduction, normalizer=torch.tensor(0) if reduction == "mean" else None)
    loss = linear_cross_entropy(x.hidden, x.weight, x.labels, **options)
    assert (loss == 0).all() and loss.requires_grad
    loss.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in (x.hidden, x.weight, x.bias))


def test_frozen_parts_get_no_gradient_and_change_no_other():
    x = make()
    full = ours(x)
    for frozen in ({"weight"}, {"hidden"}, {"bias"}, {"hidden", "bias"}, {"weight", "bias"}):
        for reduction in ("mean", "none"):
            y = again(x, torch.float64)
            for name in frozen:
                getattr(y, name).requires_grad_(False)
            loss = linear_cross_entropy(y.hidden, y.weight, y.labels, bias=y.bias, reduction=reduction)
            (loss if reduction == "mean" else loss.sum() / (x.labels != IGNORE).sum()).backward()
            for name in LEAVES:
                grad = getattr(y, name).grad
                assert (grad is None) if name in frozen else torch.allclose(grad, full[name], rtol=1e-12, atol=1e-15)


def test_an_offset_common_to_all_logits_costs_no_digit():
    # Logits are multiples of 1/64 below 16: with 10⁴ added they are still exact in float32, where log-sum-exp is not.
    g = torch.Generator().manual_seed(0)
    hidden, weight = ((torch.randint(-8, 9, size, generator=g) / 8).requires_grad_() for size in ((40, 6), (50, 6)))
    x = SimpleNamespace(hidden=hidden, weight=weight, bias=torch.full((50,), 1e4, requires_grad=True))
    x.labels = torch.randint(0, 50, (40,), generator=g)
    exact, result = oracle(again(x, torch.float64), lambda rows: rows, bias=False), ours(x, reduction="none")
    for name in ("value", "hidden", "weight"):
        torch.testing.assert_close(result[name].double(), exact[name], rtol=1e-6, atol=1e-6)


def test_float16_at_32_thousand_rows():
    """1 / n of a probability is below what float16 can hold: dlogits must not be divided by n, but only gradients, and
    after they have the loss scaler's factor."""
    x = make((8, 4096), hidden_size=8, vocab=64, dtype=torch.float16, used=1.0)
    exact = oracle(again(x, torch.float64))
    for chunk_rows in (None, 4096):
        loss = linear_cross_entropy(x.hidden, x.weight, x.labels, bias=x.bias, chunk_rows=chunk_rows)
        torch.testing.assert_close(loss.double(), exact["value"], rtol=1e-4, atol=0)
        grads = torch.autograd.grad(loss, [getattr(x, name) for name in LEAVES], torch.tensor(2.0**14))
        for name, grad in zip(LEAVES, grads, strict=True):
            error = (grad.double() / 2**14 - exact[name]).norm() / exact[name].norm()
            assert error < 1e-3, name


@pytest.mark.parametrize("chunk_rows", [64, 4096])
def test_float16_has_room_for_a_sum_over_thousands_of_rows(chunk_rows):
    # Σ_r dz h is near 4096 · 30, beyond float16's 65504; the mean is near 30
    hidden, labels = torch.full((4096, 4), 30.0, dtype=torch.float16), torch.zeros(4096, dtype=torch.int64)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows).backward()
    expected = torch.full((8, 4), 30 / 8, dtype=torch.float16)
    expected[0] -= 30
    assert torch.equal(weight.grad, expected)


def test_strided_inputs():
    x = make((11, 3), hidden_size=20, vocab=37)
    wide = torch.empty(37, 40, dtype=torch.float64)
    y = again(x, torch.float64)
    wide[:, ::2] = y.weight.detach()
    y.hidden = y.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y.weight, y.labels = wide[:, ::2].requires_grad_(), x.labels.T.contiguous().T
    assert not (y.hidden.is_contiguous() or y.weight.is_contiguous() or y.labels.is_contiguous())
    assert_same(ours(y), oracle(x))


def test_tied_weights_sum_both_gradients():
    tokens, labels = torch.randint(0, 37, (2, 9)), torch.randint(0, 37, (18,))
    table = make().weight.detach().requires_grad_()
    linear_cross_entropy(table[tokens].tanh(), table, labels.view(2, 9)).backward()
    expected = table.detach().clone().requires_grad_()
    reference.linear_cross_entropy(expected[tokens].tanh().flatten(0, 1), expected, labels).mean().backward()
    torch.testing.assert_close(table.grad, expected.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_as_good_as_linear_and_float32_cross_entropy(bias, autocast):
    # torch's own linear rounds product and bias once, to 16-bit logits; rows, since one mean is a sample of one error
    x = make((5, 41), hidden_size=64, vocab=203, dtype=torch.float32 if autocast else torch.bfloat16)
    used = x.labels != IGNORE

    def eager(x):
        logits = torch.nn.functional.linear(x.hidden, x.weight, x.bias if bias else None)
        assert logits.dtype == torch.bfloat16
        return torch.nn.functional.cross_entropy(logits[used].float(), x.labels[used], reduction="none")

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(x.hidden, x.weight, x.labels, bias=x.bias if bias else None, reduction="none")
        result = leaves_only(x, lambda: loss[used])
        eager = leaves_only(x, lambda: eager(x))
    assert all(result[name].dtype == getattr(x, name).dtype for name in LEAVES)
    exact = oracle(again(x, torch.float64), lambda rows: rows[used.flatten()], bias=bias)
    assert_as_good_as_eager(result, eager, exact, k=1.1)


def test_no_grad():
    x = make()
    with torch.no_grad(), Operations() as produced:
        loss = linear_cross_entropy(x.hidden, x.weight, x.labels, bias=x.bias)
    assert not loss.requires_grad and produced.made(x.weight.shape) == 0
    torch.testing.assert_close(loss, oracle(x)["value"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_statistics_of_the_supervised_rows_in_order(softcap):
    x = make()
    options = dict(softcap=softcap, chunk_rows=4, return_stats=True, reduction="none")
    loss, stats = linear_cross_entropy(x.hidden, x.weight, x.labels, **options)
    logits = (x.hidden @ x.weight.T)[x.labels != IGNORE]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    p = logits.softmax(1)
    torch.testing.assert_close(stats.lse.double(), logits.logsumexp(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.entropy.double(), -(p * p.log()).sum(1), rtol=1e-6, atol=0)
    assert torch.equal(stats.predicted, logits.argmax(1))
    assert torch.equal(stats.correct, stats.predicted == x.labels[x.labels != IGNORE]) and stats.correct.any()
    assert not any(s.requires_grad for s in stats) and loss.requires_grad


def test_a_batch_without_labels_is_warned_of_once(recwarn):
    warn_of_no_rows.cache_clear()
    x = make(used=0.0)
    for _ in range(3):
        linear_cross_entropy(x.hidden, x.weight, x.labels)
    assert ["no label is supervised" in str(w.message) for w in recwarn if w.category is RuntimeWarning] == [True]


ROWS = SupervisedRows.from_labels(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "error, name, arguments",
    [
        (TypeError, "hidden", dict(hidden=torch.zeros(2, 3, 4, dtype=torch.int64))),
        (ValueError, "hidden", dict(hidden=torch.zeros(4))),
        (ValueError, "weight", dict(weight=torch.zeros(5, 3))),
        (TypeError, "weight", dict(weight=torch.zeros(5, 4).half())),
        (ValueError, "weight", dict(weight=META.expand(5, 4))),
        (ValueError, "bias", dict(bias=torch.zeros(4))),
        (TypeError, "bias", dict(bias=torch.zeros(5).double())),
        (ValueError, "bias", dict(bias=META.expand(5))),
        (TypeError, "labels", dict(labels=torch.zeros(2, 3))),
        (TypeError, "labels", dict(labels=torch.zeros(2, 3, dtype=torch.bool))),
        (ValueError, "labels", dict(labels=torch.zeros(3, 2, dtype=torch.int64))),
        (ValueError, "labels", dict(labels=META.long().expand(2, 3))),
        (ValueError, "labels .* got 5", dict(labels=torch.full((2, 3), 5))),  # beyond the vocabulary
        (ValueError, "labels .* got -1", dict(labels=torch.full((2, 3), -1))),
        (ValueError, "row_weight", dict(row_weight=torch.ones(3))),
        (ValueError, "row_weight", dict(row_weight=META.expand(2, 3))),
        (ValueError, "reduction", dict(reduction="median")),
        (ValueError, "normalizer", dict(normalizer=-1.0)),
        (ValueError, "normalizer", dict(normalizer=torch.ones(2))),
        (TypeError, "normalizer", dict(normalizer="3")),
        (ValueError, "normalizer", dict(normalizer=3, reduction="sum")),
        (ValueError, "softcap", dict(softcap=0.0)),
        (ValueError, "label_smoothing", dict(label_smoothing=1.1)),
        (ValueError, "z_loss", dict(z_loss=-0.1)),
        (ValueError, "labels .* got 5", dict(labels=torch.full((2, 3), 5), debug=True)),
        (ValueError, "labels .* got 5", dict(labels=torch.full((2, 3), 5), backend="reference")),
        (ValueError, "shift", dict(labels=ROWS, shift=True)),
        (ValueError, "shift .* -1", dict(shift=-1)),
        (TypeError, "shift .* 1.0", dict(shift=1.0)),
        (ValueError, "class_weight", dict(class_weight=torch.ones(4))),
        (ValueError, "class_weight", dict(class_weight=META.expand(5))),
        (TypeError, "class_weight", dict(class_weight=torch.ones(5, dtype=torch.int64))),
        (ValueError, "class_weight .* label_smoothing", dict(class_weight=torch.ones(5), label_smoothing=0.1)),
        (ValueError, "rows", dict(labels=ROWS, hidden=torch.zeros(3, 3, 4))),
        (ValueError, "weight is empty", dict(weight=torch.zeros(0))),  # as ZeRO-3 leaves it
        (ValueError, "weight is empty", dict(weight=torch.zeros(0, 4))),
        (ValueError, "chunk_rows", dict(chunk_rows=0)),
        (TypeError, "chunk_rows", dict(chunk_rows=True)),  # not 1
        (ValueError, "accum_dtype", dict(accum_dtype=torch.bfloat16)),
        (ValueError, "accum_dtype", dict(accum_dtype=torch.float64)),
        (ValueError, "vocab_start", dict(vocab_start=4)),
        (ValueError, "vocab_start", dict(vocab_start=-1)),
        (TypeError, "process_group", dict(process_group="tensor parallel")),
        (ValueError, "backend", dict(backend="fast")),
    ],
)
def test_errors_name_the_argument(error, name, arguments):
    fitting = dict(hidden=torch.zeros(2, 3, 4), weight=torch.zeros(5, 4), labels=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(error, match=name):
        linear_cross_entropy(**fitting | arguments)


def test_a_backend_is_what_was_asked_for(monkeypatch):
    x, calls, real = make(), [], reference.linear_cross_entropy
    monkeypatch.setattr(reference, "linear_cross_entropy", lambda *a, **k: calls.append(1) or real(*a, **k))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for environment, argument, expected in [("", None, 0), ("reference", None, 1), ("reference", "torch", 0)]:
        monkeypatch.setenv("SFR_KERNELS_BACKEND", environment)
        calls.clear()
        ours(x, backend=argument)
        assert len(calls) == expected
    with pytest.raises(RuntimeError, match="triton"):  # which needs a GPU, and does not fall back
        ours(x, backend="triton")
    monkeypatch.setenv("SFR_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="SFR_KERNELS_BACKEND"):
        ours(x)

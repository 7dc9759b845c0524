"""What is `linear_cross_entropy`'s own: every option against the float64 reference, chunks, float16, class weights.

What every loss does is in test_every_loss.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    IGNORE,
    LEAVES,
    LossCase,
    assert_as_good_as_eager,
    assert_same,
    decoder_case,
    entropy_output,
    evaluate,
    in_float64,
    our_entropy,
    reference_entropy,
    row_upstream,
)

from sfr_kernels import LinearCrossEntropy, SupervisedRows, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {
    "nothing but the bias": dict(),
    "no bias": dict(bias=False),
    "softcap": dict(softcap=3.0),  # logits have a deviation of about 2.5: most are in the bend of the tanh
    "logit_scale": dict(logit_scale=0.3),
    "label_smoothing": dict(label_smoothing=0.2),
    "z_loss": dict(z_loss=0.05),
    "row_weight": dict(row_weight=True),
    "row losses": dict(row_weight=True, reduction="none"),
    "ignore_index is a class": dict(ignore_index=5),
    "everything": dict(softcap=3.0, logit_scale=0.7, label_smoothing=0.1, z_loss=0.02, row_weight=True),
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


def row_weights(case: LossCase) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(case.labels.shape, generator=g, dtype=torch.float32)


def with_options(case: LossCase, options: dict) -> LossCase:
    options = options | {name: row_weights(case) for name in options if name == "row_weight"}
    if "ignore_index" in options:
        case.labels[case.labels == IGNORE] = options["ignore_index"]
    return replace(case, options=options)


def ours(case: LossCase, dtype=torch.float64, **options) -> dict[str, torch.Tensor]:
    return evaluate(our_entropy(case, **options), case.inputs(dtype))


def exact(case: LossCase, dtype=torch.float64, **options) -> dict[str, torch.Tensor]:
    """The reference in float64, of leaves that were rounded to `dtype`."""
    return evaluate(reference_entropy(case, **options), in_float64(case.inputs(dtype)))


def eager(case: LossCase, dtype, **options) -> dict[str, torch.Tensor]:
    return evaluate(reference_entropy(case, **options), case.inputs(dtype))


@EVERY_OPTION
@BACKENDS
def test_options_in_float64(options, backend):
    case = with_options(decoder_case(), options)
    assert_same(ours(case, backend=backend), exact(case))


@pytest.mark.parametrize("dtype, k", [(torch.float32, 1.2), (torch.bfloat16, 1.1), (torch.float16, 1.1)])
@pytest.mark.parametrize("chunk_rows", [None, 16])  # dW in one product, and accumulated over chunks
@EVERY_OPTION
def test_options_as_good_as_eager(dtype, k, options, chunk_rows):
    case = with_options(decoder_case((5, 41), hidden_size=64, vocab=203), options)  # enough rows for statistics
    result = ours(case, dtype, chunk_rows=chunk_rows)
    assert result["value"].dtype == torch.float32 and all(result[name].dtype == dtype for name in LEAVES)
    assert_as_good_as_eager(result, eager(case, dtype), exact(case, dtype), k)


def test_float32_logits_of_bfloat16():
    case = decoder_case((5, 41), hidden_size=64, vocab=203)
    wanted, result = exact(case, torch.bfloat16), ours(case, torch.bfloat16, logits_dtype=torch.float32)
    torch.testing.assert_close(result["value"].double(), wanted["value"], rtol=2e-6, atol=0)  # no 16-bit logit left
    assert_as_good_as_eager(result, eager(case, torch.bfloat16), wanted, k=1.0)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_as_good_as_linear_and_float32_cross_entropy(bias):
    # torch's own linear rounds product and bias once, to 16-bit logits; rows, since one mean is a sample of one error
    case, dtype = decoder_case((5, 41), hidden_size=64, vocab=203), torch.bfloat16
    used = case.labels != IGNORE

    def torch_rows(x):
        logits = F.linear(x.hidden, x.weight, x.bias if bias else None)[used]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, case.labels[used], reduction="none")

    def our_rows(x):
        return entropy_output(case, x, bias=bias, reduction="none")[used]

    results = [evaluate(f, case.inputs(dtype)) for f in (our_rows, torch_rows)]
    assert_as_good_as_eager(*results, evaluate(torch_rows, in_float64(case.inputs(dtype))), k=1.1)


@pytest.mark.parametrize("chunk_rows", [1, 7, 10**6])  # one row at a time, a ragged last chunk, more than there are
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_change_nothing_beyond_rounding(chunk_rows, reduction):
    case = replace(decoder_case(), options=dict(reduction=reduction))
    assert_same(ours(case, chunk_rows=chunk_rows), exact(case), rtol=1e-11)
    for dtype in (torch.float32, torch.bfloat16):
        whole, found = ours(case, dtype), ours(case, dtype, chunk_rows=chunk_rows)
        torch.testing.assert_close(found["value"], whole["value"], rtol=4e-7, atol=0)
        torch.testing.assert_close(found["hidden"], whole["hidden"], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("shift, ahead", [(False, 0), (True, 1), (0, 0), (1, 1), (2, 2), (10, 10), (11, 11), (12, 11)])
def test_shift_predicts_a_later_token_of_the_same_sequence(shift, ahead):
    case = decoder_case()
    shifted = replace(case, labels=torch.tensor([[*row[ahead:], *[IGNORE] * ahead] for row in case.labels.tolist()]))
    assert_same(ours(case, shift=shift), exact(shifted))
    rows = entropy_output(case, case.inputs(), shift=shift, reduction="none")
    assert torch.equal(rows != 0, shifted.labels != IGNORE)


def test_unsigned_labels_are_shifted_like_others():
    """−100 would become the class 156."""
    case = decoder_case(vocab=200, used=1.0)
    unsigned = replace(case, labels=case.labels.to(torch.uint8))
    assert torch.equal(ours(unsigned, shift=True)["value"], ours(case, shift=True)["value"])


@pytest.mark.parametrize("shape, vocab, hidden_size", [((1,), 2, 1), ((1, 1), 5, 3), ((2, 2, 3), 31, 7)])
def test_odd_sizes_and_one_row(shape, vocab, hidden_size):
    case = decoder_case(shape, hidden_size, vocab, used=1.0)
    assert_same(ours(case), exact(case))


def offset_case() -> LossCase:
    """Logits are multiples of 1/64 below 16: with 10⁴ added still exact in float32, where log-sum-exp is not."""
    case, g = decoder_case((40,), hidden_size=6, used=1.0), torch.Generator().manual_seed(0)
    case.hidden, case.weight = (torch.randint(-8, 9, size, generator=g).double() / 8 for size in ((40, 6), (37, 6)))
    case.bias = torch.full((37,), 1e4, dtype=torch.float64)
    return case


def test_an_offset_common_to_all_logits_costs_no_digit():
    case = offset_case()
    result = ours(case, torch.float32, reduction="none")
    wanted = exact(case, bias=False, reduction="none")
    for name in ("value", "hidden", "weight"):
        torch.testing.assert_close(result[name].double(), wanted[name], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# float16, whose smallest number is 6e-8 and whose largest 65504


def assert_near(found: dict, wanted: dict, error: float, upstream: float = 1.0) -> None:
    for name, value in wanted.items():
        mine = found[name].double() / (1.0 if name == "value" else upstream)
        assert (mine - value).norm() <= error * value.norm(), name


def test_float16_at_32_thousand_rows():
    """1 / n of a probability is below what float16 can hold: dlogits must not be divided by n, but only gradients, and
    after they have the loss scaler's factor."""
    case = decoder_case((8, 4096), hidden_size=8, vocab=64, used=1.0)
    wanted = exact(case, torch.float16)
    for chunk_rows in (None, 4096):
        found = evaluate(our_entropy(case, chunk_rows=chunk_rows), case.inputs(torch.float16), upstream=2.0**14)
        torch.testing.assert_close(found["value"].double(), wanted["value"], rtol=1e-4, atol=0)
        assert_near(found, wanted, 1e-3, 2.0**14)


@pytest.mark.parametrize("chunk_rows", [64, 4096])
def test_float16_has_room_for_a_sum_over_thousands_of_rows(chunk_rows):
    # Σ_r dz h is near 4096 · 30, beyond float16's 65504; the mean is near 30
    hidden, labels = torch.full((4096, 4), 30.0, dtype=torch.float16), torch.zeros(4096, dtype=torch.int64)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows).backward()
    expected = torch.full((8, 4), 30 / 8, dtype=torch.float16)
    expected[0] -= 30
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_float16_keeps_gradients_of_rows_of_little_weight(reduction):
    """Weights of 1 / (rows · batches) would put the gradients of the logits below what float16 holds."""
    case = decoder_case((2, 32), hidden_size=64, vocab=512)
    case.options = dict(row_weight=1e-6 * (0.5 + row_weights(case)), reduction=reduction)
    found = evaluate(our_entropy(case), case.inputs(torch.float16), upstream=2.0**16)
    assert_near(found, exact(case), 3e-3, 2.0**16)


def test_rows_of_no_weight_give_zero_in_float16():
    case = decoder_case()
    found = ours(case, torch.float16, row_weight=torch.zeros(3, 11, dtype=torch.float32), reduction="sum")
    assert found["value"] == 0 and not found["hidden"].any()


# ---------------------------------------------------------------------------------------------------------------------
# Weights of rows and classes


def of_torch(case: LossCase, class_weight=None, reduction="mean", row_weight=None, **options):
    """x → torch's own loss of the logits."""

    def run(x):
        logits = (x.hidden @ x.weight.T + x.bias).flatten(0, 1)
        weights = None if class_weight is None else class_weight.to(logits.dtype)
        loss = F.cross_entropy(logits, case.labels.flatten(), weights, reduction=reduction, **options)
        return loss if row_weight is None else (loss * row_weight.flatten()).sum()

    return run


@BACKENDS
def test_all_smoothed_labels_and_a_class_of_no_probability_are_as_with_torch(backend):
    case = decoder_case()
    smoothed = evaluate(of_torch(case, label_smoothing=1.0), case.inputs())
    assert_same(ours(case, label_smoothing=1.0, backend=backend), smoothed)
    case.labels[case.labels == 3], case.bias[3] = IGNORE, -torch.inf
    assert_same(ours(case, backend=backend), evaluate(of_torch(case), case.inputs()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@BACKENDS
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8])
def test_a_row_weight_of_integers_or_bools_counts_as_its_numbers(kind, backend, dtype):
    case = decoder_case()
    weight, count = torch.arange(33).view(3, 11).remainder(3).to(kind), (case.labels != IGNORE).sum()
    for reduction, factor in (("sum", 1), ("mean", 1 / count), ("none", row_upstream(33).view(3, 11))):
        wanted = evaluate(of_torch(case, reduction="none", row_weight=weight * factor), case.inputs())
        found = ours(case, dtype, reduction=reduction, row_weight=weight, backend=backend)
        assert_near(found, wanted, 1e-6 if dtype == torch.float64 else 3e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["torch", "reference", "compiled", "module", "rows"])
def test_class_weights_are_those_of_torch(kind, reduction):
    case = decoder_case()
    class_weight = torch.rand(37, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * 3
    options, function, labels = dict(reduction=reduction, class_weight=class_weight), linear_cross_entropy, case.labels
    if kind == "module":
        function, options = LinearCrossEntropy(**options), {}
        assert [name for name, _ in function.named_buffers()] == ["class_weight"]
    elif kind == "compiled":  # where the operator finds the supervised rows; ignored is a class that has a weight
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        options["ignore_index"] = 5
        labels = labels.masked_fill(labels == IGNORE, 5)
        case.labels[case.labels == 5] = IGNORE
    elif kind == "rows":
        labels = SupervisedRows.from_labels(labels)
        case.labels = F.pad(case.labels[:, 1:], (0, 1), value=IGNORE)
    else:
        options["backend"] = kind
    upstream = torch.rand(33, dtype=torch.float64) if reduction == "none" else None

    def run(x):
        loss = function(x.hidden, x.weight, labels, bias=x.bias, **options)
        return loss if upstream is None else (loss.flatten() * upstream).sum()

    wanted = evaluate(of_torch(case, class_weight, reduction, upstream), case.inputs())
    assert_same(evaluate(run, case.inputs()), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_class_and_row_weights_multiply(dtype):
    case = decoder_case()
    class_weight, row_weight = torch.arange(37, dtype=torch.float32) / 10, row_weights(case)
    of_class = class_weight.double()[case.labels.clamp(min=0)].flatten() * (case.labels != IGNORE).flatten()
    total = evaluate(of_torch(case, class_weight, "none", row_weight.double()), in_float64(case.inputs(dtype)))
    for options, divisor in ((dict(), of_class.sum()), (dict(normalizer=3.0), 3.0), (dict(reduction="sum"), 1.0)):
        found = ours(case, dtype, class_weight=class_weight, row_weight=row_weight, **options)
        wanted = {name: t / divisor for name, t in total.items()}
        assert_near(found, wanted, 1e-7 if dtype == torch.float64 else 3e-3)

"""What every loss does: the reference's value and gradients, whatever the dtype, the upstream gradient, the layout of
the inputs, the number of rows and what is frozen. `cases.LOSSES` has them; what is one loss's own is in its file."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import (
    ADAPTERS,
    EVERY,
    LOSSES,
    assert_same,
    embed,
    entropy_output,
    evaluate,
    judge,
    lora_of,
    losses,
    make_labels,
)
from operations import Operations

from benchmarks.timing import allocated
from sfr_kernels import SupervisedRows, reference
from sfr_kernels.ops.linear_cross_entropy import warn_of_no_rows

pytestmark = pytest.mark.usefixtures("one_thread")


LABELS = {
    "every shape of response": None,
    "one row": [[-100, -100, 3, -100]],
    "one token in a sequence": [[-100, -100, 3]],
    "flow only, under the published rule; else none": [[3, -100, -100, -100]],
    "CE only at the prompt's end, both losses and flow only": [[-100, 3, -100, 4]],
    "whole rows": [[1, 2, 3, 4], [5, 6, 7, 8]],
    "no rows": [[-100] * 5] * 2,
}
FEW = set(LABELS) - {"every shape of response", "no rows"}  # too few responses for CKA


CASES = [(name, key) for name in LOSSES for key in LABELS if "cka" not in name or key not in FEW]


@pytest.mark.parametrize("name, labels", CASES)
def test_value_and_gradients_in_float64(name, labels):
    loss, sizes = LOSSES[name], {} if LABELS[labels] is None else dict(labels=torch.tensor(LABELS[labels]))
    case = loss.case(**sizes)
    exact = evaluate(loss.reference(case), case.inputs(), upstream=-1.7)
    for leaf in ("value", "hidden", "weight", "bias", "input_proj.0.weight", "output_proj.bias"):
        assert sizes or leaf not in loss.leaves(case.inputs()) or exact[leaf].any()
    for backend in ("torch", "reference"):
        assert_same(evaluate(loss.ours(case, backend=backend), case.inputs(), upstream=-1.7), exact)


@losses(without=("sum", "row losses"))
def test_normalizer_and_flow_weight_are_numbers_or_tensors_of_one(name):
    loss, case = LOSSES[name], LOSSES[name].case()
    for normalizer in (7.5, 3, torch.tensor(7.5), torch.tensor([3]), torch.tensor(11.0, dtype=torch.float64)):
        exact = evaluate(loss.reference(case, normalizer=float(normalizer)), case.inputs())
        assert_same(evaluate(loss.ours(case, normalizer=normalizer), case.inputs()), exact)
    numbers = dict(normalizer=7.5) | (dict(flow_weight=0.5) if name.startswith("sfr") else {})
    wide = {name: torch.tensor([value], dtype=torch.float64) for name, value in numbers.items()}
    value, wanted = (loss.ours(case, **options)(case.inputs(torch.float32)) for options in (wide, numbers))
    assert value.shape == () and value.dtype == torch.float32 and value == wanted


@pytest.mark.parametrize("dtype, k", [(torch.float32, 2.0), (torch.bfloat16, 1.1), (torch.float16, 1.1)])
@losses(without=["cka", "mse, official", "cosine, official"])
def test_as_good_as_eager(name, dtype, k):
    judge(LOSSES[name].sized_case(), LOSSES[name].ours, LOSSES[name].reference, k, dtype)


@losses("flow, default")
def test_float32_head_beside_bfloat16_hidden_states(name):
    def eager(case):
        def run(x):
            params = {name: p.to(x.hidden.dtype) for name, p in x.params.items()}
            return LOSSES[name].reference(case)(SimpleNamespace(**vars(x) | dict(params=params)))

        return run

    case = LOSSES[name].sized_case()
    judge(case, LOSSES[name].ours, eager, 1.1, torch.bfloat16, head_dtype=torch.float32)


@losses("cross-entropy", "flow, default")
def test_autocast(name):
    def under_autocast(function, case):
        def run(x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.hidden.dtype == torch.float32):
                return function(case)(x)

        return run

    # eager adds biases and residuals to its 16-bit products in float32, and keeps the sums
    ours, eager = (partial(under_autocast, function) for function in (LOSSES[name].ours, LOSSES[name].reference))
    judge(LOSSES[name].sized_case(), ours, eager, 1.5, torch.float32)
    case = LOSSES[name].case()
    value = ours(case)(case.inputs(torch.float32))
    # hidden states and the decoder are cast as torch's linear casts them; the head by itself wherever it differs
    assert torch.equal(value, LOSSES[name].ours(case)(case.inputs(torch.bfloat16, torch.float32)))


@EVERY
def test_runs_and_backwards_give_the_same_bits_and_change_no_input(name):
    loss, case = LOSSES[name], LOSSES[name].case()
    x = case.inputs(torch.bfloat16)
    leaves = list(loss.leaves(x).values())
    before, targets = [p.detach().clone() for p in leaves], case.targets.clone()
    value = loss.ours(case)(x)
    upstreams = (torch.tensor(3.0), torch.tensor(6.0, dtype=torch.float64), torch.tensor(3.0))  # of another dtype, too
    first, doubled, last = (torch.autograd.grad(value, leaves, u, retain_graph=True) for u in upstreams)
    # a power of two is exact in every dtype: nothing may differ
    assert all(torch.equal(a, c) and torch.equal(2 * a, b) for a, b, c in zip(first, doubled, last, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True)) and torch.equal(targets, case.targets)
    again = loss.ours(case)(x)
    freed = torch.autograd.grad(again, leaves, upstreams[0])  # may write over what forward saved
    assert torch.equal(again, value) and all(torch.equal(a, b) for a, b in zip(first, freed, strict=True))


class Unused(torch.autograd.Function):
    """x, of which no gradient comes back: torch hands None to the backward before it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


@EVERY
def test_a_loss_without_an_upstream_gradient_gives_none(name):
    case = LOSSES[name].case()
    x = case.inputs()
    found = LOSSES[name].output(case, x, **case.options)
    (Unused.apply(found if isinstance(found, torch.Tensor) else found.loss).sum() + x.hidden.sum() * 2).backward()
    assert (x.hidden.grad == 2).all()
    assert all(p.grad is None or not p.grad.any() for p in (x.weight, x.bias, *x.params.values()))


@losses("cross-entropy", "sum", "flow, ", "mse, ", without=["lora"])  # h Aᵀ is differentiated by autograd
def test_a_step_between_two_backwards_changes_nothing(name):
    """The gradients were made in forward: what the parameters are by now is no concern of backward."""
    loss, case = LOSSES[name], LOSSES[name].case()
    x = case.inputs()
    leaves = list(loss.leaves(x).values())
    value = loss.ours(case)(x)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    with torch.no_grad():
        for p in leaves:
            p.mul_(2)
    assert all(map(torch.equal, first, torch.autograd.grad(value, leaves)))


@EVERY
def test_frozen_parts_get_no_gradient_and_change_no_other(name):
    loss, case = LOSSES[name], LOSSES[name].case()
    full, names = evaluate(loss.ours(case), case.inputs()), set(loss.leaves(case.inputs()))
    decoder, head = {"weight", "bias"}, set(case.inputs().params)
    downs, ups = ({pair[i] for pair in ADAPTERS} for i in (0, 1))
    trunk, two, all_but_one = {"hidden"}, {"bias", "input_proj.0.weight"}, head - {"output_proj.bias"}
    for frozen in (
        *(trunk, decoder, head, trunk | head, decoder | head, trunk | decoder, two, all_but_one),
        *(ups, downs, {"up"}, downs | ups, downs | trunk, downs | trunk | decoder),
    ):
        if not names & frozen or names <= frozen:
            continue
        x = case.inputs()
        for leaf in names & frozen:
            loss.leaves(x)[leaf].requires_grad_(False)
        loss.ours(case)(x).backward()
        for leaf, p in loss.leaves(x).items():
            assert (p.grad is None) == (leaf in frozen), leaf
            assert p.grad is None or torch.allclose(p.grad, full[leaf], rtol=1e-11, atol=1e-13), leaf


@EVERY
def test_no_grad_gives_the_value_and_makes_no_gradient(name):
    loss, case = LOSSES[name], LOSSES[name].case()
    with torch.no_grad(), Operations() as forward_only:
        value = loss.ours(case)(case.inputs())
    assert not value.requires_grad
    torch.testing.assert_close(value, loss.reference(case)(case.inputs()).detach(), rtol=1e-10, atol=0)
    with Operations() as both:
        loss.ours(case)(case.inputs()).backward()
    assert forward_only.flops <= 0.6 * both.flops


@EVERY
def test_no_rows_give_an_exact_zero_still_connected(name):
    loss, case = LOSSES[name], LOSSES[name].case(labels=torch.full((2, 5), -100))
    # the tokens of a step in which all is ignored
    options = {} if "reduction" in case.options else dict(normalizer=torch.tensor(0))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        x = case.inputs(dtype)
        value = loss.ours(case, **options)(x)
        assert value == 0 and value.requires_grad and value.dtype == torch.promote_types(dtype, torch.float32)
        value.backward()
        for p in loss.leaves(x).values():
            assert p.grad is not None and p.grad.shape == p.shape and not p.grad.any()
    with torch.no_grad():
        assert loss.ours(case, **options | dict(backend="reference"))(case.inputs()) == 0


@losses("cross-entropy", "row losses", "sfr: flow, default")
def test_a_batch_without_labels_is_warned_of_once(name, recwarn):
    warn_of_no_rows.cache_clear()
    case = LOSSES[name].case(labels=torch.full((2, 5), -100))
    for _ in range(3):
        LOSSES[name].ours(case)(case.inputs())
    assert ["no label is supervised" in str(w.message) for w in recwarn if w.category is RuntimeWarning] == [True]


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other column": lambda t: torch.stack([t, t + 1], dim=-1).flatten(-2)[..., ::2],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "flat": lambda t: t,
}


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_may_be_strided_or_misaligned(name, layout):
    loss, case = LOSSES[name], LOSSES[name].case()
    plain, x, moved = evaluate(loss.ours(case), case.inputs()), case.inputs(), LAYOUTS[layout]
    for matrix in ("hidden", "weight", *(name for pair in ADAPTERS for name in pair[:2] if hasattr(x, name))):
        setattr(x, matrix, moved(getattr(x, matrix).detach()).requires_grad_())
    assert layout in ("misaligned", "flat") or not (x.hidden.is_contiguous() or x.weight.is_contiguous())
    case.labels, case.targets = moved(case.labels), moved(case.targets[None])[0]
    if layout == "flat" and (loss.output is not entropy_output or "of_rows" in case.options):  # labels are not flat
        x.hidden, plain["hidden"] = x.hidden.detach().flatten(0, 1).requires_grad_(), plain["hidden"].flatten(0, 1)
    assert_same(evaluate(loss.ours(case), x), plain)


@losses("cross-entropy", "sfr: ")
def test_a_decoder_tied_to_the_embedding_sums_both_gradients(name):
    loss, case = LOSSES[name], LOSSES[name].case()
    tokens, found = case.labels.clamp(min=0), []
    for function in (loss.ours(case), loss.reference(case)):
        table = case.weight.clone().requires_grad_()
        x = SimpleNamespace(**vars(case.inputs()) | dict(hidden=table[tokens].tanh(), weight=table))
        found += torch.autograd.grad(function(x), table)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


@losses("rows", "default", "mtp", without=["row losses", "cka"])
def test_neither_order_nor_micro_batches_change_a_step(name):
    """With the normalizer of the step, and identities that rows take along."""
    loss, (labels, segments) = LOSSES[name], make_labels()
    noise_id = torch.arange(labels.numel()).view_as(labels)
    whole = loss.case(labels=labels, segments=segments, noise_id=noise_id)
    total, wanted = torch.tensor(float(whole.rows.num_ce)), evaluate(loss.ours(whole), whole.inputs())
    for parts in ([slice(0, 2), slice(2, 3), slice(3, 4)], [torch.tensor([3, 1, 0, 2])]):
        x, value = whole.inputs(), 0.0
        for part in parts:
            rows = SupervisedRows.from_labels(labels[part], whole.config, segments[part], noise_id[part])
            targets = rows.labels if "mtp" in name else embed(rows, labels[part], 6)
            case, y = replace(whole, rows=rows, targets=targets), SimpleNamespace(**vars(x))
            y.hidden = x.hidden[part]
            value = value + loss.ours(case, normalizer=total)(y)
        assert_same(evaluate(lambda _, value=value: value, x), wanted)


@losses("flow, default")
def test_the_seed_is_an_int_or_a_tensor_and_times_may_be_given(name):
    loss, case = LOSSES[name], LOSSES[name].case()
    value = loss.ours(case)(case.inputs())
    for tensor in (torch.tensor(case.seed), torch.tensor([case.seed])):  # no dimension, or one
        assert torch.equal(loss.ours(case, seed=tensor)(case.inputs()), value)
    for other in (case.seed + 1, case.seed + 2**32, case.seed - 2**32):
        assert loss.ours(case, seed=other)(case.inputs()) != value
    for backend in ("torch", "reference"):  # unsigned or signed, 64 bits are the same 64 bits
        both = [loss.ours(case, seed=seed, backend=backend)(case.inputs()) for seed in (2**64 - 1, -1)]
        assert torch.equal(*both)
    drawn, index = reference.draw_times(case.rows, case.seed, case.config)
    case.rows = case.rows.replace(time_index=index.int())
    torch.testing.assert_close(loss.ours(case, times=drawn)(case.inputs()), value, rtol=1e-12, atol=0)
    exact = evaluate(loss.reference(case, times=drawn.flip(0)), case.inputs())
    assert_same(evaluate(loss.ours(case, times=drawn.flip(0)), case.inputs()), exact)
    assert exact["value"] != value


@losses("cross-entropy", "row losses", "sfr: flow", "mtp")
def test_statistics_are_of_the_rows_with_cross_entropy_and_change_nothing(name):
    """In their order: under the published rule the first rows have flow only."""
    loss, case = LOSSES[name], LOSSES[name].case()
    options, flat = case.options | dict(softcap=2.0, chunk_rows=7), case.hidden.flatten(0, 1)
    if "shift" in options:
        labels = torch.nn.functional.pad(case.labels[:, 1:], (0, 1), value=-100).flatten()
        index = (labels != -100).nonzero().squeeze(1)
        labels = labels[index]
    else:
        index, labels = case.rows.rows[case.rows.ce_start :], case.rows.labels[case.rows.ce_start :]
    x, logits = case.inputs(), flat[index] @ case.weight.T + case.bias
    for down, up, scale, _ in lora_of(x):
        logits = logits + scale * flat[index] @ down.T.detach() @ up.T.detach()
    logits = 2 * torch.tanh(logits / 2)
    log_p = logits.log_softmax(1)
    with torch.no_grad():
        forward_only = loss.output(case, x, **options, return_stats=True)
    out = loss.output(case, x, **options, return_stats=True)
    for stats in (getattr(x, "stats", x[-1]) for x in (forward_only, out)):
        torch.testing.assert_close(stats.lse, logits.logsumexp(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.entropy, -(log_p.exp() * log_p).sum(1), rtol=1e-12, atol=0)
        assert torch.equal(stats.predicted, logits.argmax(1)) and stats.correct.any()
        assert torch.equal(stats.correct, stats.predicted == labels) and not any(s.requires_grad for s in stats)
    plain = evaluate(loss.ours(case, **options), x)
    found = evaluate(loss.ours(case, **options, return_stats=True), x)
    assert all(torch.equal(found[leaf], plain[leaf]) for leaf in plain)


@losses("cross-entropy", "sfr: flow, default")
def test_the_accumulator_of_the_weight_gradient_is_float32_unless_asked(name):
    loss = LOSSES[name]
    case = loss.case(length=90)
    exact = evaluate(loss.ours(case), case.inputs())["weight"]

    def error(**options):
        found = evaluate(loss.ours(case, **dict(chunk_rows=1) | options), case.inputs(torch.bfloat16))
        return (found["weight"].double() - exact).norm()

    assert error() == error(accum_dtype=torch.float32)
    assert 1.2 * error() < error(accum_dtype=torch.bfloat16) < 30 * error()
    one = [error(accum_dtype=dtype, chunk_rows=1000) for dtype in (None, torch.bfloat16)]
    assert one[0] == one[1]  # a single chunk has no accumulator


@losses("cross-entropy", "sum", "flow, ", "mse, ")
def test_forward_leaves_the_gradients_alone(name):
    """No activation of the head, no logit: what the allocator has left is the size of the gradients."""
    case = LOSSES[name].case(length=300, vocab=251, hidden_size=40)
    x = case.inputs(torch.float32)
    kept, _, value = allocated(lambda: LOSSES[name].ours(case)(x), x.hidden.device)
    gradients = sum(p.numel() * p.element_size() for p in LOSSES[name].leaves(x).values())
    assert value.requires_grad and kept <= gradients + 2**13 + 16 * case.labels.numel()  # and where the rows are


@losses("cross-entropy", "flow, default", "mse, default")
def test_the_reference_is_called_where_it_was_asked_for_alone(name, monkeypatch):
    functions = {"flow": "flow_matching_loss", "sfr": "sfr_loss"}
    loss, case, calls = LOSSES[name], LOSSES[name].case(), []
    real = getattr(reference, functions.get(name.partition(":")[0], "linear_cross_entropy"))
    monkeypatch.setattr(reference, real.__name__, lambda *a, **k: calls.append(1) or real(*a, **k))
    for environment, argument, expected in [("", None, 0), ("reference", None, 1), ("reference", "torch", 1)]:
        monkeypatch.setenv("SFR_KERNELS_BACKEND", environment)
        loss.ours(case, backend=argument)(case.inputs())
        assert len(calls) == expected

"""`sfr_loss`: the joint loss is the reference's, and the sum of its two parts, in value and in every gradient."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import (
    LEAVES,
    LossCase,
    assert_same,
    embed,
    evaluate,
    judge,
    make_case,
    make_head,
    make_labels,
    reference_sfr,
    small_config,
)
from operations import Operations

from sfr_kernels import SupervisedRows, flow_matching_loss, linear_cross_entropy, sfr_loss

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = pytest.mark.parametrize("preset", ["default", "official"])
KINDS = [(loss, preset) for loss in ("flow", "mse", "cosine", "cka") for preset in ("default", "official")]
KINDS = pytest.mark.parametrize("loss, preset", [*KINDS, ("mtp", "default")])


def output(case: LossCase, x: SimpleNamespace, **overrides):
    options = dict(bias=x.bias, seed=case.seed, config=case.config) | case.options | overrides
    return sfr_loss(x.hidden, x.weight, x.head, case.rows, case.targets, **options)


def ours(case: LossCase, **overrides):
    """x → the library's loss on the case."""
    return lambda x: output(case, x, **overrides).loss


def check(case: LossCase, **overrides) -> dict[str, torch.Tensor]:
    exact = evaluate(reference_sfr(case, **overrides), case.inputs(), upstream=-1.7)
    assert_same(evaluate(ours(case, **overrides), case.inputs(), upstream=-1.7), exact)
    return exact


@KINDS
def test_every_kind_in_float64(loss, preset):
    case = make_case(small_config(preset, loss=loss, flow_weight=0.6))
    exact = check(case)
    assert all(exact[name].any() for name in LEAVES)
    assert_same(evaluate(ours(case, backend="reference"), case.inputs(), upstream=-1.7), exact)
    # λ, the normalizer and the transforms of the logits are a call's own
    options = dict(flow_weight=2.5, normalizer=31.0, softcap=2.0, logit_scale=0.5)
    check(case, **options)
    # and L_flow may have the other normalizer than the preset's
    other = dict(tokens="weights", weights="tokens")[case.config.flow_normalizer]
    check(replace(case, config=replace(case.config, flow_normalizer=other)), **options)
    check(case, bias=None, flow_weight=torch.tensor(0.0, dtype=torch.float64), normalizer=torch.tensor(31.0).double())


def sized_case(preset: str, **options) -> LossCase:
    """Enough rows for errors to be statistics, and times and angles that 16 bit can hold, or eager would drown in t."""
    config = small_config(preset, time_scale=1.0, width=40, flow_weight=0.5)
    case = make_case(config, length=41, hidden_size=32, target_size=24, vocab=83)
    case.rows = case.rows.replace(time_index=(case.rows.noise_id % 4).int())
    case.options = dict(times=torch.tensor([0.125, 0.375, 0.625, 0.875]), **options)
    return case


@BOTH
@pytest.mark.parametrize("dtype, k", [(torch.float32, 2.0), (torch.bfloat16, 1.1), (torch.float16, 1.1)])
def test_as_good_as_eager(dtype, k, preset):
    judge(sized_case(preset), ours, reference_sfr, k, dtype)


def test_float32_head_beside_bfloat16_model():
    def eager(case):
        def run(x):
            params = {name: p.to(x.hidden.dtype) for name, p in x.params.items()}
            return reference_sfr(case)(SimpleNamespace(**{name: getattr(x, name) for name in LEAVES}, params=params))

        return run

    judge(sized_case("default"), ours, eager, 1.1, torch.bfloat16, head_dtype=torch.float32)


def test_autocast():
    def under_autocast(function):
        def run(case):
            def call(x):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.hidden.dtype == torch.float32):
                    return function(case)(x)

            return call

        return run

    # eager adds biases and residuals to its 16-bit products in float32, and keeps the sums
    judge(sized_case("default"), under_autocast(ours), under_autocast(reference_sfr), 1.5, torch.float32)


@KINDS
def test_loss_is_the_sum_of_its_parts(loss, preset):
    case = make_case(small_config(preset, loss=loss), hidden_size=6)  # as wide as the targets, for "mtp"
    x = case.inputs()

    def parts(x):
        rows = case.rows
        flat = x.hidden.flatten(0, 1)
        ce = linear_cross_entropy(flat[rows.rows[rows.ce_start :]], x.weight, rows.labels[rows.ce_start :], bias=x.bias)
        if loss != "mtp":
            arguments = (x.hidden, x.head, rows, case.targets)
            return ce, flow_matching_loss(*arguments, seed=case.seed, config=case.config)
        return ce, multi_token_prediction(case, x)

    out, (ce, flow) = output(case, x, flow_weight=0.3), parts(x)
    for name, expected in dict(loss=ce + 0.3 * flow, ce=ce, flow=flow).items():
        torch.testing.assert_close(getattr(out, name), expected.detach(), rtol=1e-11, atol=0)
    assert out.loss.requires_grad and not (out.ce.requires_grad or out.flow.requires_grad)
    separate = evaluate(lambda x: torch.add(*parts(x), alpha=0.3), case.inputs())
    assert_same(evaluate(ours(case, flow_weight=0.3), case.inputs()), separate)


@pytest.mark.parametrize("loss", ["flow", "mtp"])
def test_options_of_the_cross_entropy_are_passed_on(loss):
    case = make_case(small_config("official", loss=loss) if loss == "flow" else small_config(loss=loss))
    options = dict(softcap=3.0, logit_scale=0.7, label_smoothing=0.1, z_loss=0.02)
    check(case, **options)
    with Operations() as seen:
        found = evaluate(ours(case, chunk_rows=3, accum_dtype=torch.float64, **options), case.inputs())
    assert_same(found, evaluate(reference_sfr(case, **options), case.inputs()))
    assert max(s[0] for s in seen.shapes if len(s) == 2 and s[1] == len(case.weight)) == 3


def test_the_accumulator_of_the_weight_gradient_is_float32_unless_asked():
    case = make_case(small_config(), length=60)
    exact = evaluate(ours(case), case.inputs())["weight"]

    def error(**options):
        found = evaluate(ours(case, chunk_rows=1, **options), case.inputs(torch.bfloat16, torch.float32))
        return (found["weight"].double() - exact).norm()

    assert error() == error(accum_dtype=torch.float32) != error(accum_dtype=torch.bfloat16)


@pytest.mark.parametrize("debug", [False, True])
def test_labels_outside_the_vocabulary_are_refused(debug):
    case = make_case(small_config())
    case.rows.labels[-1] = 17
    with pytest.raises(ValueError, match=r"labels .* got 17"):
        output(case, case.inputs(), debug=debug)


@pytest.mark.parametrize("loss", ["flow", "mtp"])
def test_statistics_are_of_the_rows_with_cross_entropy_and_change_nothing(loss):
    case = make_case(small_config("official", loss=loss) if loss == "flow" else small_config(loss=loss))
    options = dict(softcap=2.0, chunk_rows=7, return_stats=True)
    index = case.rows.rows[case.rows.ce_start :]  # under the published rule the first rows have flow only
    logits = case.hidden.flatten(0, 1)[index] @ case.weight.T + case.bias
    log_p = (2 * torch.tanh(logits / 2)).log_softmax(1)
    with torch.no_grad():
        forward_only = output(case, case.inputs(), **options)
    x = case.inputs()
    out, plain = output(case, x, **options), output(case, x, **options | dict(return_stats=False))
    for stats in (forward_only.stats, out.stats):
        torch.testing.assert_close(stats.lse, (2 * torch.tanh(logits / 2)).logsumexp(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.entropy, -(log_p.exp() * log_p).sum(1), rtol=1e-12, atol=0)
        assert torch.equal(stats.predicted, logits.argmax(1))
        assert torch.equal(stats.correct, logits.argmax(1) == case.labels.flatten()[index + 1])
        assert stats.correct.any() and not any(s.requires_grad for s in stats)
    assert plain.stats is None and torch.equal(out.ce, plain.ce) and torch.equal(out.flow, plain.flow)
    found, wanted = (evaluate(lambda _, o=o: o.loss, x) for o in (out, plain))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def multi_token_prediction(case: LossCase, x: SimpleNamespace) -> torch.Tensor:
    """Plain multi-token prediction: cross-entropy of head(0, 0, h) with the label mtp_offset ahead in the response."""
    labels = torch.full_like(case.labels, -100)
    ahead = case.config.mtp_offset
    for b, p in (divmod(r, 13) for r in case.rows.rows.tolist()):
        inside = all((b * 13 + q) in case.rows.rows.tolist() for q in range(p, p + ahead) if q < 13)
        if inside and p + ahead < 13:
            labels[b, p] = case.labels[b, p + ahead]
    n = case.hidden[..., 0].numel()
    zeros = torch.zeros(n, case.hidden.shape[-1], dtype=torch.float64)
    v = x.head(zeros, torch.tensor(0.0), x.hidden.flatten(0, 1))
    weight = torch.zeros(n, dtype=torch.float64)
    weight[case.rows.rows] = case.rows.weight.double()
    return linear_cross_entropy(
        v, x.weight, labels.flatten(), bias=x.bias, row_weight=weight, normalizer=case.rows.num_ce
    )


@pytest.mark.parametrize("mtp_offset", [2, 3, 20])  # 20: further ahead than any response is long
def test_mtp_is_cross_entropy_of_labels_shifted_within_the_response(mtp_offset):
    case = make_case(small_config(loss="mtp", mtp_offset=mtp_offset))
    with torch.no_grad():
        expected = multi_token_prediction(case, case.inputs())
        out = output(case, case.inputs())
    torch.testing.assert_close(out.flow, expected, rtol=1e-11, atol=0)
    assert (case.rows.num_flow > 0) == (out.flow > 0) == (mtp_offset < 20)


@BOTH
@pytest.mark.parametrize(
    "labels",
    [
        pytest.param([[-100, -100, 3, -100]], id="one row"),
        pytest.param([[3, -100, -100, -100]], id="flow only, under the published rule"),
        pytest.param([[-100, 3, -100, 4]], id="CE only at the prompt's end, both losses and flow only"),
        pytest.param([[1, 2, 3, 4], [5, 6, 7, 8]], id="whole rows"),
        pytest.param([[-100] * 4] * 2, id="no rows"),
    ],
)
@pytest.mark.parametrize("loss", ["flow", "mse", "cosine"])
def test_few_rows(labels, preset, loss):
    check(make_case(small_config(preset, loss=loss), labels=torch.tensor(labels)))


@KINDS
def test_no_rows_is_an_exact_zero_still_connected(loss, preset):
    case = make_case(small_config(preset, loss=loss), labels=torch.full((2, 5), -100))
    for dtype in (torch.float64, torch.float16):
        x = case.inputs(dtype)
        out = output(case, x, normalizer=torch.tensor(0))  # the tokens of a step in which all is ignored
        assert out.loss == out.ce == out.flow == 0 and out.loss.requires_grad
        out.loss.backward()
        for p in (x.hidden, x.weight, x.bias, *x.params.values()):
            assert p.grad is not None and p.grad.shape == p.shape and not p.grad.any()


HEAD = set(make_case(small_config()).inputs().params)
FROZEN = {
    "lm_head": {"weight", "bias"},
    "trunk": {"hidden"},
    "head": HEAD,
    "all but the lm_head": {"hidden", *HEAD},
    "all but the trunk": {"weight", "bias", *HEAD},
    "all but the head": {"hidden", "weight", "bias"},
    "two parameters": {"bias", "input_proj.0.weight"},
}


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "mtp"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen, loss):
    case = make_case(small_config(loss=loss))
    full = evaluate(ours(case), case.inputs())
    x = case.inputs()
    leaves = {name: getattr(x, name) for name in LEAVES} | x.params
    for name in frozen:
        leaves[name].requires_grad_(False)
    ours(case)(x).backward()
    for name, p in leaves.items():
        assert (p.grad is None) == (name in frozen), name
        assert p.grad is None or torch.allclose(p.grad, full[name], rtol=1e-11, atol=1e-13), name


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "cka", "mtp"])
def test_no_grad(loss):
    case = make_case(small_config(loss=loss))
    expected = evaluate(reference_sfr(case), case.inputs())["value"]
    with torch.no_grad(), Operations() as forward_only:
        out = output(case, case.inputs())
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=0)
    with Operations() as both:
        output(case, case.inputs()).loss.backward()
    assert 0 <= forward_only.flops < 0.6 * both.flops


@pytest.mark.parametrize("loss", ["flow", "mtp"])
def test_upstream_gradients_and_a_second_backward_change_nothing_saved(loss):
    case = make_case(small_config(loss=loss))
    x = case.inputs(torch.bfloat16)
    leaves = [x.hidden, x.weight, x.bias, *x.params.values()]
    before = [p.detach().clone() for p in leaves]
    value = ours(case)(x)
    first, doubled, last = (torch.autograd.grad(value, leaves, torch.tensor(u), retain_graph=True) for u in (3.0, 6, 3))
    # a power of two is exact in every dtype: nothing may differ
    assert all(torch.equal(a, c) and torch.equal(2 * a, b) for a, b, c in zip(first, doubled, last, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))
    assert torch.equal(ours(case)(case.inputs(torch.bfloat16)), value)  # the same call gives the same bits


@pytest.mark.parametrize("loss", ["flow", "cosine", "mtp"])
def test_a_second_derivative_is_refused(loss):
    # the gradients of a backward by hand are constants to autograd: better no second derivative than a wrong one
    case = make_case(small_config(loss=loss))
    x, scale = case.inputs(), torch.ones((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(scale * ours(case)(x), x.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "mtp"])
def test_micro_batches_with_the_normalizer_of_the_step_add_up(loss):
    labels, segments = make_labels()
    noise_id = torch.arange(labels.numel()).view_as(labels)
    whole = make_case(small_config(loss=loss), labels=labels, segments=segments, noise_id=noise_id)
    total = torch.tensor(float(whole.rows.num_ce))
    x, value = whole.inputs(), 0.0
    for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
        rows = SupervisedRows.from_labels(labels[part], whole.config, segments[part], noise_id[part])
        targets = rows.labels if loss == "mtp" else embed(rows, labels[part], 6)
        y = SimpleNamespace(**vars(x) | dict(hidden=x.hidden[part]))
        value = value + ours(replace(whole, rows=rows, targets=targets), normalizer=total)(y)
    assert_same(evaluate(lambda _: value, x), evaluate(ours(whole), whole.inputs()))


def test_batch_order_does_not_change_the_loss():
    labels, segments = make_labels()
    order = torch.tensor([3, 1, 0, 2])
    noise_id = torch.arange(labels.numel()).view_as(labels)
    case = make_case(small_config(), labels=labels, segments=segments, noise_id=noise_id)
    rows = SupervisedRows.from_labels(labels[order], case.config, segments[order], noise_id[order])
    moved = replace(case, rows=rows, targets=embed(rows, labels[order], 6), hidden=case.hidden[order])
    result = evaluate(ours(moved), moved.inputs())
    result["hidden"] = result["hidden"][order.argsort()]
    assert_same(result, evaluate(ours(case), case.inputs()))


def test_seed_and_times():
    case = make_case(small_config())
    value = ours(case)(case.inputs())
    assert torch.equal(ours(case, seed=torch.tensor([case.seed]))(case.inputs()), value)
    assert ours(case, seed=case.seed + 1)(case.inputs()) != value
    case.rows = case.rows.replace(time_index=(case.rows.rows % 3).int())
    check(case, times=torch.tensor([0.1, 0.5, 1.0]))


def test_lm_head_tied_to_the_embedding():
    case = make_case(small_config(), vocab=17)
    tokens = case.labels.clamp(min=0)
    table, other = (case.weight.clone().requires_grad_() for _ in range(2))
    head = case.inputs().head
    ours(case, bias=None)(SimpleNamespace(hidden=table[tokens].tanh(), weight=table, bias=None, head=head)).backward()
    params = case.inputs().params
    leaves = SimpleNamespace(hidden=other[tokens].tanh(), weight=other, bias=None, params=params)
    reference_sfr(case)(leaves).backward()
    torch.testing.assert_close(table.grad, other.grad, rtol=1e-10, atol=1e-14)


META = torch.zeros(1, device="meta")


def errors():
    case = make_case(small_config())
    nan = case.targets.clone()
    nan[0, 0] = float("inf")
    wrong = case.rows.replace(labels=torch.full_like(case.rows.labels, 17))
    return [
        (TypeError, "hidden", dict(hidden=[1.0])),
        (ValueError, "rows", dict(hidden=torch.zeros(4, 12, 12))),
        (ValueError, "weight", dict(weight=torch.zeros(17, 11))),
        (TypeError, "weight", dict(weight=torch.zeros(17, 12).double())),
        (ValueError, "weight", dict(weight=META.expand(17, 12))),
        (ValueError, "bias", dict(bias=torch.zeros(12))),
        (ValueError, "head", dict(head=make_head(11, 6, small_config(), torch.float32))),
        (ValueError, "head", dict(head=make_head(12, 5, small_config(), torch.float32))),
        (ValueError, "targets", dict(targets=case.targets[1:])),
        (ValueError, "targets", dict(targets=nan)),
        (ValueError, "targets", dict(targets=META.expand(case.targets.shape))),
        (ValueError, "labels .* got 17", dict(rows=wrong)),
        (TypeError, "config", dict(config=None)),
        (TypeError, "seed", dict(seed="0")),
        (TypeError, "normalizer", dict(normalizer=[1])),
        (ValueError, "normalizer", dict(normalizer=-1)),
        (ValueError, "softcap", dict(softcap=-1.0)),
        (ValueError, "backend", dict(backend="fast")),
        (ValueError, "return_stats", dict(backend="reference", return_stats=True)),
    ]


@pytest.mark.parametrize("error, name, arguments", errors())
def test_errors_name_the_argument(error, name, arguments):
    case = make_case(small_config())
    fitting = {name: getattr(case, name).float() for name in ("hidden", "weight", "targets")}
    fitting |= dict(head=deepcopy(case.head).float(), rows=case.rows, seed=0, config=case.config)
    sfr_loss(**fitting)
    with pytest.raises(error, match=name):
        sfr_loss(**fitting | arguments)


def test_losses_that_cannot_be_served():
    case = make_case(small_config(loss="cka"), labels=make_labels()[0][:3])  # two responses
    with pytest.raises(ValueError, match="4 responses"):
        ours(case)(case.inputs())
    case = make_case(small_config(loss="mtp"))
    with pytest.raises(TypeError, match="targets"):  # embeddings, where labels are decoded
        ours(replace(case, targets=torch.zeros(len(case.rows), 12)))(case.inputs())
    with pytest.raises(ValueError, match="target size 6"):  # the head's output must be a hidden state
        x = case.inputs()
        ours(case)(SimpleNamespace(**vars(x) | dict(head=make_head(12, 6, case.config))))

"""`flow_matching_loss`: value and every gradient of every kind, and noise that belongs to the row, not to the batch."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import (
    SEED,
    LossCase,
    assert_same,
    embed,
    evaluate,
    judge,
    make_case,
    make_head,
    make_labels,
    reference_flow,
    small_config,
)

from sfr_kernels.kernels.backend import kernels_of

kernels = kernels_of("torch")

from sfr_kernels import SupervisedRows, flow_matching_loss, reference
from sfr_kernels.kernels.flow import FlowPath
from sfr_kernels.ops.times import draw_times, seed_tensor, sequence_ids, step_seed

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = pytest.mark.parametrize("preset", ["default", "official"])


def our_flow(case: LossCase, **overrides):
    """x → the library's loss on the case."""

    def run(x):
        arguments = (x.hidden, x.head, case.rows, case.targets)
        return flow_matching_loss(*arguments, **dict(seed=case.seed, config=case.config) | case.options | overrides)

    return run


def check(case: LossCase, **overrides) -> dict[str, torch.Tensor]:
    exact = evaluate(reference_flow(case, **overrides), case.inputs(), upstream=-1.7)
    assert_same(evaluate(our_flow(case, **overrides), case.inputs(), upstream=-1.7), exact)
    return exact


@BOTH
@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "cka"])
def test_every_kind_in_float64(loss, preset):
    case = make_case(small_config(preset, loss=loss))
    exact = check(case)
    assert exact["value"] != 0 and exact["hidden"].any()
    assert loss == "cka" or all(exact[name].any() for name in ("input_proj.0.weight", "output_proj.bias"))
    check(case, normalizer=torch.tensor(11.0, dtype=torch.float64))
    result = evaluate(our_flow(case, backend="reference"), case.inputs(), upstream=-1.7)
    assert_same(result, exact)


@BOTH
@pytest.mark.parametrize("target_size", [2, 5, 7])  # one frequency; odd: a padded sinusoid; not whole Philox blocks
def test_odd_target_sizes(target_size, preset):
    check(make_case(small_config(preset), target_size=target_size))


@BOTH
@pytest.mark.parametrize("num_layers", [2, 5])  # no residual block, three of them
def test_depths(num_layers, preset):
    check(make_case(small_config(preset, num_layers=num_layers)))


LABELS = {
    "one row": [[-100, -100, 3, -100]],
    "one token in a sequence": [[-100, -100, 3]],
    "the first token alone, which the default cannot predict": [[3, -100, -100]],
    "no rows": [[-100] * 5] * 2,
}


@BOTH
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("loss", ["flow", "mse", "cosine"])
def test_few_rows(labels, preset, loss):
    case = make_case(small_config(preset, loss=loss), labels=torch.tensor(labels))
    exact = check(case)
    if case.rows.num_flow == 0:
        assert all((value == 0).all() for value in exact.values())


@BOTH
@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "cka"])
def test_no_rows_is_an_exact_zero_still_connected(loss, preset):
    case = make_case(small_config(preset, loss=loss), labels=torch.full((2, 5), -100))
    for dtype in (torch.float64, torch.bfloat16):
        x = case.inputs(dtype)
        value = our_flow(case, normalizer=torch.tensor(0))(x)  # the tokens of a step in which all is ignored
        assert value == 0 and value.requires_grad and value.dtype == torch.promote_types(dtype, torch.float32)
        value.backward()
        for p in (x.hidden, *x.params.values()):
            assert p.grad is not None and p.grad.shape == p.shape and not p.grad.any()


def sixteen_bit_case(preset: str) -> LossCase:
    """Enough rows for errors to be statistics, and times and angles that 16 bit can hold, or eager would drown in t."""
    case = make_case(
        small_config(preset, time_scale=1.0, width=40), length=41, hidden_size=32, target_size=24, vocab=23
    )
    case.rows = case.rows.replace(time_index=(case.rows.noise_id % 4).int())
    case.options = dict(times=torch.tensor([0.125, 0.375, 0.625, 0.875]))
    return case


@BOTH
@pytest.mark.parametrize("dtype, k", [(torch.float32, 2.0), (torch.bfloat16, 1.1), (torch.float16, 1.1)])
def test_as_good_as_eager(dtype, k, preset):
    judge(sixteen_bit_case(preset), our_flow, reference_flow, k, dtype)


def test_float32_head_beside_bfloat16_hidden_states():
    def eager(case):
        def run(x):
            params = {name: p.to(x.hidden.dtype) for name, p in x.params.items()}
            return reference_flow(case)(SimpleNamespace(hidden=x.hidden, params=params))

        return run

    judge(sixteen_bit_case("default"), our_flow, eager, 1.1, torch.bfloat16, head_dtype=torch.float32)


@pytest.mark.parametrize("dtype, head_dtype", [("float64", "float32"), ("float32", "float64"), ("bfloat16", "float64")])
def test_a_head_of_another_width_than_the_hidden_states(dtype, head_dtype):
    case = sixteen_bit_case("default")
    value = our_flow(case)(case.inputs(getattr(torch, dtype), getattr(torch, head_dtype)))
    exact = reference_flow(case)(case.inputs())
    torch.testing.assert_close(value.double(), exact, rtol=2.0**-7 if dtype == "bfloat16" else 1e-5, atol=0)


def test_autocast():
    def under_autocast(function):
        def run(case):
            def call(x):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.hidden.dtype == torch.float32):
                    return function(case)(x)

            return call

        return run

    # eager adds biases and residuals to its 16-bit products in float32, and keeps the sums
    judge(sixteen_bit_case("default"), under_autocast(our_flow), under_autocast(reference_flow), 1.5, torch.float32)


@pytest.mark.parametrize("loss", ["flow", "cosine"])
def test_upstream_gradients_and_a_second_backward_change_nothing_saved(loss):
    case = make_case(small_config(loss=loss))
    x = case.inputs(torch.bfloat16)
    leaves = [x.hidden, *x.params.values()]
    before, targets = [p.detach().clone() for p in leaves], case.targets.clone()
    value = our_flow(case)(x)
    first, doubled, last = (torch.autograd.grad(value, leaves, torch.tensor(u), retain_graph=True) for u in (3.0, 6, 3))
    # a power of two is exact in every dtype: nothing may differ
    assert all(torch.equal(a, c) and torch.equal(2 * a, b) for a, b, c in zip(first, doubled, last, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True)) and torch.equal(targets, case.targets)


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine"])
def test_frozen_parts_get_no_gradient_and_change_no_other(loss):
    case = make_case(small_config(loss=loss))
    full = evaluate(our_flow(case), case.inputs())
    names = set(case.inputs().params)
    for frozen in (
        {"hidden"},
        names,
        {"time_embed.mlp.0.weight", "res_blocks.1.norm.bias"},
        names - {"output_proj.bias"},
    ):
        x = case.inputs()
        leaves = {"hidden": x.hidden, **x.params}
        for name in frozen:
            leaves[name].requires_grad_(False)
        our_flow(case)(x).backward()
        for name, p in leaves.items():
            assert (p.grad is None) == (name in frozen), name
            assert p.grad is None or torch.allclose(p.grad, full[name], rtol=1e-11, atol=1e-13), name


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "cka"])
def test_no_grad(loss):
    case = make_case(small_config(loss=loss))
    with torch.no_grad():
        value = our_flow(case)(case.inputs())
    assert not value.requires_grad
    torch.testing.assert_close(value, evaluate(reference_flow(case), case.inputs())["value"], rtol=1e-10, atol=0)


def test_explicit_times_and_times_from_the_seed():
    case = make_case(small_config())
    drawn, index = reference.draw_times(case.rows, case.seed, case.config)
    from_seed = check(case)
    case.rows = case.rows.replace(time_index=index.int())
    assert_same(check(case, times=drawn), from_seed)
    assert check(case, times=drawn.flip(0))["value"] != from_seed["value"]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_reference_takes_what_the_others_take(backend):
    """Seeds of 64 bits, a normalizer of 0 where there are no rows; float32 comes back from 16 bit."""
    case = make_case(small_config())
    losses = [our_flow(case, seed=seed, backend=backend)(case.inputs()) for seed in (2**64 - 1, -1)]
    assert losses[0] == losses[1]
    assert our_flow(case, backend=backend)(case.inputs(torch.bfloat16)).dtype == torch.float32
    empty = make_case(small_config(), labels=torch.full((2, 7), -100))
    assert our_flow(empty, normalizer=0, backend=backend)(empty.inputs()) == 0


def test_seed_is_an_int_or_a_tensor():
    case = make_case(small_config())
    value = our_flow(case)(case.inputs())
    for tensor in (torch.tensor(SEED), torch.tensor([SEED])):  # no dimension, or one
        assert torch.equal(our_flow(case, seed=tensor)(case.inputs()), value)
    for other in (SEED + 1, SEED + 2**32, SEED - 2**32):
        assert our_flow(case, seed=other)(case.inputs()) != value


def times_of(rows: SupervisedRows, seed: int, config) -> tuple[torch.Tensor, torch.Tensor]:
    """The times of a step, and the index of each flow row."""
    n, index, identity = rows.num_flow, None, None
    if config.time_sampling == "sequence":
        index, identity = rows.time_index[:n], sequence_ids(rows)
    seed = seed_tensor(seed, rows.device)
    return draw_times(leaves, rows.noise_id[:n], index, identity, seed, config.num_times)


def paths(labels, segments, noise_id, keep=slice(None)) -> dict[int, tuple[float, torch.Tensor, torch.Tensor]]:
    """{identity: (time, x_t, u)} of the flow rows that `keep` selects."""
    config = small_config()
    rows = SupervisedRows.from_labels(labels, config, segments, noise_id)
    times, index = times_of(rows, SEED, config)
    flow = torch.arange(rows.num_flow)[keep]
    identity, index = rows.noise_id[flow], index[flow]
    path = FlowPath(
        embed(rows, labels, 7), times, identity, rows.anchor[flow], index, seed_tensor(SEED, rows.device), 2.0, 0.5
    )
    x_t, u = kernels.flow_path(path, torch.float32)
    return dict(zip(identity.tolist(), zip(times[index].tolist(), x_t, u, strict=True), strict=True))


def test_noise_and_time_of_a_row_do_not_depend_on_its_batch():
    labels, segments = make_labels()
    noise_id = torch.arange(labels.numel()).view_as(labels) + 2**40
    whole = paths(labels, segments, noise_id)
    order = torch.tensor([3, 1, 0, 2])
    others = [
        paths(labels[order], segments[order], noise_id[order]),  # another order of the sequences
        paths(labels[3:], segments[3:], noise_id[3:]),  # fewer of them
        paths(labels, segments, noise_id, slice(1, None, 3)),  # another compaction: some rows of the same batch
    ]
    assert len(whole) > 12 and len(others[0]) == len(whole)
    for other in others:
        for identity, (t, x_t, u) in other.items():
            assert t == whole[identity][0]
            assert torch.equal(x_t, whole[identity][1]) and torch.equal(u, whole[identity][2])
    # and rows of different identity differ
    assert len({x_t[0].item() for _, x_t, _ in whole.values()}) == len(whole)


@BOTH
def test_flow_path_is_its_definition(preset):
    case = make_case(small_config(preset, source_std=0.7))
    rows, n = case.rows, case.rows.num_flow
    times, index = times_of(rows, case.seed, case.config)
    expected_times, expected_index = reference.draw_times(rows, case.seed, case.config)
    assert torch.equal(times, expected_times) and torch.equal(index.long(), expected_index[:n])
    x_0 = 0.7 * reference.gaussian_noise(case.seed, rows.noise_id[:n], 6).double()
    x_1 = 1.9 * case.targets[rows.anchor[:n].long()].double()
    t = times[index].double()[:, None]
    seed = seed_tensor(case.seed, rows.device)
    path = FlowPath(case.targets, times, rows.noise_id[:n], rows.anchor[:n], index, seed, 1.9, 0.7)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
        x_t, u = kernels.flow_path(path, dtype)
        assert x_t.dtype == u.dtype == dtype
        torch.testing.assert_close(x_t.double(), (1 - t) * x_0 + t * x_1, rtol=rtol, atol=rtol / 10)
        torch.testing.assert_close(u.double(), x_1 - x_0, rtol=rtol, atol=rtol / 10)


def test_mse_is_flow_from_a_point_at_time_zero():
    mse = make_case(small_config(loss="mse"))
    flow = replace(mse, config=replace(mse.config, loss="flow", source_std=0.0))
    flow.rows = mse.rows.replace(time_index=torch.zeros(len(mse.rows), dtype=torch.int32))
    result = evaluate(our_flow(flow, times=torch.zeros(1)), flow.inputs())
    assert_same(result, evaluate(our_flow(mse), mse.inputs()), rtol=1e-12)


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine"])
def test_micro_batches_with_the_normalizer_of_the_step_add_up(loss):
    labels, segments = make_labels()
    noise_id = torch.arange(labels.numel()).view_as(labels)
    whole = make_case(small_config(loss=loss), labels=labels, segments=segments, noise_id=noise_id)
    total = torch.tensor(float(whole.rows.num_ce))
    x, value = whole.inputs(), 0.0
    for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
        rows = SupervisedRows.from_labels(labels[part], whole.config, segments[part], noise_id[part])
        y = SimpleNamespace(hidden=x.hidden[part], head=x.head)
        value = value + our_flow(replace(whole, rows=rows, targets=embed(rows, labels[part], 6)), normalizer=total)(y)
    assert_same(evaluate(lambda _: value, x), evaluate(our_flow(whole), whole.inputs()))


def test_hidden_may_be_flat_or_strided():
    case = make_case(small_config())
    x = case.inputs()
    shaped = our_flow(case)(x)
    x.hidden = x.hidden.detach().flatten(0, 1)
    assert torch.equal(our_flow(case)(x), shaped)
    strided = case.inputs()
    strided.hidden = strided.hidden.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(our_flow(case)(strided), shaped)


def test_step_seeds_are_63_bit_and_all_different():
    seeds = [step_seed(seed, step) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for step in range(1000)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert sum(bin(s).count("1") for s in seeds) / len(seeds) == pytest.approx(31.5, abs=0.3)


META = torch.zeros(1, device="meta")


def errors():
    nan = make_case(small_config()).targets.clone()
    nan[1, 2] = float("nan")
    count = len(nan)
    return [
        (TypeError, "hidden", dict(hidden=torch.zeros(4, 13, 12, dtype=torch.int64))),
        (ValueError, "rows", dict(hidden=torch.zeros(4, 12, 12))),
        (ValueError, "head .* hidden size 11", dict(head=make_head(11, 6, small_config(), torch.float32))),
        (ValueError, "head .* target size 5", dict(head=make_head(12, 5, small_config(), torch.float32))),
        (ValueError, "head .* time_scale", dict(head=make_head(12, 6, small_config(time_scale=1.0), torch.float32))),
        (ValueError, "head .* hidden_scale", dict(head=make_head(12, 6, small_config(hidden_scale=1), torch.float32))),
        (TypeError, "head", dict(head=None)),
        (TypeError, "head", dict(head=torch.nn.Linear(12, 6))),
        (TypeError, "rows", dict(rows=torch.zeros(3))),
        (ValueError, "rows", dict(rows=make_case(small_config()).rows.to("meta"))),
        (TypeError, "config", dict(config={})),
        (TypeError, "targets", dict(targets=torch.zeros(count, 6, dtype=torch.int64))),
        (ValueError, "targets", dict(targets=torch.zeros(count * 6))),
        (ValueError, "target", dict(targets=torch.zeros(count, 7))),  # another width than the head's
        (ValueError, "targets", dict(targets=torch.zeros(count + 1, 6))),
        (ValueError, "targets .* NaN", dict(targets=nan)),
        (ValueError, "targets", dict(targets=META.expand(count, 6))),
        (TypeError, "seed", dict(seed=1.0)),
        (TypeError, "seed", dict(seed=True)),
        (TypeError, "seed", dict(seed=torch.zeros(2, dtype=torch.int64))),
        (TypeError, "seed", dict(seed=torch.zeros(1, dtype=torch.int32))),
        (ValueError, "time_index", dict(times=torch.zeros(1))),  # the default preset leaves it to the seed
        (ValueError, "times", dict(times=torch.zeros(0))),
        (ValueError, "times", dict(times=torch.zeros(1, 1))),
        (TypeError, "times", dict(times=torch.zeros(1, dtype=torch.int64))),
        (TypeError, "normalizer", dict(normalizer="tokens")),
        (TypeError, "normalizer", dict(normalizer=True)),
        (ValueError, "normalizer", dict(normalizer=float("nan"))),
        (ValueError, "normalizer", dict(normalizer=-1)),
        (ValueError, "normalizer", dict(normalizer=torch.ones(3))),
    ]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("error, name, arguments", errors())
def test_errors_name_the_argument(error, name, arguments, backend):
    case = make_case(small_config())
    fitting = dict(hidden=case.hidden.float(), head=deepcopy(case.head).float(), rows=case.rows, targets=case.targets)
    fitting |= dict(seed=0, config=case.config, backend=backend)
    flow_matching_loss(**fitting)
    with pytest.raises(error, match=name):
        flow_matching_loss(**fitting | arguments)


def test_losses_that_cannot_be_served():
    with pytest.raises(ValueError, match="backend"):
        our_flow(make_case(small_config()), backend="fast")(make_case(small_config()).inputs())
    case = make_case(small_config(loss="mtp"))
    with pytest.raises(ValueError, match="mtp"):
        our_flow(case)(case.inputs())
    case = make_case(small_config())
    with pytest.raises(ValueError, match="time_sampling"):  # rows without a sequence's time
        our_flow(case, config=replace(case.config, time_sampling="sequence"))(case.inputs())

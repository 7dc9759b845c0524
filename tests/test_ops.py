"""The public functions as operators: they trace whole under torch.compile with dynamic shapes, and keep its rules."""

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from cases import LossCase, assert_same, evaluate, make_case, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from sfr_kernels import SupervisedRows, flow_matching_loss, linear_cross_entropy, sfr_loss
from sfr_kernels.ops.cross_entropy import linear_cross_entropy_op, supervised_rows
from sfr_kernels.ops.flow_loss import flow_arguments, flow_loss_op
from sfr_kernels.ops.gradients import scale_gradients
from sfr_kernels.ops.sfr_loss import sfr_loss_op
from sfr_kernels.ops.times import seed_tensor
from sfr_kernels.ops.velocity_head import velocity_head_op

pytestmark = pytest.mark.usefixtures("one_thread")


def run_sfr(x: SimpleNamespace, case: LossCase, rows: SupervisedRows, targets, seed):
    return sfr_loss(x.hidden, x.weight, x.head, rows, targets, seed=seed, config=case.config, bias=x.bias).loss


def run_sfr_with_statistics(x, case, rows, targets, seed):
    options = dict(seed=seed, config=case.config, bias=x.bias, chunk_rows=5, return_stats=True)
    loss, *_, stats = sfr_loss(x.hidden, x.weight, x.head, rows, targets, **options)
    sums = stats.lse.sum() + (stats.entropy * stats.correct).sum() + stats.predicted.sum()
    return loss + sums / len(stats.lse)


def run_flow(x, case, rows, targets, seed):
    return flow_matching_loss(x.hidden, x.head, rows, targets, seed=seed, config=case.config)


def run_cross_entropy(x, case, rows, targets, seed):
    return linear_cross_entropy(x.hidden, x.weight, case.labels, bias=x.bias, shift=True)


def run_cross_entropy_of_rows(x, case, rows, targets, seed):
    options = dict(bias=x.bias, label_smoothing=0.1, chunk_rows=5, return_stats=True)
    loss, stats = linear_cross_entropy(x.hidden, x.weight, rows, **options)
    return loss + stats.entropy.sum()


def run_row_losses(x, case, rows, targets, seed):
    losses, stats = linear_cross_entropy(
        x.hidden, x.weight, case.labels, shift=True, reduction="none", return_stats=True, softcap=3.0
    )
    return losses.square().sum() + stats.lse.sum()


COMPILED = {
    "flow": (run_flow, "flow", "default"),
    "flow, official": (run_flow, "flow", "official"),
    "mse": (run_flow, "mse", "default"),
    "cosine": (run_flow, "cosine", "default"),
    "cka": (run_flow, "cka", "default"),
    "sfr": (run_sfr, "flow", "default"),
    "sfr, statistics": (run_sfr_with_statistics, "flow", "official"),
    "sfr, mtp": (run_sfr, "mtp", "default"),
    "cross-entropy": (run_cross_entropy, "flow", "default"),
    "cross-entropy of rows": (run_cross_entropy_of_rows, "flow", "default"),
    "row losses and statistics": (run_row_losses, "flow", "default"),
}


@pytest.mark.parametrize("function, loss, preset", COMPILED.values(), ids=COMPILED.keys())
def test_compiles_whole_with_dynamic_shapes(function, loss, preset):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (13, 17):
        case = make_case(small_config(preset, loss=loss), length=length)
        seed = torch.tensor([length])
        results = [
            evaluate(lambda x, f=f, c=case, s=seed: f(x, c, c.rows, c.targets, s), case.inputs())
            for f in (function, compiled)
        ]
        assert_same(*results[::-1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled for another length"


def test_inductor_takes_another_seed_without_compiling_again():
    """From the second one on a seed is a symbol, for which inductor has 64 bits and no more."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda seed: seed_tensor(seed, torch.device("cpu")) ^ 1, fullgraph=True)
    for seed in (3, 4, -7, 2**62 + 12345, 2**63 - 1):
        assert compiled(seed).item() == seed ^ 1


def losses_of_a_step(x, case, step: int, value: float):
    """Every number that may change from one step of training to the next."""
    flow = dict(rows=case.rows, targets=case.targets, seed=step, config=case.config, normalizer=value + 1)
    loss = flow_matching_loss(x.hidden, x.head, **flow)
    loss = loss + sfr_loss(x.hidden, x.weight, x.head, flow_weight=value, **flow).loss
    return loss + linear_cross_entropy(x.hidden, x.weight, case.labels, shift=True, normalizer=value)


@pytest.mark.parametrize("loss", ["flow", "cosine", "cka"])
def test_the_numbers_of_a_step_are_in_no_graph(loss):
    """Else every step has one of its own, until dynamo has had enough of them."""
    torch._dynamo.reset()
    case = make_case(small_config(loss=loss))
    x = case.inputs()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, graphs = torch.compile(losses_of_a_step, backend=counter, fullgraph=True), []
    for step in range(2, 7):
        numbers = step, 0.1 * step
        run = [evaluate(lambda x, f=f, n=numbers: f(x, case, *n), x) for f in (compiled, losses_of_a_step)]
        assert_same(*run)
        graphs.append(counter.frame_count)
    assert graphs == [1, *[graphs[1]] * 4]


def operators():
    """Each operator with arguments of a small call: every gradient needed, and none."""
    for loss, preset in (("flow", "default"), ("flow", "official"), ("mse", "default")):
        case = make_case(small_config(preset, loss=loss, num_layers=3))
        x, rows = case.inputs(), case.rows
        norm = torch.tensor(7.0, dtype=torch.float64)
        arguments = flow_arguments(rows, case.targets, None, 3, case.config, x.head)
        index = rows.rows[: rows.num_flow]
        for need in (True, False):
            params = [p.detach().requires_grad_(need) for p in x.head.parameters()]
            hidden = x.hidden.detach().flatten(0, 1).requires_grad_(need)
            decoder = [t.detach().requires_grad_(need) for t in (x.weight, x.bias)]
            model, labels = (hidden, *decoder, params, rows.rows), rows.labels[rows.ce_start :]
            scales, logits = (norm, norm, norm / 7), (None, 1.0, 0.0, 0.0, 0, None, need, False)
            yield (
                f"flow_loss, {loss}, {preset}, {need}",
                flow_loss_op,
                (hidden, params, index, rows.token_row, norm, *arguments, need, need, "torch"),
            )
            yield (
                f"sfr_loss, {loss}, {preset}, {need}",
                sfr_loss_op,
                (*model, labels, rows.token_row, *scales, *logits, *arguments, [need] * 4, "torch"),
            )
    time_index = torch.zeros(5, dtype=torch.int32)
    x_t = torch.randn(5, 6, dtype=torch.float64)
    for need in (True, False):
        h, *params = (t.detach().requires_grad_(need) for t in (hidden[:5], *params))
        for name, strided in (("", h), (" of columns", h.detach().T.contiguous().T.requires_grad_(need))):
            yield (
                f"velocity_head{name}, {need}",
                velocity_head_op,
                (strided, x_t, torch.rand(2), time_index, params, 2.0, 0.3, need, "torch"),
            )
    labels = case.labels.flatten()
    for ignore in (-100, None):
        for per_row in (True, False):
            kept = labels.clamp(min=0) if ignore is None else labels
            options = (None, 1.0, 0.0, 0.0, torch.float64, 5, None, True, False, "", 0, [True] * 3, "torch")
            given = kept, torch.rand(len(kept)), None, None
            yield (
                f"linear_cross_entropy, {ignore}, {per_row}",
                linear_cross_entropy_op,
                (hidden, x.weight, x.bias, *given, norm, ignore, per_row, *options),
            )
    for per_row in (True, False):
        chosen, token_row = supervised_rows(labels, -100)
        given = labels[chosen], torch.rand(len(chosen)), chosen, token_row
        yield (
            f"linear_cross_entropy, rows, {per_row}",
            linear_cross_entropy_op,
            (hidden, x.weight, x.bias, *given, norm, None, per_row, *options),
        )
    dh, vectors = torch.randn(5, 4), [torch.randn(6), torch.randn(7)]
    token_row = torch.tensor([3, -1, 4, 0, 9, 1, 2], dtype=torch.int32)
    half = torch.bfloat16
    yield (
        "scale_gradients",
        scale_gradients,
        (norm.float(), norm.float(), dh, token_row, vectors, vectors, half, torch.float32, "torch"),
    )


OPERATORS = list(operators())


@pytest.mark.parametrize("operator, arguments", [o[1:] for o in OPERATORS], ids=[o[0] for o in OPERATORS])
def test_opcheck(operator, arguments):
    torch.library.opcheck(operator, arguments)


class Seen(TorchDispatchMode):
    """The library's operators that are dispatched while it is on."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "sfr_kernels":
            self.names.append(function._opname)
        return function(*arguments, **(options or {}))


CALLS = [("flow_loss", run_flow), ("sfr_loss", run_sfr), ("linear_cross_entropy", run_row_losses)]


@pytest.mark.parametrize("name, function", CALLS)
def test_a_mode_sees_the_operator_and_its_bits_are_those_of_a_plain_call(name, function):
    case = make_case(small_config("default"))
    run = lambda x: function(x, case, case.rows, case.targets, torch.tensor([3]))  # noqa: E731
    plain = evaluate(run, case.inputs())
    with Seen() as seen:
        watched = evaluate(run, case.inputs())
    assert seen.names[0] == name
    assert all(torch.equal(plain[key], watched[key]) for key in plain)


def test_recomputing_in_backward_gives_the_same_gradients():
    case = make_case(small_config("default"))

    def run(x):
        function = lambda h: run_sfr(SimpleNamespace(**vars(x) | dict(hidden=h)), case, case.rows, case.targets, 3)  # noqa: E731
        return torch.utils.checkpoint.checkpoint(function, x.hidden, use_reentrant=False)

    plain = evaluate(lambda x: run_sfr(x, case, case.rows, case.targets, 3), case.inputs())
    assert_same(evaluate(run, case.inputs()), plain)

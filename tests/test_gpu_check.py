"""What `make gpu-check` judges with, on the CPU: an honest peer, an oracle in pieces, and verdicts that can fail."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import assert_same, evaluate, make_case, reference_flow, small_config

from benchmarks.check import gpu_check, results
from benchmarks.harness import composites, errors, problems, timing
from benchmarks.harness.floor import BLOCKS, Gemm, cross_entropy_gemms, factors_of, flow_gemms, multiply
from benchmarks.peers.published_loss import PublishedFlowLoss
from sfr_kernels import atomic, flow_matching_loss, reference

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = gpu_check.TINY


# ---------------------------------------------------------------------------------------------------------------------
# The published loss


def every_position(case):
    """x_1, x_0 (B, L, d) and weight (B, L) in float64, zero where there is no flow row."""
    rows, config = case.rows, case.config
    n, size = rows.num_flow, case.head.shape.target_size
    x_1, x_0 = (torch.zeros(case.labels.numel(), size, dtype=torch.float64) for _ in range(2))
    weight = torch.zeros(case.labels.numel(), dtype=torch.float64)
    x_1[rows.rows[:n]] = config.scale_for(size) * case.targets.double()[rows.anchor[:n].long()]
    x_0[rows.rows[:n]] = config.source_std * reference.gaussian_noise(case.seed, rows.noise_id[:n], size).double()
    weight[rows.rows[:n]] = rows.weight[:n].double()
    shape = case.labels.shape
    return x_1.view(*shape, size), x_0.view(*shape, size), weight.view(shape)


# no residual block, two of them; an odd size, which pads the sinusoid
@pytest.mark.parametrize("num_layers, target_size", [(2, 6), (4, 7)])
def test_the_published_loss_computes_what_ours_does(num_layers, target_size):
    case = make_case(small_config("official", num_layers=num_layers, source_std=0.7), target_size=target_size)
    x_1, x_0, weight = every_position(case)
    times, _ = reference.draw_times(case.rows, case.seed, case.config)
    t = times.double()
    s = t[:, None, None]
    peer = PublishedFlowLoss(case.hidden.shape[-1], target_size, case.config.width, num_layers).double()
    peer.load_state_dict(case.head.state_dict())

    x = case.inputs()
    theirs = SimpleNamespace(hidden=x.hidden, weight=x.weight, bias=x.bias, params=dict(peer.named_parameters()))
    found = evaluate(lambda y: peer.loss(y.hidden, (1 - s) * x_0 + s * x_1, x_1 - x_0, t, weight), theirs)
    ours = evaluate(
        lambda y: flow_matching_loss(y.hidden, y.head, case.rows, case.targets, seed=case.seed, config=case.config),
        case.inputs(),
    )
    assert found["hidden"].any() and found["time_embed.mlp.0.weight"].any()
    assert_same(found, evaluate(reference_flow(case), case.inputs()), rtol=1e-9)
    assert_same(ours, found, rtol=1e-9)


def test_the_published_loss_draws_one_time_for_a_sequence_and_noise_for_every_position():
    peer = PublishedFlowLoss(5, 6, 8, 3, source_std=0.0)
    seen = []
    peer.loss = lambda hidden, x_t, u, t, weight: seen.append((x_t, u, t))
    x_1 = torch.randn(3, 4, 6)
    peer(torch.randn(3, 4, 5), x_1, torch.ones(3, 4))
    peer.source_std = 1.0
    peer(torch.randn(3, 4, 5), x_1, torch.ones(3, 4))
    (x_t, u, t), (_, noisy, again) = seen
    assert t.shape == (3,) and not torch.equal(t, again)
    torch.testing.assert_close(x_t, t[:, None, None] * x_1)
    assert torch.equal(u, x_1) and (x_1 - noisy).flatten().unique().numel() == x_1.numel()


# ---------------------------------------------------------------------------------------------------------------------
# Problems, errors, floor


@pytest.mark.parametrize("op", problems.OPS)
def test_the_oracle_is_the_reference_in_pieces(op, monkeypatch):
    monkeypatch.setattr(problems, "ORACLE_LOGITS", 7 * TINY.vocab)
    problem = problems.Problem(op, TINY, torch.bfloat16, CPU).in_float64()
    pieces = list(problem.oracle())
    assert len(pieces) >= 1 + 3 * (op != "flow_matching_loss")
    exact = errors.exact_outputs(problem)
    loss = problem.loss("reference", judged=True)
    whole = [loss, *torch.autograd.grad(loss * errors.UPSTREAM, list(problem.leaves.values()))]
    for found, wanted in zip(exact, whole, strict=True):
        assert found.dtype == torch.float64 and wanted.any()
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_frozen_decoder_gets_no_gradient_and_every_draw_is_another():
    shape = replace(TINY, frozen=True)
    problem = problems.Problem("sfr_loss", shape, torch.float32, CPU)
    assert "weight" not in problem.leaves and "hidden" in problem.leaves
    assert len(problem.run("torch")) == 1 + len(problem.leaves)
    losses = []
    for draw in (0, 1, 0):
        problem.redraw(draw)
        losses.append(problem.loss("torch").item())
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize(
    "ours, eager, exact, wrong",
    [
        (1.4, 1.0, 1.0, False),
        (1.6, 1.0, 1.0, True),
        (2.0**-23, 0.0, 1.0, False),  # the floor
        (2.0**-21, 0.0, 1.0, True),
        (0.0, 0.0, 0.0, False),  # nothing, and rightly so
        (1.0, 0.0, 0.0, True),
        (math.nan, 1.0, 1.0, True),
        (math.inf, math.inf, 1.0, True),
        (0.05, math.inf, 1.0, False),  # eager overflowed, ours did not
        (0.1, math.inf, 1.0, True),  # nor is it right
    ],
)
def test_the_verdict(ours, eager, exact, wrong):
    error = errors.Error(ours**2, eager**2, exact**2)
    assert (error.ratio > 1) == wrong
    json.dumps(error.to_dict(), allow_nan=False)


def test_a_shape_too_large_for_eager_torch_is_judged_all_the_same(monkeypatch):
    problem = problems.Problem("linear_cross_entropy", TINY, torch.float32, CPU)
    real = problem.loss

    def loss(backend, **options):
        if backend == "reference":
            raise torch.OutOfMemoryError("planted")
        return real(backend, **options)

    monkeypatch.setattr(problem, "loss", loss)
    found, raised = errors.judge(problem, ["torch"], draws=1)
    assert not raised
    assert all(e.to_dict()["eager"] is None and 0 < e.ratio < 1e-3 for e in found["torch"].values())


def test_the_floor_counts_the_products_of_supervised_rows():
    def milliseconds(n, hidden_size):
        return 1e3 * sum(g.flops for g in flow_gemms(n, hidden_size, 1024, 1024, 3)) / 700e12

    # worked out by hand: H/1024 + 3 products of (n, 1024, 1024) forward, all of them for dW, all but x_t's for dx
    assert milliseconds(4 * 1536, 4096) == pytest.approx(2 * 6144 * 1024**2 * (7 + 7 + 6) / 700e9)
    assert milliseconds(8 * 1536, 5120) == pytest.approx(2 * 12288 * 1024**2 * (8 + 8 + 7) / 700e9)
    one = 2 * 4096 * 4096 * 128256
    assert sum(g.flops for g in cross_entropy_gemms(4096, 4096, 128256, True)) == 3 * one
    assert sum(g.flops for g in cross_entropy_gemms(4096, 4096, 128256, False)) == 2 * one


@pytest.mark.parametrize("transposed", ["", "a", "b"])
def test_blocks_of_rows_make_the_same_product(transposed):
    a, b = factors_of(Gemm(7, 5, 6, transposed), torch.float64, CPU)
    out = torch.empty(7, 6, dtype=torch.float64)
    for blocks in BLOCKS:
        multiply(a, b, out.zero_(), blocks)
        torch.testing.assert_close(out, a @ b)


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def test_candidates_take_turns():
    calls, prepared = [], []
    candidates = {
        "a": timing.Candidate(lambda: calls.append("a"), lambda: prepared.append(len(calls))),
        "b": timing.Candidate(lambda: calls.append("b")),
    }
    found = timing.compare(candidates, CPU, seconds=0.0)
    assert found["a"].runs == found["b"].runs == timing.LEAST_RUNS
    turns = "".join(calls[2 * timing.WARM_UP :])
    assert turns == "abba" * (timing.LEAST_RUNS // 2)
    assert len(prepared) == calls.count("a")
    assert found["a"].ms >= 0 and found["a"].spread_ms >= 0


# ---------------------------------------------------------------------------------------------------------------------
# Result files and tables

ROW = dict(op="flow_matching_loss", label="B2 L512 H4096 75%", dtype="bfloat16", shape={}, ok=True, failure=None)
OURS = ROW | dict(
    candidate="triton", worst="hidden", errors={"hidden": dict(ours=0.001234, eager=0.002, norm=3.0, ratio=0.41)},
    ms=0.4, spread_ms=0.01, floor_ms=0.0625,
)  # fmt: skip
FAILED = ROW | dict(candidate="torch", ok=False, failure="RuntimeError: out of memory")


def test_the_table():
    lines = results.table([OURS, FAILED]).splitlines()
    assert len({len(line) for line in lines}) == 1  # lined up
    header, ours, failed = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, 2, 3))
    ours = dict(zip(header, ours, strict=True))
    assert ours["error"] == "1.2e-03" and ours["eager's"] == "2.0e-03" and ours["worst at"] == "hidden"
    assert ours["ms"] == "0.400" and ours["of floor"] == "16%" and ours[""] == "ok"
    assert failed[header.index("error")] == "" and failed[-1] == "FAILED"
    assert "floor ms" not in results.table([FAILED])  # a column that nothing fills


def test_a_result_file_holds_every_row_at_once_and_never_half_of_one(tmp_path, monkeypatch):
    file = results.ResultFile(tmp_path / "results", "gpu_check", CPU)
    file.add("steps", dict(name="GPU tests", ok=True, exit_code=0, seconds=61.0, detail="9 passed"))
    file.add("rows", OURS)
    before = file.path.read_text()
    content = results.read(file.path)
    assert content == file.content and content["rows"][0] == OURS
    assert content["environment"]["torch"] == torch.__version__ and content["environment"]["capability"] is None

    with pytest.raises(ValueError):
        file.add("rows", ROW | dict(ms=math.nan))  # strict JSON has no such number

    def fail(*_):
        raise OSError("disk full")

    file.content["rows"].pop()
    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(OSError):
        file.add("rows", FAILED)
    assert file.path.read_text() == before
    assert [f.name for f in file.path.parent.iterdir()] == [file.path.name]  # no temporary file is left

    text = results.render(file.content)
    assert "GPU tests: ok, 61 s: 9 passed" in text and "FAILED: flow_matching_loss" in text


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Arguments → exit status and rows."""

    def call(*arguments, cases=None):
        cases = gpu_check.cpu_cases()[1:] if cases is None else cases
        monkeypatch.setattr(gpu_check, "cpu_cases", lambda: cases)
        status = gpu_check.main(["--device", "cpu", "--out", str(tmp_path), *arguments])
        (path,) = tmp_path.glob("*.json")
        return status, results.read(path)["rows"]

    return call


def test_the_check_on_a_cpu(run, capfd):
    status, rows = run(cases=gpu_check.cpu_cases())
    assert status == 0 and "All well." in capfd.readouterr().out
    assert {row["op"] for row in rows} == set(problems.OPS) and all(row["ok"] for row in rows)
    assert all(row["errors"]["loss"]["norm"] > 0 and row["errors"]["hidden"]["eager"] > 0 for row in rows)


@pytest.mark.parametrize("factor, ok", [(1.0, True), (1.001, False)])
def test_a_replay_that_is_wrong_fails_the_check(factor, ok, run, monkeypatch):
    class Graph:
        def __init__(self, run):
            self.run = run

        def replay(self):
            self.outputs = [factor * t for t in self.run()]

    monkeypatch.setattr(gpu_check, "Graph", Graph)
    case = gpu_check.Case("flow_matching_loss", TINY, torch.float32, draws=2, graphs=True)
    status, (row,) = run(cases=[case])
    assert (status == 0) == row["ok"] == ok
    assert ok or "in a graph: WrongResultError" in row["failure"]


def test_without_a_gpu_it_says_so(capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    said = capfd.readouterr()
    assert "needs an NVIDIA GPU" in said.err and said.err.count("\n") == 1 and not said.out


def broken(how: str):
    """`linear_cross_entropy` with one thing wrong, unless it is asked for the reference."""
    right = problems.linear_cross_entropy

    def op(hidden, *arguments, backend, **options):
        loss = right(hidden, *arguments, backend=backend, **options)
        if backend == "reference":
            return loss
        if how == "raises":
            raise RuntimeError("no such kernel\nand much more")
        if how == "nan":
            return loss * math.nan
        if how == "value":
            return loss * 1.02
        return loss + 0.01 * (hidden.sum() - hidden.sum().detach())

    return op


@pytest.mark.parametrize(
    "how, words",
    [
        ("gradient", "hidden: error"),
        ("value", "error"),
        ("nan", "not finite"),
        ("raises", "RuntimeError: no such kernel"),
    ],
)
def test_a_planted_failure_is_found_and_the_rest_goes_on(how, words, run, monkeypatch, capfd):
    monkeypatch.setattr(problems, "linear_cross_entropy", broken(how))
    status, rows = run("--quick")
    assert status == 1
    assert [row["op"] for row in rows if not row["ok"]] == ["linear_cross_entropy"]
    assert [row["op"] for row in rows if row["ok"]] == ["sfr_loss"] * 2
    (failed,) = (row for row in rows if not row["ok"])
    assert words in failed["failure"] and "\n" not in failed["failure"]
    assert f"FAILED: {failed['failure']}" in capfd.readouterr().out


def test_what_the_time_does_not_suffice_for_is_a_failure(run):
    status, rows = run("--minutes", "0.2")
    assert status == 1 and all("did not suffice" in row["failure"] for row in rows)


def test_a_replay_must_be_the_launched_call_and_take_the_seed_of_the_moment():
    problem = problems.Problem("flow_matching_loss", TINY, torch.float32, CPU)

    def run():
        return problem.run("torch")

    class Graph:
        def __init__(self, replayed):
            self.outputs, self.replayed = run(), replayed

        def replay(self):
            self.outputs = self.replayed()

    composites.check_replay(problem, Graph(run), run)
    with pytest.raises(AssertionError, match="differs"):
        composites.check_replay(problem, Graph(lambda: [1.001 * t for t in run()]), run)
    problem.seed.fill_(11)
    stale = run()
    with pytest.raises(AssertionError, match="same loss"):
        composites.check_replay(problem, Graph(lambda: stale), lambda: stale)


def test_every_case_is_named_once_and_every_op_has_every_dtype():
    names = [tuple(case.fields[key] for key in ("op", "label", "dtype")) for case in gpu_check.gpu_cases()]
    assert len(set(names)) == len(names)
    assert {(op, dtype) for op, _, dtype in names} == {
        (op, dtype) for op in problems.OPS for dtype in ("bfloat16", "float16", "float32")
    }

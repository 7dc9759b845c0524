"""The benchmarks' races on the CPU: what is timed is right, what is counted true, and nothing that fails is hidden."""

import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_kernels, bench_losses, limit, loop, problem, race, timing
from benchmarks.case import LIMIT, MAIN, PRODUCTS, WHOLE, Case, Gemm, Suite, Work, WrongResultError
from benchmarks.oracle import Error, Oracle
from benchmarks.peers import cross_entropy
from benchmarks.problem import UPSTREAM, Problem, Shape

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = Shape(2, 24, 16, 0.7, vocab=40, target_size=16, width=24)


def lines_of(suite: Suite, case: Case, *names: str) -> tuple[dict[str, dict], dict[str, str]]:
    """Results by provider, and reasons of those that failed."""
    lines = race.race(suite, replace(case, seconds=0.0), CPU, dict.fromkeys(names))
    results = {line["provider"]: line for line in lines if line["line"] == "result"}
    return results, {line["provider"]: line["reason"] for line in lines if line["line"] == "failed"}


def planted(runs: dict, *, judge=lambda provider, run: {}, bounds=(), **work) -> dict[str, dict]:
    suite = Suite(list, lambda case, device: Work(runs.__getitem__, judge, **work), dict, ("ours",), bounds)
    return lines_of(suite, Case("planted", "one", {}, torch.float32), *runs)


def tiny(op: str) -> tuple[Suite, Case]:
    suite = bench_kernels.SUITE if op in bench_kernels.OPS else bench_losses.SUITE
    case = next(case for case in suite.cases(CPU) if case.op == op)
    shape = (9, 72) if op in bench_kernels.OPS else replace(TINY, vocab=0 if op == "flow_loss" else TINY.vocab)
    return suite, replace(case, shape=shape)


LOSSES = ("linear_cross_entropy", "flow_loss", "sfr_loss")
OPS = (*bench_kernels.OPS, *LOSSES)


def test_known_bytes_products_and_time_give_the_right_amounts():
    gemm = Gemm(100, 200, 50, "")
    runs = {"ours": lambda: time.sleep(0.02) or []}
    results, _ = planted(runs, gemms=[gemm] * 5, bounds=(PRODUCTS, LIMIT), bytes=8000)
    ours = results["ours"]
    assert 20 <= ours["ms"] < 40 and ours["flops"] == 5 * 2 * 100 * 200 * 50 and ours["bytes"] == 8000
    # and the products' own factors and results, in float32
    assert ours["traffic"] == 8000 + 5 * 4 * (100 * 200 + 200 * 50 + 100 * 50) and ours["threads"] == 1
    assert set(results) == {"ours", PRODUCTS, LIMIT} and results[LIMIT]["kind"] == "limit"
    assert results[PRODUCTS]["bytes"] == 0 and all(len(r["samples_ms"]) >= 10 for r in results.values())


def test_a_copy_moves_what_it_says(monkeypatch):
    monkeypatch.setattr(limit, "ROOM", 1000)
    moved = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda into, source: moved.append(into.nbytes + source.nbytes))
    copy = limit.Copy(5555, CPU)
    copy()
    assert sum(moved) == copy.bytes == 5554 and max(moved) == 2000


def test_bytes_and_products_are_those_of_supervised_rows():
    """Worked out by hand for n of N tokens, in numbers of two bytes."""
    joint = Problem("sfr_loss", TINY, torch.bfloat16, CPU)
    n, flow, s = joint.num_ce, joint.num_flow, TINY
    assert flow < n < s.batch * s.length == 48
    by_hand = 3 * n * s.hidden_size + 48 * s.hidden_size + 2 * n * s.vocab
    by_hand += flow * (3 * s.target_size + s.width * (5 + 6))
    assert limit.bytes_of(joint) == 2 * by_hand
    products = limit.gemms_of(joint)  # forward, dW and dx of three layers; logits, dh, dW
    width = s.width
    forward = flow * ((s.target_size + s.hidden_size) * width + width * width + width * s.target_size)
    no_dx = flow * s.target_size * width  # of x_t
    assert len(products) == 12
    assert sum(2 * g.m * g.k * g.n for g in products) == 2 * (3 * forward - no_dx + 3 * n * s.hidden_size * s.vocab)
    frozen = Problem("linear_cross_entropy", replace(TINY, frozen=True, supervised=1.0), torch.float32, CPU)
    assert len(limit.gemms_of(frozen)) == 2 and limit.bytes_of(frozen) == 4 * 2 * 48 * 40, "no gather of all rows"


def test_the_limit_multiplies_the_losses_own_tensors():
    joint = Problem("sfr_loss", TINY, torch.float32, CPU)
    factors = bench_losses.factors_of(joint)
    logits, dh, dw = (torch.mm(*factors[gemm]) for gemm in limit.gemms_of(joint)[-3:])
    h, w = joint.hidden.detach().flatten(0, 1)[joint.rows.rows[joint.rows.ce_start :]], joint.weight.detach()
    y = joint.rows.labels[joint.rows.ce_start :]
    p = torch.softmax(h @ w.T, 1)
    p[torch.arange(len(y)), y] -= 1
    for found, wanted in ((logits, h @ w.T), (dh, p @ w / len(y)), (dw, p.T @ h / len(y))):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_peak_memory_is_what_is_held_beyond_the_results():
    kept = torch.ones(50_000, dtype=torch.float64)
    in_place = lambda: torch.empty(50_000, dtype=torch.float64).fill_(1.0) is None or [kept.mul_(1.0)]  # noqa: E731
    returned = lambda: [kept + torch.empty(50_000, dtype=torch.float64).fill_(1.0)]  # noqa: E731
    for run in (in_place, returned):
        assert 400_000 <= planted({"ours": run})[0]["ours"]["peak_bytes"] <= 420_000


def test_candidates_take_turns():
    calls, prepared = [], []
    first = timing.Candidate(lambda: calls.append("a"), lambda: prepared.append(len(calls)))
    found = timing.compare({"a": first, "b": timing.Candidate(lambda: calls.append("b"))}, CPU, seconds=0.0)
    assert len(found["a"].samples) == len(found["b"].samples) == timing.ROUNDS
    assert "".join(calls[2 * timing.WARM_UP :]) == "abba" * (timing.ROUNDS // 2)
    assert len(prepared) == calls.count("a")


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_judged_and_timed_and_its_peers_compute_the_same(op):
    suite, case = tiny(op)
    able = [n for n, why in suite.providers(CPU).items() if not why and n in (case.providers or ())]
    results, failed = lines_of(suite, case, *able)
    assert not failed and set(results) == {*able, *suite.bounds} and {"torch", "eager"} <= set(able)
    for name, line in results.items():
        json.dumps(line, allow_nan=False)
        if line["kind"] == "ours":
            assert line["errors"][line["worst"]]["ratio"] <= 1 and all(e["norm"] > 0 for e in line["errors"].values())
        elif line["kind"] == "peer":
            assert 0 < line["error"] < 1e-4, f"{name} computes something else"


@pytest.mark.parametrize("op", bench_kernels.OPS)
def test_a_wrong_kernel_is_refused_before_it_is_timed(op, monkeypatch):
    right = bench_kernels.kernels_of

    def wrong(*arguments, **options):
        """Its first result is off by a thousandth."""
        found = getattr(right("torch"), op)(*arguments, **options)
        found[0].mul_(1.001)
        return found

    kernels = SimpleNamespace(**vars(right("torch")) | {op: wrong})
    monkeypatch.setattr(bench_kernels, "kernels_of", lambda name: kernels if name == "triton" else right(name))
    results, failed = lines_of(*tiny(op), "triton", "torch")
    assert set(results) == {"torch", LIMIT} and "error" in failed["triton"]


@pytest.mark.parametrize(
    "op, how", [("linear_cross_entropy", "value"), ("flow_loss", "gradient"), ("sfr_loss", "times")]
)
def test_a_wrong_loss_is_refused_before_it_is_timed(op, how, monkeypatch):
    right = Problem.loss

    def wrong(self, backend, *, judged=False):
        value = right(self, backend, judged=judged)
        if backend == "reference" or (how == "times" and judged):
            return value
        if how == "gradient":
            return value + 0.01 * (self.hidden.sum() - self.hidden.sum().detach())
        return value * (1.001 if how == "value" else 1.2)  # times: only the call that is timed is wrong

    monkeypatch.setattr(Problem, "loss", wrong)
    results, failed = lines_of(*tiny(op), "torch", "eager")
    assert set(results) == {"eager", PRODUCTS, LIMIT} and "WrongResultError" in failed["torch"]


@pytest.mark.parametrize("name", ["eager", "F.linear_cross_entropy"])
def test_a_peer_that_computes_something_else_is_refused(name, monkeypatch):
    monkeypatch.setattr(cross_entropy, "eager", lambda h, w, y: 0.0 * (h.sum() + w.sum()))
    wrong = lambda h, w, y, options: (h @ w.T).square().mean()  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", wrong)
    results, failed = lines_of(*tiny("linear_cross_entropy"), name)
    assert "differs from float64" in failed[name] and set(results) == {PRODUCTS, LIMIT}


@pytest.mark.parametrize("name", ["torch.compile", "Liger + published head", "quack + published head"])
def test_peers_that_a_cpu_leaves_out_are_called_rightly(name, monkeypatch):
    """The same arithmetic with the library's call replaced by eager torch's."""
    monkeypatch.setattr(bench_losses.flow, "loss_of", lambda name: cross_entropy.eager)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    results, failed = lines_of(*tiny("sfr_loss"), name)
    assert not failed and results[name]["error"] < 1e-4


def test_a_graph_must_be_the_launched_call_with_the_seed_of_the_moment(monkeypatch):
    class Replayed:
        """On a CPU, in the place of a graph."""

        def __init__(self, run):
            self.run, self.outputs = run, run()

        def replay(self):
            self.outputs = self.run()

    monkeypatch.setattr(race, "Graph", Replayed)
    results, failed = lines_of(*tiny("flow_loss"), "torch", "torch, graph", "eager")  # whose judge draws noise, too
    assert not failed and results["torch, graph"]["kind"] == "ours" and "peak_bytes" not in results["torch, graph"]
    assert "launched calls failed" in lines_of(*tiny("flow_loss"), "triton", "triton, graph")[1]["triton, graph"]
    stale = Problem("flow_matching_loss", TINY, torch.float32, CPU)
    found = stale.run("torch")
    with pytest.raises(WrongResultError, match="same loss"):
        problem.check_replay(stale, Replayed(lambda: found), lambda: found)
    right = Replayed.replay
    monkeypatch.setattr(Replayed, "replay", lambda self: right(self) or self.outputs[1].mul_(1.001))
    assert "differs from the launched call" in lines_of(*tiny("flow_loss"), "torch", "torch, graph")[1]["torch, graph"]


def test_a_gpu_that_answers_nothing_any_more_ends_the_race(monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(device=None):
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(race.DeadGPUError, match="illegal"):
        race._reason(error, torch.device("cuda"))


INF, NAN = math.inf, math.nan
VERDICTS = [  # ours, eager, exact, wrong: the floor; nothing, and rightly so; not finite; where eager overflowed
    (1.4, 1, 1, False), (1.6, 1, 1, True), (2.0**-23, 0, 1, False), (2.0**-21, 0, 1, True), (0, 0, 0, False),
    (1, 0, 0, True), (NAN, 1, 1, True), (INF, INF, 1, True), (0.05, INF, 1, False), (0.1, INF, 1, True),
]  # fmt: skip


def test_the_verdict():
    for ours, eager, exact, wrong in VERDICTS:
        error = Error(float(ours) ** 2, float(eager) ** 2, float(exact) ** 2)
        assert (error.ratio > 1) == wrong, (ours, eager, exact)
        json.dumps(error.to_dict(), allow_nan=False)


def test_what_is_not_a_number_is_not_forgotten_in_any_result():
    found = Oracle(["a", "b", "c"], [torch.ones(3, dtype=torch.float64)] * 3, None)
    right, wrong = torch.ones(3, dtype=torch.float32), torch.full((3,), math.nan, dtype=torch.float32)
    assert found.peer_verdict([right] * 3) == dict(error=0.0)
    for place in range(3):
        results = [right, right, 1.01 * right]
        results[place] = wrong
        with pytest.raises(WrongResultError):
            found.peer_verdict(results)


@pytest.mark.parametrize("op", problem.OPS)
def test_the_exact_values_are_the_same_in_pieces(op, monkeypatch):
    whole = Problem(op, TINY, torch.float32, CPU)
    twin = whole.in_float64()
    loss = twin.loss("reference", judged=True)
    wanted = [loss, *torch.autograd.grad(loss * UPSTREAM, list(twin.leaves.values()))]
    monkeypatch.setattr(problem, "CHUNK", 7 * TINY.vocab)
    for found, exact in zip(whole.exact(), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_every_case_is_named_once_and_the_quick_selection_has_each_op(kind):
    cases = [case for _, case in loop.selected(torch.device(kind), full=True)]
    assert len({case.name for case in cases}) == len(cases)
    assert [case.worth for case in cases] == sorted(case.worth for case in cases)
    quick = [case for _, case in loop.selected(torch.device(kind))]
    main = {case.op for case in quick if case.worth == MAIN}
    assert main >= {*bench_kernels.OPS, "linear_cross_entropy", "flow_loss"}
    assert {case.op for case in quick if case.worth == WHOLE} == {"sfr_loss", "training_step"}
    for case in cases:
        if case.op in LOSSES and kind == "cpu":
            assert case.sizes["model"] == "SmolLM2-135M" and case.sizes["tokens"] in (512, 2048)

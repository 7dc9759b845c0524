"""The benchmarks' races on the CPU: what is timed is right, what is counted true, and nothing that fails is hidden."""

import statistics
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import (
    bench_ceilings,
    bench_flow_loss,
    bench_flow_mse,
    bench_flow_path,
    bench_linear_cross_entropy,
    bench_norm_act,
    bench_sfr_loss,
    bench_softmax_xent,
    bench_targets,
    bench_velocity_head,
)
from benchmarks.harness import composites, errors, leaf_work, limit, problems, shapes
from benchmarks.harness import race as racing
from benchmarks.harness.floor import Gemm
from benchmarks.harness.goals import misses
from benchmarks.harness.problems import Problem, Shape
from benchmarks.harness.timing import Timing
from benchmarks.harness.work import LIMIT, PRODUCTS, Case, Goal, Suite, Work, WrongResultError
from benchmarks.peers import cross_entropy, flow
from sfr_kernels.leaves import torch as eager_leaves

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Shape(2, 24, 16, 0.7, vocab=40, target_size=8, width=12)
LEAF_BENCHES = (bench_flow_path, bench_flow_mse, bench_norm_act, bench_softmax_xent)
LOSS_BENCHES = (bench_linear_cross_entropy, bench_flow_loss, bench_sfr_loss, bench_velocity_head)
BENCHES = (*LEAF_BENCHES, *LOSS_BENCHES, bench_ceilings, bench_targets)


def suite_of(runs: dict, *, judge=lambda provider, run: {}, bounds=(), ours=("ours",), **work) -> Suite:
    """A suite of one case whose providers are these calls."""
    case = Case("planted", "one", {}, torch.float32, seconds=0.0)
    make = lambda case, device: Work(runs.__getitem__, judge, **work)  # noqa: E731
    return Suite("planted", lambda device: [case], make, lambda device: dict.fromkeys(runs), ours, bounds)


def run_race(suite: Suite, providers=None, **changes) -> racing.Race:
    (case,) = suite.cases(CPU)
    return racing.race(suite, replace(case, **changes), CPU, providers or list(suite.providers(CPU)))


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


def test_a_kernel_of_known_bytes_and_time_has_the_right_rate():
    """20 ms for 100 MB: 5 GB/s."""
    suite = suite_of({"ours": lambda: time.sleep(0.02) or []}, bytes=100_000_000)
    info = run_race(suite).results["ours"].info
    assert info["tb_per_s"] == pytest.approx(0.005, rel=0.1) and "tflop_per_s" not in info and info["threads"] == 1


def test_products_of_known_flops_have_the_right_rate():
    gemm = Gemm(100, 200, 50, "")
    assert gemm.flops == 2 * 100 * 200 * 50
    suite = suite_of({"ours": lambda: time.sleep(0.02) or []}, gemms=[gemm] * 5, bounds=(PRODUCTS, LIMIT), bytes=8000)
    found = run_race(suite).results
    assert found["ours"].info["flops"] == 5 * gemm.flops
    # and the products' own factors and results, in float32
    assert found["ours"].info["traffic"] == 8000 + 5 * 4 * (100 * 200 + 200 * 50 + 100 * 50)
    assert found["ours"].info["tflop_per_s"] == pytest.approx(5 * gemm.flops / 0.02 / 1e12, rel=0.1)
    assert found[LIMIT].info["kind"] == "limit" and set(found) == {"ours", PRODUCTS, LIMIT}
    assert found["ours"].info["limit_ms"] == pytest.approx(statistics.median(found[LIMIT].samples), rel=1e-3)


def test_a_copy_moves_what_it_says(monkeypatch):
    monkeypatch.setattr(limit, "ROOM", 1000)
    moved = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda into, source: moved.append(into.nbytes + source.nbytes))
    copy = limit.Copy(5555, CPU)
    copy()
    assert sum(moved) == copy.bytes == 5554 and max(moved) == 2000


def test_bytes_between_the_products_are_those_of_supervised_rows():
    """Worked out by hand for n of N tokens, in numbers of two bytes."""
    assert limit.gather_bytes(30, 100, 7, 2) == 2 * (3 * 30 * 7 + 100 * 7)
    assert limit.gather_bytes(100, 100, 7, 2) == 0
    problem = Problem("sfr_loss", TINY, torch.bfloat16, CPU)
    n, flow, N = problem.num_ce, problem.num_flow, 48
    assert flow < n < N
    s = TINY
    by_hand = 3 * n * s.hidden_size + N * s.hidden_size + 2 * n * s.vocab
    by_hand += flow * (3 * s.target_size + s.width * (5 + 6))
    assert composites.bytes_of(problem) == 2 * by_hand
    assert len(composites.gemms_of(problem)) == 3 + 3 + 3 + 3, "forward, dW and dx of three layers; logits, dh, dW"


def test_peak_memory_of_what_works_in_place_is_its_scratch():
    kept = torch.ones(1_000_000)

    def run():
        torch.empty(50_000, dtype=torch.float64).fill_(1.0)
        return [kept.mul_(1.0)]

    assert 400_000 <= run_race(suite_of({"ours": run})).results["ours"].info["peak_bytes"] <= 420_000


def test_peak_memory_is_what_is_held_beyond_the_results():
    kept = torch.ones(1000, dtype=torch.float64)

    def run():
        extra = torch.empty(50_000, dtype=torch.float64)
        return [kept + extra[:1000].sum()]

    info = run_race(suite_of({"ours": run})).results["ours"].info
    assert 400_000 <= info["peak_bytes"] <= 420_000


# ---------------------------------------------------------------------------------------------------------------------
# What is right


def leaf_case(bench, op: str) -> Case:
    case = next(c for c in bench.SUITE.cases(CPU) if c.op == op)
    return replace(case, shape=(9, 72), seconds=0.0)


def tiny_case(bench) -> Case:
    vocab = 0 if bench in (bench_flow_loss, bench_velocity_head) else TINY.vocab
    op = bench.SUITE.op
    return shapes.case_of(op, None, replace(TINY, vocab=vocab), torch.float32, seconds=0.0)


def named(value) -> str:
    """Of a bench its op; of a case nothing more."""
    return value.SUITE.op if hasattr(value, "SUITE") else value.args[-1] if len(value.args) == 2 else ""


CASES = [(bench, partial(leaf_case, bench, op)) for bench in LEAF_BENCHES
         for op in {c.op: None for c in bench.SUITE.cases(CPU)}]  # fmt: skip
CASES += [(bench, partial(tiny_case, bench)) for bench in LOSS_BENCHES]


@pytest.mark.parametrize("bench, case_of", CASES, ids=named)
def test_every_op_is_judged_and_timed_and_its_peers_compute_the_same(bench, case_of):
    case, able = case_of(), [n for n, reason in bench.SUITE.providers(CPU).items() if reason is None]
    found = racing.race(bench.SUITE, case, CPU, able)
    assert not found.failed
    assert set(found.results) == {*able, *bench.SUITE.bounds} and {"torch", "eager"} <= set(able)
    for name, result in found.results.items():
        info = result.info
        assert len(result.samples) >= 10 and info["op"] == case.op and info["limit_ms"] > 0
        if info["kind"] == "ours":
            assert info["errors"][info["worst"]]["ratio"] <= 1 and all(e["norm"] > 0 for e in info["errors"].values())
        elif info["kind"] == "peer":
            assert 0 < info["error"] < 1e-4, f"{name} computes something else"


@pytest.mark.parametrize("name", ["torch.compile", "Liger + published head", "quack + published head"])
def test_peers_of_the_joint_loss_that_a_cpu_leaves_out_are_judged_by_what_they_are_given(name, monkeypatch):
    """The same arithmetic with the library's call replaced by eager torch's."""
    monkeypatch.setattr(flow, "loss_of", lambda name: cross_entropy.eager)
    monkeypatch.setattr(bench_sfr_loss, "providers", lambda device: {name: None})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    work = bench_sfr_loss.make(tiny_case(bench_sfr_loss), CPU)
    run = work.run(name)
    assert work.judge(name, run)["error"] < 1e-4 and len(run()) > 10


class Wrong:
    """Leaves whose first result is off by a thousandth."""

    def __getattr__(self, name):
        def call(*arguments, **options):
            found = getattr(eager_leaves, name)(*arguments, **options)
            (found if isinstance(found, torch.Tensor) else found[0]).mul_(1.001)
            return found

        return call


@pytest.mark.parametrize("bench, case_of", CASES[: -len(LOSS_BENCHES)], ids=named)
def test_a_wrong_leaf_is_refused_before_it_is_timed(bench, case_of, monkeypatch):
    real = leaf_work.leaves
    monkeypatch.setattr(leaf_work, "leaves", lambda name: Wrong() if name == "triton" else real(name))
    found = racing.race(bench.SUITE, case_of(), CPU, ["triton", "torch"])
    assert set(found.failed) == {"triton"} and "error" in found.failed["triton"]
    assert set(found.results) == {"torch", LIMIT}


@pytest.mark.parametrize("how", ["value", "gradient"])
@pytest.mark.parametrize("op", ["linear_cross_entropy", "flow_matching_loss", "velocity_head"])
def test_a_wrong_loss_is_refused_before_it_is_timed(op, how, monkeypatch):
    bench, module = {
        "linear_cross_entropy": (bench_linear_cross_entropy, problems),
        "flow_matching_loss": (bench_flow_loss, problems),
        "velocity_head": (bench_velocity_head, bench_velocity_head),
    }[op]
    right = getattr(module, op)

    def wrong(*arguments, **options):
        value = right(*arguments, **options)
        if options.get("backend") == "reference":
            return value
        hidden = arguments[2] if op == "velocity_head" else arguments[0]
        return value * 1.001 if how == "value" else value + 0.01 * (hidden.sum() - hidden.sum().detach())

    monkeypatch.setattr(module, op, wrong)
    found = racing.race(bench.SUITE, tiny_case(bench), CPU, ["torch", "eager"])
    assert set(found.failed) == {"torch"} and "WrongResultError" in found.failed["torch"]
    assert set(found.results) == {"eager", PRODUCTS, LIMIT}


@pytest.mark.parametrize("name", ["eager", "F.linear_cross_entropy"])
def test_a_peer_that_computes_something_else_is_refused(name, monkeypatch):
    monkeypatch.setattr(cross_entropy, "eager", lambda h, w, y: 0.0 * (h.sum() + w.sum()))
    monkeypatch.setattr(cross_entropy, "torch_linear_cross_entropy", lambda h, w, y: (h @ w.T).square().mean())
    found = racing.race(bench_linear_cross_entropy.SUITE, tiny_case(bench_linear_cross_entropy), CPU, [name])
    assert "differs from float64" in found.failed[name] and set(found.results) == {PRODUCTS, LIMIT}


def test_what_is_not_a_number_is_not_forgotten():
    oracle = errors.Oracle(["a", "b", "c"], [torch.ones(3, dtype=torch.float64)] * 3, None)
    right, wrong = torch.ones(3), torch.full((3,), float("nan"))
    assert oracle.distance([right] * 3) == 0.0
    for place in range(3):
        found = [right, right, 1.01 * right]
        found[place] = wrong
        with pytest.raises(WrongResultError):
            errors.peer_verdict(oracle.distance(found))


def test_a_graph_of_what_failed_before_is_not_timed():
    found = racing.race(bench_flow_loss.SUITE, tiny_case(bench_flow_loss), CPU, ["torch, graph"], lost=["torch"])
    assert "launched calls failed" in found.failed["torch, graph"] and set(found.results) == {PRODUCTS, LIMIT}


def test_one_that_fails_at_any_moment_hides_no_other():
    calls = []

    def late():
        calls.append(1)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("planted\nand much more")
        return []

    def judge(provider, run):
        run()
        if provider == "wrong":
            raise WrongResultError("two is not three")
        return {}

    def never():
        raise RuntimeError("no such kernel")

    found = run_race(suite_of({"late": late, "wrong": list, "never": never, "ours": list}, judge=judge))
    assert set(found.results) == {"ours"}
    assert found.failed == {
        "late": "OutOfMemoryError: planted", "wrong": "WrongResultError: two is not three",
        "never": "RuntimeError: no such kernel",
    }  # fmt: skip


def test_a_case_that_cannot_be_made_fails_for_everyone():
    def make(case, device):
        raise torch.OutOfMemoryError("planted")

    suite = replace(suite_of({"ours": list}, bounds=(LIMIT,)), make=make)
    found = run_race(suite)
    assert not found.results and set(found.failed) == {"ours", LIMIT} and "planted" in found.failed["ours"]


def test_a_gpu_that_answers_nothing_any_more_ends_the_race(monkeypatch):
    def fail(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(racing.DeadGPUError, match="illegal") as caught:
        racing._reason("triton", RuntimeError("CUDA error: an illegal memory access was encountered"), CUDA)
    assert caught.value.provider == "triton"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    assert racing._reason("triton", torch.OutOfMemoryError("planted"), CUDA) == "OutOfMemoryError: planted"


def test_a_graph_is_a_provider_of_its_own(monkeypatch):
    """On a CPU a stand-in replays the calls: it must be the launched call, with the seed of the moment."""

    class Replayed:
        def __init__(self, run):
            self.run, self.outputs = run, run()

        def replay(self):
            self.outputs = self.run()

    monkeypatch.setattr(racing, "Graph", Replayed)
    case = tiny_case(bench_flow_loss)
    found = racing.race(bench_flow_loss.SUITE, case, CPU, ["torch", "torch, graph"])
    assert not found.failed and found.results["torch, graph"].info["kind"] == "ours"
    assert "peak_bytes" not in found.results["torch, graph"].info
    stale = Problem("flow_matching_loss", TINY, torch.float32, CPU).run("torch")
    monkeypatch.setattr(Replayed, "replay", lambda self: setattr(self, "outputs", stale))
    found = racing.race(bench_flow_loss.SUITE, case, CPU, ["torch", "torch, graph"])
    assert "differs from the launched call" in found.failed["torch, graph"] and "torch" in found.results


# ---------------------------------------------------------------------------------------------------------------------
# What was wanted


def test_what_was_missed():
    suite = suite_of({"ours": list, "fast": list, "slow": list}, bounds=(PRODUCTS, LIMIT))
    times = {
        n: Timing(ms, 0.0, 0.0, 10)
        for n, ms in dict(ours=12.0, fast=15.0, slow=24.0, products=10.0, limit=11.0).items()
    }
    goal = Goal(of_products=1.25, of_limit=1.1, peer=1.2, rivals=(("slow", 2.0),), ms=12.0, weights=2.0)

    def missed(goal, times=times, peak=2000):
        return misses(goal, "ours", times, suite, peak, 1000)

    assert missed(goal) == [] == missed(Goal()) == missed(Goal(ms=1.0, backends=("cuda",)))
    found = missed(Goal(of_products=1.1, of_limit=1.05, peer=1.9, ms=11.0, weights=0.5))
    words = ("1.20 × products, wanted 1.1", "1.09 × limit, wanted 1.05", "12.000 ms, wanted 11",
             "ours 1.25, wanted 1.9", "2.00 lm_heads of memory, wanted 0.5")  # fmt: skip
    assert len(found) == 5 and all(any(w in line for line in found) for w in words)
    alone = {"ours": times["ours"]}
    assert missed(Goal(rivals=(("slow", 2.1),))) == ["slow / ours 2.00, wanted 2.1"]
    assert len(missed(Goal(of_products=2.0, peer=1.0, rivals=(("slow", 1.0),)), alone)) == 3, (
        "what is unknown is missed"
    )


def test_goals_are_those_of_the_shapes():
    """Tokens, H, V, share supervised, frozen; times of the products, of the fastest peer, lm_heads of memory."""
    table = {}
    for case in bench_linear_cross_entropy.SUITE.cases(CUDA):
        s, g = case.sizes, case.goal
        if g.of_products is not None and not s["note"]:
            key = s["tokens"], s["hidden_size"], s["vocab"], s["supervised"], s["frozen"]
            table[key] = g.of_products, g.peer, g.weights
    assert table == {
        (8192, 4096, 128256, 0.5, False): (1.09, 1.9, 2.5),
        (8192, 4096, 128256, 0.5, True): (1.10, 1.9, 0.5),
        (8192, 4096, 128256, 1.0, False): (1.10, 1.0, 2.5),
        (8192, 4096, 128256, 1.0, True): (1.10, None, 0.5),
        (4096, 2048, 151936, 0.5, False): (1.12, 1.9, 2.5),
        (4096, 2048, 151936, 0.5, True): (1.15, None, 0.5),
        (16384, 2048, 248320, 0.5, False): (1.20, None, 2.5),
        (16384, 2048, 248320, 0.5, True): (1.15, None, 0.5),
    }
    little = [c for c in bench_linear_cross_entropy.SUITE.cases(CUDA) if c.sizes["note"]]
    assert [(c.goal.of_products, c.goal.weights) for c in little] == [(1.25, 0.3)]
    joint = [c.goal for c in bench_sfr_loss.SUITE.cases(CUDA) if c.quick]
    assert joint == [Goal(of_products=1.10, rivals=(("one after the other", 1.0),), backends=("triton", "cuda"))]
    rows = [c for b in LEAF_BENCHES for c in b.SUITE.cases(CUDA)]
    wanted = {(c.op, *c.shape): (c.goal.of_limit, c.goal.ms) for c in rows if c.dtype == torch.bfloat16}
    assert wanted["softmax_xent", 4096, 128256] == (None, 0.85)
    assert {k for k, v in wanted.items() if v == (1.25, None)} == {
        *((op, 8192, 1024) for op in ("flow_path", "flow_mse", "norm_act", "norm_act_backward")),
        ("softmax_xent", 4096, 32000), ("softmax_xent", 1024, 256000),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_every_case_is_named_once_and_the_selection_is_a_small_part(device):
    cases = [c for bench in BENCHES for c in bench.SUITE.cases(device)]
    groups = [c.group for c in cases]
    assert len(set(groups)) == len(groups)
    quick = [c for c in cases if c.quick]
    assert len(quick) < len(cases) / 2 and {c.op for c in quick} == {c.op for c in cases}
    for bench in BENCHES:
        names = bench.SUITE.providers(device)
        assert all(c.providers is None or set(c.providers) <= set(names) for c in bench.SUITE.cases(device))


def test_the_shapes_are_those_that_people_train():
    cases = bench_linear_cross_entropy.SUITE.cases(CUDA)
    sizes = [c.sizes for c in cases]
    assert {s["model"] for s in sizes} >= set(shapes.MODELS) and len(shapes.MODELS) >= 7
    assert {s["tokens"] for s in sizes} >= {1024, 32768} and {s["supervised"] for s in sizes} >= {0.1, 1.0}
    assert {s["frozen"] for s in sizes} == {False, True}
    assert {c.dtype_name for c in cases} == {"bfloat16", "float16", "float32"}
    curves = {}
    for case in cases:
        for point in case.sweeps:
            curves.setdefault((point["axis"], point["series"]), set()).add(point["x"])
    assert {axis for axis, _ in curves} == {"tokens", "vocab", "hidden_size", "supervised"}
    assert all(len(xs) >= 4 for xs in curves.values()) and len(curves) == 4
    assert [c.sizes["tokens"] for c in cases if len(c.sweeps) == 2] == [8192, 8192], "where curves cross"
    assert any(c.main and c.sweeps for c in cases)

"""The benchmark of the cross-entropy, on the CPU: peers that compute the same, targets that can be missed, and a ratio
that shows a regression where there is no GPU."""

import json
from dataclasses import replace

import pytest
import torch
from decoder_cases import make

from benchmarks import decoder, decoder_peers
from benchmarks.gpu_check import Case, check
from benchmarks.problems import Problem, Shape
from benchmarks.speed import measure
from sfr_kernels import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(decoder_peers.installed(CPU)))
def test_a_peer_computes_what_ours_does(name):
    x = make(dtype=torch.float32)
    results = []
    for loss_of in (decoder_peers.installed(CPU)[name], linear_cross_entropy):
        loss = loss_of(x.hidden.flatten(0, 1), x.weight, x.labels.flatten())
        results.append([loss.detach(), *torch.autograd.grad(loss, [x.hidden, x.weight])])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)


def test_absent_peers_are_named(monkeypatch):
    assert set(decoder_peers.LIBRARIES) <= set(decoder_peers.missing(CPU))
    monkeypatch.setattr(decoder_peers.importlib.util, "find_spec", lambda module: module == "quack")
    found = decoder_peers.installed(torch.device("cuda"))
    assert "quack" in found and "Liger" not in found
    assert "Liger" in decoder_peers.missing(torch.device("cuda"))


def test_two_ops_one_after_the_other_are_the_joint_op():
    shape = Shape(2, 24, 16, 0.7, vocab=37, target_size=10, width=12)
    problem = Problem("sfr_loss", shape, torch.float64, CPU)
    for mine, theirs in zip(problem.run("torch"), problem.apart("torch"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_what_was_missed():
    row = dict(ms=12.0, floor_ms=10.0, weight_units=2.0)
    assert decoder.misses(row, dict(of_floor=1.25, peer=1.9, units=2.0), 24.0) == []
    assert decoder.misses(row, {}, None) == decoder.misses({}, {}, None) == []
    assert decoder.misses({}, dict(of_floor=1.0), None) == ["not measured"]
    assert decoder.misses(row, dict(peer=1.9), None) == ["no peer was measured"]
    missed = decoder.misses(row, dict(of_floor=1.1, peer=1.9, units=0.5), 15.0)
    assert len(missed) == 3
    assert "1.20 × floor" in missed[0] and "1.25, wanted 1.9" in missed[1] and "2.00 lm_heads" in missed[2]


def test_targets_are_those_of_the_shapes():
    """Tokens, H, V, share supervised, frozen; times of the floor, of the fastest peer, lm_heads of memory."""
    found = decoder.cases(torch.device("cuda"), 1.0)
    table = []
    for case, targets in found:
        s = case.shape
        table.append((s.batch * s.length, s.hidden_size, s.vocab, s.supervised, s.frozen, *targets.values()))
    assert table == [
        (8192, 4096, 128256, 0.5, False, 1.09, 1.9, 2.5),
        (8192, 4096, 128256, 0.5, True, 1.10, 1.9, 0.5),
        (8192, 4096, 128256, 1.0, False, 1.10, 1.0, 2.5),
        (8192, 4096, 128256, 1.0, True, 1.10, None, 0.5),
        (4096, 2048, 151936, 0.5, False, 1.12, 1.9, 2.5),
        (4096, 2048, 151936, 0.5, True, 1.15, None, 0.5),
        (16384, 2048, 248320, 0.5, False, 1.20, None, 2.5),
        (16384, 2048, 248320, 0.5, True, 1.15, None, 0.5),
        (8192, 4096, 128256, 0.5, False, 1.25, None, 0.3),
        (8192, 4096, 128256, 0.5, False, 1.10, 1.0, None),
        (8192, 4096, 128256, 0.5, True, 1.10, 1.0, None),
    ]
    assert [list(t) for _, t in found] == [["of_floor", "peer", "units"]] * 11
    assert [c.op for c, _ in found] == ["linear_cross_entropy"] * 9 + ["sfr_loss"] * 2
    assert [c.small for c, _ in found] == [False] * 8 + [True] + [False] * 2


def test_the_setting_of_the_least_memory_is_within_its_own_bound():
    """Eight chunks, each of which rounds dW once more: further from float64 than eager torch, and no wrong result."""
    shape = Shape(1, 8 * 64, 64, vocab=700)
    case = Case("linear_cross_entropy", shape, torch.bfloat16, draws=2, timed=False, small=True)
    assert Problem(case.op, shape, case.dtype, CPU, small=True).memory == dict(chunk_rows=8, accum_dtype=torch.bfloat16)
    (row,) = check(replace(case, shape=replace(shape, length=64)), ("torch",), CPU, quick=False)
    assert row["ok"], row["failure"]


def test_a_peer_that_fails_or_computes_something_else_hides_no_other(monkeypatch):
    calls = []

    def late(hidden, weight, labels):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("planted")
        return decoder_peers.eager(hidden, weight, labels)

    def nothing(hidden, weight, labels):
        return 0.0 * (hidden.sum() + weight.sum())

    peers = {"late": late, "nothing": nothing, "eager": decoder_peers.eager}
    monkeypatch.setattr(decoder_peers, "installed", lambda device: peers)
    problem = Problem("linear_cross_entropy", Shape(2, 24, 16, 0.7, vocab=37), torch.float32, CPU)
    found, raised = measure(problem, ["torch"], peers=True, seconds=0.01)
    assert set(found) == {"torch", "eager"} and set(raised) == {"late", "nothing"}
    assert "planted" in raised["late"] and "differs from ours" in raised["nothing"]


def test_a_run_on_the_cpu(tmp_path, monkeypatch, capsys):
    tiny = Shape(2, 16 * 24, 8 * 16, 0.5, vocab=16 * 40)
    monkeypatch.setattr(decoder, "SHAPES", ((tiny, (1.1, 1.9), (1.1, None)),))
    monkeypatch.setattr(decoder, "ON_CPU", {})  # of shapes so small, times say nothing
    run = ["--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01"]
    assert decoder.main(run) == 0
    (path,) = tmp_path.glob("decoder-*.json")
    content = json.loads(path.read_text())
    assert "Liger" in content["missing_peers"] and "Liger" in capsys.readouterr().out
    rows = content["rows"]
    assert {row["candidate"] for row in rows} >= {"torch", "eager", "one after the other"}
    assert all(row["ok"] and row["ms"] > 0 and row["weight_units"] > 0 and row["floor_blocks"] for row in rows)
    assert all("errors" in row for row in rows if not row["peer"])
    monkeypatch.setattr(decoder, "ON_CPU", dict(of_floor=1e-3, peer=None, units=None))
    assert decoder.main([*run, "--minutes", "0.001"]) == 1 and "× floor, wanted 0.001" in capsys.readouterr().out
    monkeypatch.setattr(decoder, "ON_CPU", {})

    def wrong(*arguments, **options):
        factor = 1.0 if options["backend"] == "reference" else 1.001
        return factor * linear_cross_entropy(*arguments, **options)

    monkeypatch.setattr("benchmarks.problems.linear_cross_entropy", wrong)
    assert decoder.main([*run, "--minutes", "0.001"]) == 1
    assert decoder.main([*run, "--minutes", "0"]) == 1  # nothing was run
    if not torch.cuda.is_available():
        assert decoder.main(["--device", "cuda"]) == 2


def test_no_slower_than_eager_where_half_the_tokens_carry_a_label():
    """It does half of eager's multiplications: measured at 0.55 of its time, in turns with it."""
    problem = Problem("linear_cross_entropy", Shape(2, 128, 256, 0.5, vocab=9496), torch.float32, CPU)
    found, raised = measure(problem, ["torch"], peers=True, seconds=1.0)
    assert not raised
    assert found["torch"]["ms"] < 0.9 * found["eager"]["ms"]
    assert found["torch"]["ms"] < 2.5 * found["torch"]["floor_ms"]

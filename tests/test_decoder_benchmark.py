"""The benchmark of the cross-entropy, on the CPU: peers that compute the same, targets that can be missed, and a ratio
that shows a regression where there is no GPU."""

import json

import pytest
import torch
from decoder_cases import make

from benchmarks import decoder, decoder_peers
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
    assert decoder.misses(row, {}, None) == decoder.misses({}, dict(of_floor=1.0), None) == []
    missed = decoder.misses(row, dict(of_floor=1.1, peer=1.9, units=0.5), 15.0)
    assert len(missed) == 3
    assert "1.20 × floor" in missed[0] and "1.25, wanted 1.9" in missed[1] and "2.00 lm_heads" in missed[2]


def test_targets_are_those_of_the_shapes():
    found = decoder.cases(torch.device("cuda"), 1.0)
    shapes = [
        (c.op, c.shape.batch * c.shape.length, c.shape.hidden_size, c.shape.vocab, c.shape.frozen) for c, _ in found
    ]
    assert shapes[0] == ("linear_cross_entropy", 8192, 4096, 128256, False)
    assert shapes[6][1:] == (16384, 2048, 248320, False)
    assert found[0][1] == dict(of_floor=1.09, peer=1.9, units=2.5) and found[1][1]["units"] == 0.5
    small = next(c for c, _ in found if c.small)
    problem = Problem(small.op, Shape(1, 8, 64, vocab=5), torch.bfloat16, CPU, small=True)
    assert problem.memory == dict(chunk_rows=8, accum_dtype=torch.bfloat16)


def test_a_run_on_the_cpu(tmp_path, monkeypatch, capsys):
    tiny = Shape(2, 16 * 24, 8 * 16, 0.5, vocab=16 * 40)
    monkeypatch.setattr(decoder, "SHAPES", ((tiny, (1.1, 1.9), (1.1, None)),))
    run = ["--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01"]
    assert decoder.main(run) == 0
    (path,) = tmp_path.glob("decoder-*.json")
    content = json.loads(path.read_text())
    assert "Liger" in content["missing_peers"] and "Liger" in capsys.readouterr().out
    rows = content["rows"]
    assert {row["candidate"] for row in rows} >= {"torch", "eager", "one after the other"}
    assert all(row["ok"] and row["ms"] > 0 and row["weight_units"] > 0 and row["floor_blocks"] for row in rows)
    assert all("errors" in row for row in rows if not row["peer"])

    def wrong(*arguments, **options):
        factor = 1.0 if options["backend"] == "reference" else 1.001
        return factor * linear_cross_entropy(*arguments, **options)

    monkeypatch.setattr("benchmarks.problems.linear_cross_entropy", wrong)
    assert decoder.main([*run, "--minutes", "1"]) == 1
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

"""The benchmark of the leaves, on the CPU: wrong kernels are refused, targets can be missed, choices have an origin."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import leaves, results
from sfr_kernels.leaves import fastest
from sfr_kernels.leaves import torch as eager

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def test_every_leaf_is_judged_and_timed(tmp_path):
    assert leaves.main(["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("leaves-*.json")
    rows = results.read(path)["rows"]
    assert {row["op"] for row in rows} == set(leaves.MAKERS)
    for row in rows:
        assert row["ok"] and row["ms"] > 0 and row["floor_ms"] > 0 and row["size"] == "small"
        assert row["terabytes_per_second"] == pytest.approx(row["bytes"] / row["ms"] / 1e9, abs=1e-3)
    with pytest.raises(ValueError, match="not measured on a GPU"):
        leaves.choose(path)


@pytest.mark.parametrize("leaf", leaves.MAKERS)
def test_a_wrong_kernel_is_refused_before_it_is_timed(leaf, monkeypatch):
    class Wrong:
        def __getattr__(self, name):
            def call(*arguments, **options):
                found = getattr(eager, name)(*arguments, **options)
                (found if isinstance(found, torch.Tensor) else found[0]).mul_(1.001)
                return found

            return call

    real = leaves.leaves
    monkeypatch.setattr(leaves, "leaves", lambda name: Wrong() if name == "wrong" else real(name))
    row, right = leaves.run(leaves.Case(leaf, 5, 96), ["wrong", "torch"], torch.float32, CPU, 0.01)
    assert "errs by" in row["failure"] and "ms" not in row
    assert right["ok"] and right["ms"] > 0


def test_bytes_are_those_that_must_move():
    x = leaves.Numbers(64, 32, CPU, torch.float32, torch.float32)
    moved = {name: make(replace(x)).bytes / (4 * 64 * 32) for name, make in leaves.MAKERS.items()}
    assert moved == {
        "flow_path": 1 + 1 / 32, "flow_mse": 2 + 1 / 32, "norm_act": 3, "norm_act_backward": 3, "softmax_xent": 2,
    }  # fmt: skip


def test_what_was_missed():
    case = leaves.Case("softmax_xent", 1, 1, share=0.8, most_ms=0.85)
    assert leaves.misses(case, dict(ms=0.8, floor_ms=0.7)) == []
    assert len(leaves.misses(case, dict(ms=0.9, floor_ms=0.7))) == 2
    assert leaves.misses(case, {}) == ["not measured"]
    wanted = {(c.leaf, c.n, c.width): (c.share, c.most_ms) for c in leaves.cases(torch.device("cuda"))}
    assert wanted["softmax_xent", 4096, 128256] == (None, 0.85)
    assert all(wanted[name, 8192, 1024] == (0.8, None) for name in leaves.MAKERS if name != "softmax_xent")
    assert wanted["softmax_xent", 4096, 32000] == wanted["softmax_xent", 1024, 256000] == (0.8, None)


def content(**environment) -> dict:
    def row(leaf, label, size, backend, ms, issue):
        return dict(op=leaf, label=label, size=size, candidate=backend, ms=ms, issue_ms=issue, floor_ms=ms / 2)

    rows = [
        row("norm_act", "a", "large", "cuda", 1.0, 9.0), row("norm_act", "a", "large", "triton", 2.0, 0.1),
        row("norm_act", "b", "large", "cuda", 1.0, 0.1), row("norm_act", "b", "large", "triton", 0.5, 0.1),
        row("norm_act", "c", "small", "cuda", 0.1, 0.4), row("norm_act", "c", "small", "triton", 0.2, 0.3),
        row("flow_mse", "a", "large", "cuda", 0.1, 0.1),
    ]  # fmt: skip
    rows = [r | dict(dtype="bfloat16") for r in rows]
    return dict(
        environment=dict(capability="9.0", date="2026-01-01", device="GPU", torch="2", **environment), rows=rows
    )


def test_the_faster_backend_is_chosen_with_its_origin(tmp_path, monkeypatch):
    """By the sum over the shapes that both were timed at; where calls are small, by what they cost the CPU too."""
    path = tmp_path / "leaves-gpu.json"
    path.write_text(json.dumps(content()))
    monkeypatch.setattr(fastest, "FILE", tmp_path / "fastest.json")
    other = dict(capability="8.0", leaf="norm_act", size="large", backend="cuda", ms={}, origin="old.json")
    fastest.FILE.write_text(json.dumps([other]))
    for _ in range(2):  # a second time it takes the place of the first
        leaves.choose(path)
        found = json.loads(fastest.FILE.read_text())
    common = dict(capability="9.0", leaf="norm_act", origin="leaves-gpu.json")
    assert found == [
        other,
        common | dict(size="large", backend="cuda", ms=dict(cuda=2.0, triton=2.5)),
        common | dict(size="small", backend="triton", ms=dict(cuda=0.4, triton=0.3)),
    ]


def test_the_readme_has_the_table_of_the_newest_gpu(tmp_path, monkeypatch):
    readme = (leaves.ROOT / "README.md").read_text()
    assert leaves.with_table(readme) == readme
    monkeypatch.setattr(leaves, "FOLDER", tmp_path)
    assert "no table" in leaves.table()
    (tmp_path / "leaves-gpu.json").write_text(json.dumps(content()))
    text = leaves.with_table(readme)
    assert "| norm_act | a | bfloat16 | cuda | 1.0000 | 50% |" in text and text.count(leaves.MARKS[0]) == 1

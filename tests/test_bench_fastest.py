"""What `bench choose` takes for `auto`."""

import json

from benchmarks import command
from sfr_kernels.leaves import fastest


def content() -> dict:
    def row(leaf, label, size, provider, ms, issue, dtype="bfloat16"):
        info = dict(op=leaf, label=label, dtype=dtype, provider=provider, kind="ours", issue_ms=issue)
        return dict(stats=dict(median=ms / 1e3), extra_info=info | (dict(size=size) if size else {}))

    rows = [
        row("norm_act", "a", "large", "cuda", 1.0, 9.0), row("norm_act", "a", "large", "triton", 2.0, 0.1),
        row("norm_act", "a", "large", "cuda", 1.0, 0.1, "float16"),
        row("norm_act", "a", "large", "triton", 0.5, 0.1, "float16"),
        row("norm_act", "c", "small", "cuda", 0.1, 0.4), row("norm_act", "c", "small", "triton", 0.2, 0.3),
        row("norm_act", "d", "small", "eager", 0.01, 0.01),
        row("flow_mse", "a", "large", "cuda", 0.1, 0.1),
        row("sfr_loss", "a", None, "cuda", 0.1, 0.1), row("sfr_loss", "a", None, "triton", 0.1, 0.1),
    ]  # fmt: skip
    device = dict(name="GPU", kind="cuda", capability="9.0")
    return dict(benchmarks=rows, sfr_kernels=dict(device=device, absent=[], failed=[]))


def test_the_faster_backend_is_chosen_with_its_origin(tmp_path, monkeypatch):
    """By the sum over the shapes that both were timed at; where calls are small, by what they cost the CPU too."""
    path = tmp_path / "bench-gpu.json"
    path.write_text(json.dumps(content()))
    monkeypatch.setattr(fastest, "FILE", tmp_path / "fastest.json")
    other = dict(capability="8.0", leaf="norm_act", size="large", backend="cuda", ms={}, origin="old.json")
    fastest.FILE.write_text(json.dumps([other]))
    for _ in range(2):  # a second time it takes the place of the first
        assert command.main(["choose", str(path)]) == 0
        found = json.loads(fastest.FILE.read_text())
    common = dict(capability="9.0", leaf="norm_act", origin="bench-gpu.json")
    assert found == [
        other,
        common | dict(size="large", backend="cuda", ms=dict(cuda=2.0, triton=2.5)),
        common | dict(size="small", backend="triton", ms=dict(cuda=0.4, triton=0.3)),
    ]

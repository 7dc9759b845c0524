"""The benchmark of targets: README says what its newest result files say, and its parts run."""

import torch

from benchmarks import targets
from benchmarks.results import FOLDER
from sfr_kernels.targets import TargetStore


def test_the_readme_says_what_was_measured():
    readme = (targets.ROOT / "README.md").read_text()
    assert targets.with_section(readme) == readme
    assert targets.section([]).startswith("Nothing has been measured")
    for path in FOLDER.glob("targets-*.json"):
        assert path.name in readme


def test_sizes_and_times_come_from_a_store_of_that_size(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "BILLION", 40_000_000)
    found = targets.size(tmp_path / "s", "float16", 32)
    store = TargetStore.open(tmp_path / "s")
    assert found["tokens"] == 1536 * len(store) >= 40_000
    assert found["bytes"] == sum(p.stat().st_size for p in (tmp_path / "s").iterdir())
    times = targets.collating(store, rounds=10)
    assert set(times) == {"padded", "packed", "lookup"} and all(0 < ms < 100 for ms in times.values())


def test_a_build_is_compared_with_the_encoder_on_the_same_texts(tmp_path):
    seen = []

    class Encoder(targets.RandomEncoder):
        def encode_document(self, texts, **options):
            seen.append(len(texts))
            return super().encode_document(texts, **options)

    samples = targets.long_samples(30_000)
    found = targets.building(Encoder(8), samples, targets.OneWord(), tmp_path / "s", torch.device("cpu"), 2)
    assert found["tokens"] == 1536 * len(samples)
    assert sum(seen[1:]) == 4 * found["segments"]  # after the warm-up: alone and built, twice

"""Encoding, storing and collating targets."""

import json

import pytest
import torch
from tiny import CONFIG, TARGET, pad, tiny_samples, tiny_store
from transformers import DataCollatorWithFlattening

from sfr_kernels import SFRConfig, SupervisedRows
from sfr_kernels.leaves import FlowPath
from sfr_kernels.leaves.torch import flow_path
from sfr_kernels.targets import SFRCollator, TargetStore, build_targets, encode, load_encoder
from sfr_kernels.training.models import MINILM, encoder_path

SAMPLES = tiny_samples()
STORE = tiny_store(SAMPLES)


@pytest.fixture(scope="module")
def minilm():
    return load_encoder(encoder_path(MINILM), "cpu")


class Words:
    """A tokenizer's decoder: every id is a word."""

    def batch_decode(self, pieces, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(f"word{i}" for i in piece) for piece in pieces]


def test_encode_embeds_each_distinct_text_once(minilm, monkeypatch):
    calls, plain = [], minilm.encode_document
    monkeypatch.setattr(minilm, "encode_document", lambda texts, **k: calls.extend(texts) or plain(texts, **k))
    out = encode(minilm, ["a storm at sea", "", "tea", "a storm at sea"], progress=False)
    assert sorted(calls) == ["a storm at sea", "tea"]
    assert out.dtype == torch.float32 and out.shape == (4, 384)
    assert torch.equal(out[0], out[3]) and not out[1].any()
    torch.testing.assert_close(out[[0, 2]].norm(dim=1), torch.ones(2))


def test_an_encoder_that_returns_nan_is_refused(minilm, monkeypatch):
    plain = minilm.encode_document
    monkeypatch.setattr(minilm, "encode_document", lambda texts, **k: plain(texts, **k) * float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        encode(minilm, ["tea"], progress=False)


def test_an_encoder_that_cannot_be_loaded_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path / "absent"), "nobody/no-such-encoder"):
        with pytest.raises(RuntimeError, match=r"encoder .* cannot be loaded"):
            load_encoder(name)


def test_targets_are_the_text_ahead_and_are_kept(minilm, tmp_path, monkeypatch):
    store = build_targets(SAMPLES, CONFIG, Words(), minilm, folder=tmp_path / "t", progress=False)
    labels = torch.tensor([SAMPLES[2]["labels"]])
    rows = SupervisedRows.from_labels(labels, CONFIG)
    texts = [" ".join(f"word{i}" for i in labels[0, a:b].tolist()) for a, b in rows.segments.tolist()]
    torch.testing.assert_close(store.lookup([2]), encode(minilm, texts, progress=False))
    assert rows.segments[0].tolist()[0] == SAMPLES[2]["labels"].index(next(x for x in SAMPLES[2]["labels"] if x >= 0))

    def fail(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(minilm, "encode_document", fail)
    again = build_targets(SAMPLES, CONFIG, Words(), minilm, folder=tmp_path / "t", progress=False)
    assert torch.equal(again.embeddings, store.embeddings)
    with pytest.raises(ValueError, match="stride: stored 4, wanted 5"):
        other = SFRConfig(**{**CONFIG.to_dict(), "stride": 5})
        build_targets(SAMPLES, other, Words(), minilm, folder=tmp_path / "t", progress=False)
    with pytest.raises(AssertionError, match="encoded again"):  # which is what replace is for
        build_targets(SAMPLES, other, Words(), minilm, folder=tmp_path / "t", progress=False, replace=True)
    with pytest.raises(ValueError, match="labels: stored"):
        changed = [*SAMPLES[:-1], {"labels": [-100, 5, 6]}]
        build_targets(changed, CONFIG, Words(), minilm, folder=tmp_path / "t", progress=False)


def test_official_targets_of_short_suffixes_are_zero(minilm):
    store = build_targets(SAMPLES, SFRConfig.official(stride=4, min_tokens=3), Words(), minilm, progress=False)
    norms = store.embeddings.norm(dim=1)
    assert ((norms == 0) | ((norms - 1).abs() < 1e-5)).all() and (norms == 0).any() and (norms > 0).any()


def test_a_save_that_fails_leaves_the_old_store(tmp_path, monkeypatch):
    STORE.save(tmp_path / "s")
    monkeypatch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tiny_store(SAMPLES, seed=1).save(tmp_path / "s")
    monkeypatch.undo()
    assert torch.equal(TargetStore.load(tmp_path / "s").embeddings, STORE.embeddings)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_store_errors():
    with pytest.raises(ValueError, match="NaN"):
        TargetStore(torch.full((2, 3), float("nan")), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="cu_anchors"):
        TargetStore(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(IndexError, match="sample_id 99"):
        STORE.lookup([99])


def noise_of(batch):
    """x_t of every flow row, by the row's identity."""
    rows = batch["rows"]
    n = rows.num_flow
    half, first = torch.tensor([0.5]), torch.zeros(n, dtype=torch.int32)
    seed = torch.tensor([3])
    path = FlowPath(batch["targets"], half, rows.noise_id[:n], rows.anchor[:n], first, seed, 2.0, 1.0)
    x_t = flow_path(path, torch.float32)
    return dict(zip(rows.noise_id.tolist(), x_t, strict=False))


@pytest.mark.parametrize("kind", ["reordered", "alone", "left padded", "packed"])
def test_a_row_keeps_its_noise_and_target_however_it_is_batched(kind):
    collate = SFRCollator(CONFIG, STORE, pad)
    wanted = noise_of(collate(SAMPLES))
    if kind == "reordered":
        found = noise_of(collate(SAMPLES[::-1]))
    elif kind == "alone":
        found = {k: v for s in SAMPLES for k, v in noise_of(collate([s])).items()}
    elif kind == "left padded":
        found = noise_of(SFRCollator(CONFIG, STORE, lambda f: {k: v.flip(1) for k, v in pad(
            [{k: v[::-1] for k, v in s.items()} for s in f]).items()})(SAMPLES))  # fmt: skip
    else:
        packer = DataCollatorWithFlattening(return_tensors="pt")
        found = noise_of(SFRCollator(CONFIG, STORE, packer)(SAMPLES))
    assert found.keys() == wanted.keys()
    for identity, value in wanted.items():
        assert torch.equal(found[identity], value)


def test_collator_errors():
    with pytest.raises(ValueError, match="sample_id"):
        SFRCollator(CONFIG, STORE, pad)([{k: v for k, v in SAMPLES[0].items() if k != "sample_id"}])
    cut = [{k: v[: len(v) - 8] if isinstance(v, list) else v for k, v in s.items()} for s in SAMPLES]
    with pytest.raises(ValueError, match="anchors"):
        SFRCollator(CONFIG, STORE, pad)(cut)
    with pytest.raises(ValueError, match="TargetStore"):
        SFRCollator(CONFIG, None, pad)


def test_mtp_needs_no_store():
    batch = SFRCollator(SFRConfig(loss="mtp"), None, pad)(SAMPLES)
    assert torch.equal(batch["targets"], batch["rows"].labels)
    assert batch["targets"].shape != (0, TARGET)

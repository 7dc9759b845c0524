"""Encoding with real sentence-transformers models, through their own API."""

import pytest
import torch
from sentence_transformers import SentenceTransformer

from sfr_kernels.targets import encode, load_encoder
from sfr_kernels.targets.encoder import describe_encoder
from sfr_kernels.targets.manifest import differences
from sfr_kernels.training.models import MINILM, encoder_path

TEXTS = ["a storm at sea", None, "tea", "a storm at sea", "", "a longer text about tea and storms"]


@pytest.fixture(scope="module")
def minilm():
    return load_encoder(encoder_path(MINILM), "cpu")


def test_each_distinct_text_is_embedded_once(minilm, monkeypatch):
    calls, done, plain = [], [], minilm.encode_document
    monkeypatch.setattr(minilm, "encode_document", lambda texts, **k: calls.extend(texts) or plain(texts, **k))
    out = torch.from_numpy(encode(minilm, TEXTS, on_done=done.append))
    assert sorted(calls) == ["", "a longer text about tea and storms", "a storm at sea", "tea"] and sum(done) == 6
    assert out.dtype == torch.float32 and out.shape == (6, 384)
    assert torch.equal(out[0], out[3]) and not out[1].any()
    torch.testing.assert_close(out[[0, 2, 4, 5]].norm(dim=1), torch.ones(4))
    wanted = minilm.encode([t for t in TEXTS if t is not None], normalize_embeddings=True)
    torch.testing.assert_close(out[[0, 2, 3, 4, 5]], torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)
    assert encode(minilm, [None]).shape == (1, 384) and encode(minilm, []).shape == (0, 384)


def test_fewer_coordinates_are_normalized_again():
    encoder = load_encoder(encoder_path(MINILM), "cpu", truncate_dim=64)
    out = encode(encoder, TEXTS)
    assert out.shape == (6, 64)
    torch.testing.assert_close(torch.from_numpy(out[[0, 2]]).norm(dim=1), torch.ones(2))
    assert describe_encoder(encoder)["target_size"] == 64
    with pytest.raises(ValueError, match="truncate_dim must be from 1 to the encoder's 384, got 400"):
        load_encoder(encoder_path(MINILM), "cpu", truncate_dim=400)


def test_a_prompt_for_documents_is_used_and_part_of_the_identity(minilm):
    prompted = SentenceTransformer(encoder_path(MINILM), device="cpu", prompts={"document": "title: ", "query": "q: "})
    assert describe_encoder(prompted)["prompt"] == "title: "
    wanted = torch.from_numpy(encode(minilm, ["title: tea"]))
    torch.testing.assert_close(torch.from_numpy(encode(prompted, ["tea"])), wanted, rtol=1e-4, atol=1e-5)
    (difference,) = [
        d for d in differences(describe_encoder(minilm), describe_encoder(prompted)) if d.startswith("prompt")
    ]
    assert difference == "prompt: stored '', wanted 'title: '"


def test_the_identity_sees_every_weight_and_setting(minilm):
    mine = describe_encoder(minilm)
    again = load_encoder(encoder_path(MINILM), "cpu")
    assert not differences(mine, describe_encoder(again))
    with torch.no_grad():
        again[0].auto_model.encoder.layer[3].output.dense.weight[7, 9] += 1e-3
    assert [d.split(":")[0] for d in differences(mine, describe_encoder(again))] == ["weights"]
    again = load_encoder(encoder_path(MINILM), "cpu")
    again.max_seq_length = 128
    assert "max_seq_length: stored 256, wanted 128" in differences(mine, describe_encoder(again))


def test_an_encoder_that_cannot_be_loaded_says_so(tmp_path):
    for name in (str(tmp_path / "absent"), "nobody/no-such-encoder"):
        with pytest.raises(RuntimeError, match=r"encoder .* cannot be loaded"):
            load_encoder(name)

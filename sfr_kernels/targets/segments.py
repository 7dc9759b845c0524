"""The anchors of samples and the text of each anchor's segment.

`SupervisedRows.from_labels` decides which positions are anchors; here the labels ahead of each become text, and
anchors whose text is blank are dropped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import SFRConfig
from ..rows import IGNORE_INDEX, SupervisedRows

_PART = "\ufffd"  # a decoder's replacement for a part of a character
_LONGEST = 4  # bytes of a character, so at most as many tokens
# A stop, with closing quotes and brackets, before a space; a full-width stop; the end of a line.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s|$)|[。！？｡]+[」』”’)）]*|\n")


@dataclass(frozen=True)
class Segments:
    """The anchors of S samples, sample after sample."""

    cu_anchors: Tensor  # (S + 1,) int64: sample i has anchors cu_anchors[i] to cu_anchors[i + 1]
    positions: Tensor  # (A, 2) int32: where in its sample each anchor's labels start and stop; equal: no target
    label_hash: Tensor  # (S,) int64, of `hash_labels`
    texts: list[str | None]  # A; None where there is no target


def segments_of(samples: Sequence[dict], config: SFRConfig, tokenizer) -> Segments:
    """Anchors and texts of samples with "labels" and, where a sample is packed, what `packed_starts` reads. The samples
    are laid end to end, so that one call finds all their anchors."""
    lengths = torch.tensor([len(s["labels"]) for s in samples], dtype=torch.int64)
    sample = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    start = lengths.cumsum(0) - lengths
    columns = [np.asarray(s["labels"], dtype=np.int64) for s in samples]
    labels = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *columns]))
    position = torch.arange(labels.numel()) - start[sample]
    first = position == 0
    for i, s in enumerate(samples):
        first[start[i] + torch.tensor(packed_starts(s, f"sample {i}"), dtype=torch.int64)] = True
    rows, texts = rows_and_texts(labels[None], config, tokenizer, segment_ids=first.cumsum(0)[None])
    owner = sample[rows.segments[:, 0]]
    count = torch.bincount(owner, minlength=len(samples))
    return Segments(
        cu_anchors=torch.cat([count.new_zeros(1), count.cumsum(0)]),
        positions=(rows.segments - start[owner][:, None]).int(),
        label_hash=hash_labels(*(t[None] for t in (labels, position, sample, first)), len(samples), config),
        texts=texts,
    )


def packed_starts(sample: dict, name: str) -> list[int]:
    """Where the samples packed into this one begin, by "position_ids" that restart, or by TRL's "seq_lengths".
    ValueError naming the sample if they do not fit its length."""
    length = len(sample["labels" if sample.get("labels") is not None else "input_ids"])
    if (positions := sample.get("position_ids")) is not None:
        positions = np.asarray(positions)
        if positions.shape[-1:] != (length,):
            raise ValueError(f"{name} has {length} labels and {positions.shape[-1]} position_ids")
        while positions.ndim > 1:
            positions = positions[0]  # a vision model has several axes: the first is that of the text
        return np.flatnonzero(positions == 0).tolist()
    if (lengths := sample.get("seq_lengths")) is not None:
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        if ends.size == 0 or ends[-1] != length or (np.asarray(lengths) < 1).any():
            raise ValueError(f"{name} has {length} labels, its seq_lengths {list(lengths)} are not parts of them")
        return [0, *ends[:-1].tolist()]
    return []


def hash_labels(
    labels: Tensor,  # (S, L) int64, a sample a row; or (1, N), samples end to end
    position: Tensor,  # like labels, int64: the token's place in its sample
    sample: Tensor,  # (S, 1) int64, or like labels: the token's sample
    first: Tensor,  # like labels, bool: the token begins a sample, or one that is packed into it
    num_samples: int,
    config: SFRConfig,
) -> Tensor:  # (S,) int64
    """A hash of each sample's supervised labels and their places, from which its targets follow. The first label of a
    sample, which no token predicts, does not count (but with target_rule "published"): collators that pack mask it."""
    counts = labels != IGNORE_INDEX
    if config.target_rule == "following":
        counts &= ~first
    # Multiply and xorshift, modulo 2⁶⁴; then a sum, for which the order of tokens does not matter.
    mixed = (labels + 1).mul_(-7046029254386353131)
    mixed ^= mixed >> 29
    mixed *= (position * -4658895280553007688).sub_(7723592293110705685)
    mixed ^= mixed >> 32
    mixed *= counts
    if sample.shape == (num_samples, 1):
        return mixed.sum(1)
    out = torch.zeros(num_samples, dtype=torch.int64, device=labels.device)
    return out.index_add_(0, sample.reshape(-1), mixed.reshape(-1))


def rows_and_texts(
    labels: Tensor,  # (B, L) on the CPU
    config: SFRConfig,
    tokenizer,  # of the language model
    **identity: Tensor | None,  # segment_ids, noise_id, has_targets and real of `SupervisedRows.from_labels`
) -> tuple[SupervisedRows, list[str | None]]:
    """The rows of labels, and the A texts; None where an anchor was dropped: blank text, or too few tokens."""
    rows = SupervisedRows.from_labels(labels, config, **identity)
    texts = segment_texts(labels, rows, tokenizer, config)
    blank = [text is None for text in texts]
    if any(blank):
        blank = torch.tensor(blank, dtype=torch.bool)
        rows = SupervisedRows.from_labels(labels, config, **identity, blank=blank)
    return rows, texts


def segment_texts(
    labels: Tensor,  # (B, L) or (N,), as given to SupervisedRows.from_labels
    rows: SupervisedRows,
    tokenizer,  # of the language model
    config: SFRConfig,
) -> list[str | None]:  # A texts
    """The text ahead of every anchor, without special tokens and parts of characters at its ends; None where blank."""
    flat = labels.reshape(-1).tolist()
    pieces = [[x for x in flat[start:stop] if x != IGNORE_INDEX] for start, stop in rows.segments.tolist()]
    texts = _decode_whole(tokenizer, pieces)
    if config.segment == "sentence":
        heads = _decode(tokenizer, [piece[: config.min_tokens] for piece in pieces])
        texts = [_first_sentence(text, len(head.rstrip(_PART))) for text, head in zip(texts, heads, strict=True)]
    return [text.strip() or None for text in texts]


def _decode(tokenizer, pieces: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(pieces, skip_special_tokens=True) if pieces else []


def _decode_whole(tokenizer, pieces: list[list[int]]) -> list[str]:
    """The text of each piece without the tokens at its ends that hold a part of a character. Tokens are dropped, not
    text: with byte fallback such a part makes the decoder replace whole characters beside it."""
    pieces, texts = list(pieces), _decode(tokenizer, pieces)
    for _ in range(_LONGEST - 1):
        broken = [i for i, text in enumerate(texts) if text.startswith(_PART) or text.endswith(_PART)]
        for i in broken:
            pieces[i] = pieces[i][texts[i].startswith(_PART) : len(pieces[i]) - texts[i].endswith(_PART)]
        for i, text in zip(broken, _decode(tokenizer, [pieces[i] for i in broken]), strict=True):
            texts[i] = text
    return [text.strip(_PART) for text in texts]


def _first_sentence(text: str, least: int) -> str:
    """The text up to the first end of a sentence at or after `least` characters; all of it if there is none."""
    return next((text[: end.end()] for end in _SENTENCE_END.finditer(text) if end.end() >= least), text)

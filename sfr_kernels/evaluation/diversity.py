"""How different answers are from each other, in words and in meaning.

Words are those of sacrebleu's tokenizer "13a", in lower case; of scripts that put no spaces between words, such as
Chinese, Japanese and Thai, each character is one. Embeddings are unit vectors, e.g. of a sentence encoder. A value that
is not defined, such as the distance between the answers of a set of one, is NaN.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import regex
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

_split = Tokenizer13a()
_UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


@lru_cache(maxsize=1 << 16)  # every measure reads the same answers
def words(text: str) -> tuple[str, ...]:
    return tuple(_split(_UNSPACED.sub(r" \g<0> ", text.lower())).split())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    tokens = words(text)
    return [tokens[i : i + n] for i in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """The share of the texts' n-grams that are different, over all texts together (Li et al. 2016, arXiv 1510.03055).
    It falls with the length of the texts."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else math.nan


def expectation_adjusted_distinct(texts: Sequence[str], vocabulary: int) -> float:
    """How many different words the texts have, over how many as long texts would have whose words were drawn evenly
    from a vocabulary of V: N / (V (1 − ((V − 1) / V)^C)), N different ones of C words (Liu et al. 2022, arXiv
    2202.13587, eq. 4). ValueError for an empty vocabulary."""
    if vocabulary < 1:
        raise ValueError(f"vocabulary must be at least 1, got {vocabulary}")
    found = [word for text in texts for word in words(text)]
    if not found:
        return math.nan
    expected = vocabulary * (1 - ((vocabulary - 1) / vocabulary) ** len(found))
    return len(set(found)) / expected


def self_bleu(texts: Sequence[str]) -> float:
    """The mean BLEU, 0 to 100, of each text with the others as its references (Zhu et al. 2018, arXiv 1802.01886):
    sacrebleu's sentence BLEU, its own smoothing and effective order. 100: each has its words in another, in order."""
    if len(texts) < 2:
        return math.nan
    bleu, spaced = BLEU(tokenize="none", effective_order=True), [" ".join(words(text)) for text in texts]
    scores = []
    for i, text in enumerate(spaced):
        others = [*spaced[:i], *spaced[i + 1 :]]
        scores.append(100.0 if text in others else bleu.sentence_score(text, others).score)  # silence, too, repeats
    return sum(scores) / len(scores)


def vendi_score(
    embeddings: np.ndarray,  # (n, d), unit vectors
) -> float:
    """The effective number of different texts, 1 to n: the exponential of the entropy −Σ λ log λ of the eigenvalues of
    K / n, K the cosine similarities (Friedman & Dieng 2023, arXiv 2210.02410, definition 3.1)."""
    if not len(embeddings):
        return math.nan
    values = np.linalg.svd(embeddings.astype(np.float64), compute_uv=False) ** 2 / len(embeddings)
    values = values[values > 1e-12]
    return float(np.exp(-np.sum(values * np.log(values))))


def mean_distance(
    embeddings: np.ndarray,  # (n, d), unit vectors
) -> float:
    """The mean of 1 − cosine over all pairs; 0: all have the same meaning."""
    n = len(embeddings)
    if n < 2:
        return math.nan
    total = embeddings.astype(np.float64).sum(axis=0)  # |Σ e|² = n + Σ over ordered pairs
    return float(1 - (total @ total - n) / (n * (n - 1)))


def similarity_between(
    groups: Sequence[np.ndarray],  # G of (n, d), unit vectors: a group for each persona
) -> np.ndarray:
    """(G, G): the mean cosine of a text of one group with one of another; on the diagonal, of two different texts of
    the group, NaN where it has one."""
    means = np.array([group.astype(np.float64).mean(axis=0) for group in groups])
    matrix = means @ means.T
    for i, group in enumerate(groups):
        matrix[i, i] = 1 - mean_distance(group)
    return matrix


def repetition(text: str, n: int = 4) -> float:
    """The share of the n-grams of a text that it has said before (seq-rep-n of Welleck et al. 2020, arXiv 1908.04319);
    0 for one that is shorter."""
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0

"""What the measures of answers say: by hand, by other packages, and of systems whose collapse is known."""

import math

import numpy as np
import pytest
from corpora import needs
from sacrebleu.metrics import BLEU

from sfr_kernels.evaluation.diversity import (
    distinct,
    expectation_adjusted_distinct,
    mean_distance,
    repetition,
    self_bleu,
    similarity_between,
    vendi_score,
    words,
)
from sfr_kernels.evaluation.fidelity import StyleProbe, relevance

CORNERS = np.eye(3)


def at(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_words_are_in_lower_case_and_apart_from_punctuation():
    assert words("The sea, the SEA! It's 3.5 m") == ("the", "sea", ",", "the", "sea", "!", "it's", "3.5", "m")


def test_distinct_counts_over_all_texts():
    # a b a c | a b: six words, three different; bigrams ab ba ac ab: none across texts, three different
    assert distinct(["a b a c", "a b"], 1) == 3 / 6 and distinct(["a b a c", "a b"], 2) == 3 / 4
    assert distinct(["a", "b"], 1) == 1 and math.isnan(distinct(["a"], 2)) and math.isnan(distinct([], 1))


def test_expectation_adjusted_distinct():
    # two words from a vocabulary of two: 1.5 different ones are expected
    assert expectation_adjusted_distinct(["a b"], 2) == pytest.approx(2 / 1.5)
    assert expectation_adjusted_distinct(["a a"], 2) == pytest.approx(1 / 1.5)
    # words drawn evenly score 1 however many there are, where distinct-1 falls with the length
    draw = np.random.default_rng(0)
    for count in (200, 2000):
        text = " ".join(f"w{i}" for i in draw.integers(0, 500, count))
        assert expectation_adjusted_distinct([text], 500) == pytest.approx(1, abs=0.05)
    assert math.isnan(expectation_adjusted_distinct([""], 2))
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got 0"):
        expectation_adjusted_distinct(["a"], 0)


def test_self_bleu():
    same = "the cat sat on the mat"
    assert self_bleu([same] * 3) == pytest.approx(100)
    assert self_bleu([same, same.upper()]) == pytest.approx(100)
    assert self_bleu(["one two three four", "five six seven eight"]) < 15  # smoothing alone
    # by hand: of "a b c d e" against "a b c d f", 4/5, 3/4, 2/3 and 1/2 of the n-grams, and as long
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    three = ["the sky is blue today", "the sky is grey today", "rain falls on the hill"]
    corpus = [BLEU(effective_order=True).sentence_score(t, [x for x in three if x != t]).score for t in three]
    assert self_bleu(three) == pytest.approx(np.mean(corpus))
    assert math.isnan(self_bleu([same])) and self_bleu(["", ""]) == 100
    chinese = "海上的船长说风会来"
    assert words(chinese) == tuple(chinese) and self_bleu([chinese, chinese[:-1] + "去"]) > 50


def test_vendi_score_counts_what_is_different():
    assert vendi_score(CORNERS) == pytest.approx(3)
    assert vendi_score(np.repeat(CORNERS[:1], 5, axis=0)) == pytest.approx(1)
    assert vendi_score(np.repeat(CORNERS, 4, axis=0)) == pytest.approx(3)
    # 60 degrees: K / 2 has eigenvalues 3/4 and 1/4
    assert vendi_score(at(0, 60)) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert math.isnan(vendi_score(np.zeros((0, 3))))


def test_vendi_score_is_that_of_its_authors():
    needs("vendi_score")
    from vendi_score.vendi import score_dual

    x = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert vendi_score(x) == pytest.approx(score_dual(x, normalize=True), rel=1e-5)


def test_mean_distance_and_similarity():
    assert mean_distance(at(0, 60, 120)) == pytest.approx((0.5 + 0.5 + 1.5) / 3)
    assert mean_distance(at(7, 7, 7)) == pytest.approx(0, abs=1e-12) and math.isnan(mean_distance(at(0)))
    matrix = similarity_between([at(0, 60), at(90)])
    cos = np.cos(np.radians([90, 30]))
    assert matrix[0, 1] == matrix[1, 0] == pytest.approx(cos.mean()) and matrix[0, 0] == pytest.approx(0.5)
    assert math.isnan(matrix[1, 1])


def test_repetition():
    assert repetition("a b c d e f g") == 0 and repetition("a b") == 0
    assert repetition("a b a b a b", n=2) == pytest.approx(1 - 2 / 5)  # ab ba ab ba ab


def test_the_style_probe_knows_who_speaks():
    draw = np.random.default_rng(0)
    centres = np.linalg.qr(draw.normal(size=(16, 16)))[0][:3]

    def speak(who: np.ndarray) -> np.ndarray:
        x = centres[who] + 0.15 * draw.normal(size=(len(who), 16))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    who = np.repeat(np.arange(3), 30)
    names = np.array(["pirate", "monk", "robot"])
    probe = StyleProbe(speak(who), names[who])
    assert probe.personas == set(names)
    right = probe.recognised(speak(who), names[who])
    assert right.dtype == bool and right.mean() > 0.95
    assert probe.recognised(speak(who), names[(who + 1) % 3]).mean() < 0.05
    one = probe.recognised(speak(np.zeros(90, int)), names[who])  # all speak like the first
    assert one.mean() == pytest.approx(1 / 3, abs=0.05)
    with pytest.raises(ValueError, match=r"personas must be at least two .* got \['pirate'\]"):
        StyleProbe(speak(who[:3]), ["pirate"] * 3)


def test_relevance_is_of_each_answer_to_its_prompt():
    assert relevance(at(0, 90), at(60, 90)) == pytest.approx([0.5, 1])

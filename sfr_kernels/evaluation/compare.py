"""Models side by side: what their answers measure, prompt by prompt, and which differences are more than chance.

Every measure has one value for each prompt, and prompts are what an interval resamples: two answers to one prompt say
less than two answers to different prompts.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, t

from .diversity import (
    distinct,
    expectation_adjusted_distinct,
    mean_distance,
    repetition,
    self_bleu,
    similarity_between,
    vendi_score,
    words,
)
from .fidelity import StyleProbe, relevance
from .generate import Answer

FEWEST_PROMPTS = 5  # of fewer, no interval is given

# What a difference between models is claimed of; 1: more is better, −1: less is, 0: neither.
CLAIMS = {
    "pass@1": 1,
    "distance between personas": 1,
    "distance between samples": 1,
    "style fidelity": 1,
    "relevance": 1,
}
# The same by other measures, and at what price.
DETAILS = {
    "Vendi score between personas": 1,
    "self-BLEU between personas": -1,
    "Vendi score between samples": 1,
    "self-BLEU between samples": -1,
    "distinct-1": 1,
    "distinct-1, expectation-adjusted": 1,
    "distinct-2": 1,
    "words": 0,
    "repetition": -1,
    "unfinished": 0,
}


class Cell(NamedTuple):
    """Who is asked what."""

    prompt: str
    persona: str  # "" where there are none


@dataclass(frozen=True)
class Setting:
    """What the answers of all models are measured against."""

    cells: Sequence[Cell]
    embed: Callable[[list[str]], np.ndarray]  # n texts to (n, d) unit vectors
    vocabulary: int  # how many different words the data's answers have
    probe: StyleProbe | None = None
    references: Sequence[str] | None = None  # for each cell, the answer that the data has

    @property
    def prompts(self) -> list[str]:
        return list(dict.fromkeys(cell.prompt for cell in self.cells))

    @property
    def personas(self) -> list[str]:
        return list(dict.fromkeys(cell.persona for cell in self.cells))


@dataclass(frozen=True)
class Measured:
    values: dict[str, np.ndarray]  # (prompts,) by measure; NaN where it is not defined
    similarity: np.ndarray | None  # (personas, personas): the mean cosine of their answers to one prompt


def measure(
    setting: Setting,
    answers: Sequence[Sequence[Answer]],  # samples, for each cell
) -> Measured:
    """The measures of one model's answers; those that no prompt defines are left out."""
    if len(answers) != len(setting.cells):
        raise ValueError(f"answers must be of {len(setting.cells)} cells, got {len(answers)}")
    flat = [answer.text for samples in answers for answer in samples]
    everything = setting.embed([*flat, *setting.prompts])
    at = np.cumsum([0, *(len(samples) for samples in answers)])
    of_cell = [everything[a:b] for a, b in itertools.pairwise(at)]
    of_prompt = dict(zip(setting.prompts, everything[len(flat) :], strict=True))
    rows, matrices = [], []
    for prompt in setting.prompts:
        inside = [i for i, cell in enumerate(setting.cells) if cell.prompt == prompt]
        personas = [setting.cells[i].persona for i in inside]
        texts = [[answer.text for answer in answers[i]] for i in inside]
        vectors = [of_cell[i] for i in inside]
        row = _lexical(texts, setting.vocabulary) | _between(texts, vectors) | _within(texts, vectors)
        whole = np.concatenate(vectors)
        row["relevance"] = relevance(whole, np.broadcast_to(of_prompt[prompt], whole.shape)).mean()
        row["unfinished"] = np.mean([not answer.finished for i in inside for answer in answers[i]])
        if setting.probe is not None:
            meant = [persona for persona, part in zip(personas, vectors, strict=True) for _ in part]
            known = np.array([persona in setting.probe.personas for persona in meant])
            right = setting.probe.recognised(whole, meant)
            row["style fidelity"] = right[known].mean() if known.any() else math.nan
        rows.append(row)
        if len(setting.personas) > 1:
            matrices.append(_among(setting.personas, personas, vectors))
    values = {name: np.array([row.get(name, math.nan) for row in rows], np.float64) for name in CLAIMS | DETAILS}
    values = {name: column for name, column in values.items() if not np.isnan(column).all()}
    return Measured(values, _mean(matrices) if matrices else None)


def _lexical(texts: list[list[str]], vocabulary: int) -> dict[str, float]:
    flat = list(itertools.chain(*texts))
    return {
        "distinct-1": distinct(flat, 1),
        "distinct-1, expectation-adjusted": expectation_adjusted_distinct(flat, vocabulary),
        "distinct-2": distinct(flat, 2),
        "words": np.mean([len(words(text)) for text in flat]),
        "repetition": np.mean([repetition(text) for text in flat]),
    }


def _between(texts: list[list[str]], vectors: list[np.ndarray]) -> dict[str, float]:
    """Of the personas' answers to one prompt, each with its first sample, each with its second, and so on: so that the
    number of samples changes no value."""
    if len(texts) < 2:
        return {}
    rounds = [list(texts) for texts in zip(*texts, strict=True)]
    embedded = [np.stack(vectors) for vectors in zip(*vectors, strict=True)]
    return {f"{name} between personas": value for name, value in _diversity(rounds, embedded).items()}


def _within(texts: list[list[str]], vectors: list[np.ndarray]) -> dict[str, float]:
    return {f"{name} between samples": value for name, value in _diversity(texts, vectors).items()}


def _diversity(sets: list[list[str]], embedded: list[np.ndarray]) -> dict[str, float]:
    """The mean over sets of texts."""
    if len(sets[0]) < 2:
        return {}
    return {
        "distance": np.mean([mean_distance(x) for x in embedded]),
        "Vendi score": np.mean([vendi_score(x) for x in embedded]),
        "self-BLEU": np.mean([self_bleu(texts) for texts in sets]),
    }


def _among(everyone: list[str], personas: list[str], vectors: list[np.ndarray]) -> np.ndarray:
    """`similarity_between` of the personas that were asked, NaN elsewhere."""
    matrix = np.full((len(everyone), len(everyone)), math.nan)
    at = [everyone.index(persona) for persona in personas]
    matrix[np.ix_(at, at)] = similarity_between(vectors)
    return matrix


def _mean(matrices: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(matrices)
    counts = (~np.isnan(stacked)).sum(axis=0)
    return np.where(counts, np.nansum(stacked, axis=0) / np.maximum(counts, 1), math.nan)


class Interval(NamedTuple):
    """A mean, and the 95% interval around it; NaN for the limits of too few values."""

    mean: float
    low: float
    high: float
    p: float  # of the mean being 0, two-sided: 1 − the level at which the interval reaches 0


def interval(
    values: np.ndarray,  # (prompts,): differences, for a comparison in pairs
    level: float = 0.95,
) -> Interval:
    """The expanded percentile bootstrap (Hesterberg 2015, arXiv 1411.5279, section 4.2): quantiles of the means of
    values drawn again with replacement, so far out that of n normal values they are Student's interval. Plain
    percentiles are too narrow for the dozen prompts that one has. NaNs are left out."""
    values = values[~np.isnan(values)]
    n = len(values)
    if n < FEWEST_PROMPTS:
        return Interval(float(values.mean()) if n else math.nan, math.nan, math.nan, math.nan)
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]), float(values[0]), float(values[0] == 0))
    mean, means, wider = values.mean(), _draws(n) @ values, math.sqrt(n / (n - 1))
    tail = norm.cdf(-wider * t.ppf((1 + level) / 2, n - 1))
    low, high = np.quantile(means, tail, method="lower"), np.quantile(means, 1 - tail, method="higher")
    beyond = (1 + np.count_nonzero(means * np.sign(mean) <= 0)) / (1 + len(means))
    p = 2 * t.sf(-norm.ppf(beyond) / wider, n - 1)
    return Interval(float(mean), float(low), float(high), min(float(p), 1.0))


@lru_cache(maxsize=2)  # of the whole, and of a measure that some prompts do not define
def _draws(n: int) -> np.ndarray:
    """(resamples, n): how often each value is drawn, over n; the same for all measures."""
    resamples = min(100_000, 20_000_000 // n)  # few values are drawn far into the tails
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), resamples) / n


def holm(p: Mapping[str, float], level: float = 0.05) -> set[str]:
    """The names whose null hypothesis is rejected, with at most `level` as the chance of any false one among them (Holm
    1979)."""
    ordered = sorted((name for name, value in p.items() if not math.isnan(value)), key=p.__getitem__)
    rejected: set[str] = set()
    for i, name in enumerate(ordered):
        if p[name] > level / (len(ordered) - i):
            break
        rejected.add(name)
    return rejected


def compare(measured: Mapping[str, Mapping[str, np.ndarray]], baseline: str) -> dict[str, dict]:
    """By model and measure {"mean", "low", "high", "per_prompt"}, and for all but the baseline "difference" from it,
    {"mean", "low", "high", "p", "differs"}: of the claims, whether it is more than chance with all of them counted."""
    result: dict[str, dict] = {}
    for model, values in measured.items():
        rows: dict[str, dict] = {}
        for name, column in values.items():
            own = interval(column)
            rows[name] = {"mean": own.mean, "low": own.low, "high": own.high, "per_prompt": column.tolist()}
        if model != baseline:
            common = [name for name in values if name in measured[baseline]]
            found = {name: interval(values[name] - measured[baseline][name]) for name in common}
            holds = holm({name: x.p for name, x in found.items() if name in CLAIMS})
            for name, x in found.items():
                rows[name]["difference"] = x._asdict() | {"differs": name in holds}
        result[model] = rows
    return result

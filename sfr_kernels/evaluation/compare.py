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

FEWEST_PROMPTS = 6  # of fewer, no interval is given: 100,000 draws do not show the p that Holm's correction asks for
_MOST_REFERENCES = 16  # texts that a self-BLEU compares: its cost grows with the square

# What a difference between models is claimed of; 1: more is promised, −1: less, 0: neither.
CLAIMS = {
    "pass@1": 1,
    "separation of personas": 1,
    "distance between samples": 1,
    "style fidelity": 1,
    "relevance": 1,
}
# The same by other measures, and at what price.
DETAILS = {
    "distance between personas": 1,
    "Vendi score between personas": 1,
    "self-BLEU between personas": -1,
    "distinct-2 between personas": 1,
    "adjusted distinct-1 between personas": 1,
    "Vendi score between samples": 1,
    "self-BLEU between samples": -1,
    "distinct-2 between samples": 1,
    "adjusted distinct-1 between samples": 1,
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
    references: Sequence[Sequence[str]] | None = None  # for each cell, the answers that the data has, as many for each
    probe_knows_references: bool = False  # was fitted to them, too

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
    prompts, everyone = setting.prompts, {persona: i for i, persona in enumerate(setting.personas)}
    inside: dict[str, list[int]] = {prompt: [] for prompt in prompts}
    for i, cell in enumerate(setting.cells):
        inside[cell.prompt].append(i)
    flat = [answer.text for samples in answers for answer in samples]
    everything = setting.embed([*flat, *prompts])
    at = np.cumsum([0, *(len(samples) for samples in answers)])
    of_cell = [everything[a:b] for a, b in itertools.pairwise(at)]
    rows, total = [], np.zeros((2, len(everyone), len(everyone)), np.float64)
    for prompt, of_prompt in zip(prompts, everything[len(flat) :], strict=True):
        cells = inside[prompt]
        texts, vectors = [[answer.text for answer in answers[i]] for i in cells], [of_cell[i] for i in cells]
        whole, spoken = np.concatenate(vectors), list(itertools.chain(*texts))
        row = _between(texts, vectors, setting.vocabulary)
        row["words"] = np.mean([sum(any(map(str.isalnum, word)) for word in words(text)) for text in spoken])
        row["repetition"] = np.mean([repetition(text) for text in spoken])
        row["unfinished"] = np.mean([not answer.finished for i in cells for answer in answers[i]])
        row["relevance"] = relevance(whole, np.broadcast_to(of_prompt, whole.shape)).mean()
        personas = [setting.cells[i].persona for i in cells]
        if setting.probe is not None:
            meant = [persona for persona, part in zip(personas, vectors, strict=True) for _ in part]
            known = np.array([persona in setting.probe.personas for persona in meant])
            right = setting.probe.recognised(whole, meant)
            row["style fidelity"] = right[known].mean() if known.any() else math.nan
        rows.append(row)
        among = similarity_between(vectors)
        place = np.ix_(*[[everyone[persona] for persona in personas]] * 2)
        total[0][place] += np.nan_to_num(among)
        total[1][place] += ~np.isnan(among)
    values = {name: np.array([row.get(name, math.nan) for row in rows], np.float64) for name in CLAIMS | DETAILS}
    values = {name: column for name, column in values.items() if not np.isnan(column).all()}
    mean = np.divide(*total, out=np.full_like(total[0], math.nan), where=total[1] > 0)
    return Measured(values, mean if len(everyone) > 1 else None)


def _between(texts: list[list[str]], vectors: list[np.ndarray], vocabulary: int) -> dict[str, float]:
    """The diversity of a prompt's answers: between its personas, each with its first sample, then each with its second,
    and so on, so that the number of samples changes no value; and between the samples of a persona."""
    rounds, embedded = [list(x) for x in zip(*texts, strict=True)], [np.stack(x) for x in zip(*vectors, strict=True)]
    personas = _diversity(rounds, embedded, vocabulary)
    samples = _diversity(texts, vectors, vocabulary)
    row = {f"{name} between personas": value for name, value in personas.items()}
    row |= {f"{name} between samples": value for name, value in samples.items()}
    if personas and samples:  # what chance does to one persona, it does to two
        row["separation of personas"] = personas["distance"] - samples["distance"]
    return row


def _diversity(sets: list[list[str]], embedded: list[np.ndarray], vocabulary: int) -> dict[str, float]:
    """The means over sets of texts; of sets of one, none."""
    if len(sets[0]) < 2:
        return {}
    return {
        "distance": np.mean([mean_distance(x) for x in embedded]),
        "Vendi score": np.mean([vendi_score(x) for x in embedded]),
        "self-BLEU": np.mean([self_bleu(texts[:_MOST_REFERENCES]) for texts in sets]),
        "distinct-2": np.mean([distinct(texts, 2) for texts in sets]),
        "adjusted distinct-1": np.mean([expectation_adjusted_distinct(texts, vocabulary) for texts in sets]),
    }


class Interval(NamedTuple):
    """A mean, and the 95% interval around it; NaN for the limits and p of too few values."""

    mean: float
    low: float
    high: float
    p: float  # of the mean being 0, two-sided: 1 − the level at which the interval reaches 0, if a draw does


def interval(
    values: np.ndarray,  # (prompts,): differences, for a comparison in pairs
    level: float = 0.95,
) -> Interval:
    """The expanded percentile bootstrap (Hesterberg 2015, arXiv 1411.5279, section 4.2): quantiles of the means of
    values drawn again with replacement, so far out that of n normal values they are Student's interval. Plain
    percentiles are too narrow for the dozen prompts that one has. NaNs are left out. Of equal values other than 0, p is
    that of the sign test, 2 · 2⁻ⁿ."""
    values = values[~np.isnan(values)]
    n = len(values)
    if n < FEWEST_PROMPTS:
        return Interval(float(values.mean()) if n else math.nan, math.nan, math.nan, math.nan)
    mean, rounding = float(values.mean()), 1e-9 * float(np.abs(values).max())
    if np.ptp(values) <= rounding:
        return Interval(mean, mean, mean, 1.0 if mean == 0 else 2.0 ** (1 - n))
    means, wider = _draws(n) @ values, math.sqrt(n / (n - 1))
    tail = norm.cdf(-wider * t.ppf((1 + level) / 2, n - 1))
    low, high = np.quantile(means, tail, method="lower"), np.quantile(means, 1 - tail, method="higher")
    beyond = (1 + np.count_nonzero(means * np.sign(mean) <= rounding)) / (1 + len(means))
    p = 2 * t.sf(-norm.ppf(beyond) / wider, n - 1)
    return Interval(mean, float(low), float(high), min(float(p), 1.0))


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
    {"mean", "low", "high", "p", "differs"}: of the claims, whether it is more than chance with all of the model's
    counted."""
    result: dict[str, dict] = {}
    for model, values in measured.items():
        rows: dict[str, dict] = {}
        for name, column in values.items():
            own = interval(column)
            rows[name] = {"mean": own.mean, "low": own.low, "high": own.high, "per_prompt": column.tolist()}
        if model != baseline:
            common = [name for name in values if name in measured[baseline]]
            # to six decimals: what is less is the rounding of float32 embeddings
            found = {name: interval(np.round(values[name] - measured[baseline][name], 6)) for name in common}
            holds = holm({name: x.p for name, x in found.items() if name in CLAIMS})
            for name, x in found.items():
                rows[name]["difference"] = x._asdict() | {"differs": name in holds}
        result[model] = rows
    return result

"""Arms side by side: differences of paired runs, at equal collapse and at the end, with intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import ttest_1samp

from sfr_kernels.evaluation.compare import Interval, holm, interval

LEVELS = 40  # of collapse, at which two runs are compared
OUTCOMES = "nll", "validity", "coverage"
PRIMARY = "nll at equal overlap"  # chosen before the runs of the result file
History = Sequence[Mapping[str, float]]
Runs = Mapping[tuple, History]  # by arm, world and seed


def at_levels(history: History, outcome: str, levels: np.ndarray) -> np.ndarray:
    """The outcome when `overlap` first was as low as each level, by linear interpolation between checkpoints."""
    overlap = np.minimum.accumulate([point["overlap"] for point in history])
    falling = np.concatenate([[True], np.diff(overlap) < 0])  # np.interp wants distinct places
    values = np.array([point[outcome] for point in history])
    return np.interp(levels, overlap[falling][::-1], values[falling][::-1])


def at_equal_overlap(arm: History, other: History, outcome: str) -> float:
    """The mean difference of the outcome over the overlaps that both runs pass through."""
    ends = [(min(point["overlap"] for point in run), run[0]["overlap"]) for run in (arm, other)]
    levels = np.linspace(max(low for low, _ in ends), min(high for _, high in ends), LEVELS)
    return float(np.mean(at_levels(arm, outcome, levels) - at_levels(other, outcome, levels)))


def differences(runs: Runs, arm: str, other: str) -> dict[str, Interval]:
    """Of `arm` from `other`, paired over the worlds and seeds that have both."""
    own = {key[1:]: history for key, history in runs.items() if key[0] == arm}
    pairs = [(history, runs[other, *key]) for key, history in own.items() if (other, *key) in runs]
    found = {}
    for outcome in OUTCOMES:
        found[f"{outcome} at equal overlap"] = [at_equal_overlap(*pair, outcome) for pair in pairs]
    for outcome in (*OUTCOMES, "overlap"):
        found[f"{outcome} at the end"] = [a[-1][outcome] - b[-1][outcome] for a, b in pairs]
    return {name: interval(np.array(values, np.float64)) for name, values in found.items()}


def over_worlds(runs: Runs, arm: str, other: str) -> Interval:
    """Student's interval of the difference in NLL at equal overlap, a value for each world: the mean over its runs,
    which share its grammar and its pretrained model."""
    found: dict = {}
    for name, world, seed in runs:
        if name == arm and (other, world, seed) in runs:
            pair = runs[arm, world, seed], runs[other, world, seed]
            found.setdefault(world, []).append(at_equal_overlap(*pair, "nll"))
    means = [np.mean(values) for values in found.values()]
    test = ttest_1samp(means, 0)
    return Interval(float(np.mean(means)), *map(float, (*test.confidence_interval(), test.pvalue)))


def proven(found: Mapping[str, Mapping[str, Interval]], outcome: str) -> set[str]:
    """The arms whose difference in the outcome holds with all arms counted (Holm)."""
    return set(holm({arm: values[outcome].p for arm, values in found.items()}))


def by_prompt(answers: Sequence[Mapping], arm: str, other: str) -> dict[str, Interval]:
    """Differences in the measures of the answers: the mean over seeds for each prompt, and the interval over prompts,
    which are fewer and differ more."""
    values = {(x["arm"], x["seed"]): x["values"] for x in answers}
    seeds = [seed for name, seed in values if name == arm and (other, seed) in values]
    first = values[arm, seeds[0]]
    found = {}
    for measure in first:
        rows = [np.array(values[arm, s][measure], float) - np.array(values[other, s][measure], float) for s in seeds]
        found[measure] = interval(np.round(np.mean(rows, 0), 6))
    return found

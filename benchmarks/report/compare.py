"""Two result files against each other: what became slower, larger or wrong.

    python -m sfr_kernels bench compare BASE.json NEW.json [--threshold 0.05] [--provider NAME ...]

Benchmarks are matched by op, label, dtype and provider. Of each there are two ratios of times, new over base: that of
the medians, and that in units of the case's references, which is divided by the median of the same ratio over the
references: the limit, the products and the peers of that case which both files have. What moves all of them is another
clock, or another tenant of the machine, and not our code.

A slow-down counts if both ratios exceed the threshold and the 99% intervals of both lie above 1: by the first alone, a
slower machine would be one; by the second, a reference that happened to be faster. What this misses: a slow-down that
faster clocks make up for in the first ratio. It is shown, and named below the table, but does not fail.

The noise is that of a bootstrap of the medians with a fixed seed. Neighbouring rounds of a run are not independent, so
no sample counts as more than 30. And two runs differ by more than their rounds show: each ratio also errs by as much as
the references of a case differ from each other, over all cases of the two files; where a case has no reference, by as
much as whole cases moved, too. The intervals hold for all of ours together: of a hundred that hold at 99% each, one or
the other would be a false alarm. Where runs differ much, a slow-down of one case drowns, and the mean over ours, at the
end, says more.

Exit status: 0; 1 if one of ours became slower, needs more memory, is no longer right or is gone; 2 on bad input. What
the new file did not come to, because the time was up or the run was stopped, is named, and is no failure.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

import numpy as np

from .reading import NOT_RUN
from .resultfile import MIB, device_of, load

DRAWS, EFFECTIVE_ROUNDS, LEAST_ROUNDS = 2000, 30, 3
CERTAIN = 0.99  # that an interval holds, of all of ours together
THRESHOLD = 0.05
CLOCKS = dict(max_sm_mhz=("highest SM clocks", "MHz"), max_memory_mhz=("highest memory clocks", "MHz"),
              power_limit_w=("power limits", "W"))  # fmt: skip
SAME_CLOCK = 0.02  # by so much the SM clock under load moves by itself
NOT_THERE = "not in the new file"

Key = tuple[str, str, str, str]  # op, label, dtype, provider


@dataclass(frozen=True)
class Pair:
    """One provider at one case, in both files. Ratios are new over base."""

    key: Key
    kind: str
    ms: tuple[float, float]
    bytes: tuple[int | None, int | None]  # at the peak
    time: float  # of the medians
    ratio: float  # of the medians in units of the references
    low: float  # of `ratio`
    high: float
    references: int  # so many; with none, `ratio` is `time`
    hidden: bool  # slower in units of the references, and not by itself
    problems: tuple[str, ...]  # in words

    @property
    def regressed(self) -> bool:
        return self.kind == "ours" and bool(self.problems)


@dataclass(frozen=True)
class Comparison:
    pairs: list[Pair]  # regressions first, then by ratio, the slowest first
    lost: dict[Key, str]  # ours that are only in the base, and why
    not_run: dict[Key, str]  # the same, where the new file did not come to them
    only_base: list[Key]  # that are no loss
    only_new: list[Key]
    notes: list[str]  # how the two runs differ
    scatter: float  # between runs, of the logarithm of a time
    threshold: float

    @property
    def regressions(self) -> list[Pair]:
        return [p for p in self.pairs if p.regressed]

    @property
    def failed(self) -> bool:
        return bool(self.regressions or self.lost)

    @property
    def mean_ratio(self) -> float | None:
        """Geometric mean of our ratios, in units of the references."""
        logs = [math.log(p.ratio) for p in self.pairs if p.kind == "ours"]
        return math.exp(sum(logs) / len(logs)) if logs else None


def compare(a: dict, b: dict, threshold: float, providers: list[str] | None = None) -> Comparison:
    """a: the base's content, b: the new file's; providers: those that take part, None for all."""
    old, new = _by_key(a), _by_key(b)
    common = {key: (old[key], new[key]) for key in old if key in new}
    times = {key: y["stats"]["median"] / x["stats"]["median"] for key, (x, y) in common.items()}
    references = _references(common)
    scatter, drift = _scatter(references, times)
    rng = np.random.default_rng(0)
    drawn = {}
    for key, (x, y) in common.items():
        noise = scatter if key[:3] in references else math.hypot(scatter, drift)
        drawn[key] = medians(y["stats"], rng) / medians(x["stats"], rng) * np.exp(noise * rng.standard_normal(DRAWS))
    tests = sum(x["extra_info"]["kind"] == "ours" for x, _ in common.values())
    errors = NormalDist().inv_cdf(1 - (1 - CERTAIN) / 2 / max(1, tests))
    cases = {key[:3] for key in new}
    same_selection = a["sfr_kernels"].get("selection") == b["sfr_kernels"].get("selection")
    pairs, lost, not_run, only_base = [], {}, {}, []
    for key, entry in old.items():
        if providers and key[3] not in providers:
            continue
        if key in new:
            others = [k for k in references.get(key[:3], ()) if k != key]
            pairs.append(_paired(key, entry, new[key], others, times, drawn, errors, threshold))
        elif entry["extra_info"]["kind"] == "ours" and (same_selection or key[:3] in cases):
            reason = _why_gone(key, b)
            stopped = reason == NOT_THERE and b["sfr_kernels"].get("complete") is False
            (not_run if stopped or reason.startswith(NOT_RUN) else lost)[key] = reason
        else:
            only_base.append(key)
    only_new = [key for key in new if key not in old and (not providers or key[3] in providers)]
    pairs.sort(key=lambda p: (not p.regressed, not p.hidden, -p.ratio))
    return Comparison(pairs, lost, not_run, only_base, only_new, differences(a, b), scatter, threshold)


def _by_key(content: dict) -> dict[Key, dict]:
    return {
        tuple(entry["extra_info"][name] for name in ("op", "label", "dtype", "provider")): entry
        for entry in content["benchmarks"]
    }


def _references(common: dict[Key, tuple[dict, dict]]) -> dict[tuple, list[Key]]:
    """Case → what in it is not ours and did the same work in both files, often enough to have a median."""
    found = {}
    for key, (x, y) in common.items():
        same = all(x["extra_info"].get(name) == y["extra_info"].get(name) for name in ("kind", "flops", "bytes"))
        often = min(x["stats"]["rounds"], y["stats"]["rounds"]) >= LEAST_ROUNDS
        if x["extra_info"]["kind"] != "ours" and same and often:
            found.setdefault(key[:3], []).append(key)
    return found


def _scatter(references: dict[tuple, list[Key]], times: dict[Key, float]) -> tuple[float, float]:
    """Standard deviations of log(new / base): within the cases, and of whole cases. Both by quantiles, as some may have
    changed for a reason: within, by the lower quartile of all differences, for one of three may be such a one."""
    logs = {case: [math.log(times[key]) for key in found] for case, found in references.items()}
    apart = [abs(x - y) for found in logs.values() for x, y in combinations(found, 2)]
    moved = [abs(float(np.median(found))) for found in logs.values()]
    within = (
        float(np.quantile(apart, 0.25, method="lower")) / (math.sqrt(2) * NormalDist().inv_cdf(5 / 8)) if apart else 0
    )
    return within, float(np.median(moved)) / NormalDist().inv_cdf(3 / 4) if moved else 0.0


def _paired(
    key: Key,
    a: dict,  # its entries
    b: dict,
    references: list[Key],
    times: dict[Key, float],  # new over base, of everything that both files have
    drawn: dict[Key, np.ndarray],  # the same, (DRAWS,): what it might have been
    errors: float,  # so many standard errors an interval reaches, to either side
    threshold: float,
) -> Pair:
    x, y = a["extra_info"], b["extra_info"]
    ms = tuple(1e3 * entry["stats"]["median"] for entry in (a, b))
    time = ratio = times[key]
    draws = drawn[key]
    if references:
        ratio = time / float(np.median([times[k] for k in references]))
        draws = draws / np.median([drawn[k] for k in references], axis=0)
    reach, least = math.exp(errors * np.log(draws).std()), time / math.exp(errors * np.log(drawn[key]).std())
    low, high = ratio / reach, ratio * reach
    if min(entry["stats"]["rounds"] for entry in (a, b)) < LEAST_ROUNDS:
        low, high, least = 0.0, math.inf, 0.0
    by_itself, slower = time > 1 + threshold and least > 1, ratio > 1 + threshold and low > 1
    problems = [f"{ratio:.2f} x the time"] if slower and by_itself else []
    memory = x.get("peak_bytes"), y.get("peak_bytes")
    if None not in memory and memory[1] > (1 + threshold) * memory[0] + MIB:
        problems.append(f"peak memory {memory[0] / MIB:.1f} -> {memory[1] / MIB:.1f} MiB")
    problems += _no_longer_right(x, y)
    hidden = x["kind"] == "ours" and slower and not by_itself
    return Pair(key, x["kind"], ms, memory, time, ratio, low, high, len(references), hidden, tuple(problems))


def medians(stats: dict, rng: np.random.Generator) -> np.ndarray:  # (DRAWS,), seconds
    """What the median might have been: of resampled rounds, or from the quartiles where the rounds were not kept."""
    data = np.asarray(stats.get("data") or (), dtype=np.float64)
    m = max(1, min(stats["rounds"], EFFECTIVE_ROUNDS))
    if len(data):
        return np.median(rng.choice(data, (DRAWS, m)), axis=1)
    # standard error of the median of normal data: 1.2533 sigma / sqrt(m); its IQR is 1.349 sigma
    error = stats.get("iqr", 0.0) / 1.349 * 1.2533 / m**0.5
    return np.maximum(rng.normal(stats["median"], error, DRAWS), 0.01 * stats["median"])


def _no_longer_right(a: dict, b: dict) -> list[str]:
    """a, b: extra_info. An error's ratio of None is one that is not a number."""
    if not a.get("errors"):
        return []
    if not b.get("errors"):
        return ["its result was not judged"]
    wrong = [name for name, e in b["errors"].items() if e["ratio"] is None or e["ratio"] > 1]
    return [f"wrong: {', '.join(wrong)}"] if wrong else []


def _why_gone(key: Key, content: dict) -> str:
    """As the new file tells it."""
    op, label, dtype, provider = key
    for kind in ("failed", "absent"):
        for item in content["sfr_kernels"].get(kind) or []:
            of_case = item.get("group") in (None, op, f"{op}: {label}, {dtype}")
            if item["provider"] == provider and item["op"] == op and of_case:
                return item["reason"] if item["reason"].startswith(NOT_RUN) else f"{kind}: {item['reason']}"
    return NOT_THERE


def differences(a: dict, b: dict) -> list[str]:
    """How two runs differ in more than our code, the weightiest first."""
    x, y = a["sfr_kernels"], b["sfr_kernels"]
    dtypes = [sorted({e["extra_info"]["dtype"] for e in content["benchmarks"]}) for content in (a, b)]
    pairs = {"devices": (device_of(a), device_of(b)), "dtypes": tuple(map(", ".join, dtypes))}
    versions = x.get("versions") or {}, y.get("versions") or {}
    pairs |= {key: tuple(v.get(key) for v in versions) for key in [*versions[0], *versions[1]]}
    pairs["drivers"] = x["device"].get("driver"), y["device"].get("driver")
    clocks = [run["device"].get("clocks") or {} for run in (x, y)]
    for key, (name, unit) in CLOCKS.items():
        pairs[name] = tuple(f"{c[key]:g} {unit}" if c.get(key) else "unknown" for c in clocks)
    loaded = [c.get("sm_mhz") for c in clocks]
    if all(loaded) and abs(loaded[1] / loaded[0] - 1) > SAME_CLOCK:
        pairs["SM clocks under load"] = tuple(f"{mhz:g} MHz" for mhz in loaded)
    pairs["selections"] = x.get("selection"), y.get("selection")
    found = [f"different {name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    for name, run in (("base", x), ("new", y)):
        if run.get("complete") is False:
            found.append(f"the {name} file's run {'was cut: the time was up' if run.get('cut') else 'did not end'}")
    return found


LEGEND = """\
ratio: new over base, of times in units of the case's references (limit, products, peers), or of the times alone where
there are none (*); below 1 is faster. interval: of the ratio, at 99% for all of ours together. time: of the times
alone. MiB: peak memory."""


def rendered(found: Comparison) -> str:
    """The comparison in words: how the runs differ, the table, what is gone, the mean."""
    lines = [f"!!! {note}" for note in found.notes]
    rows = [("ratio ", "interval", "time", "base ms", "new ms", "MiB", "", "")]
    for p in found.pairs:
        interval = f"{p.low:.3f} to {p.high:.3f}" if math.isfinite(p.high) else "too few rounds"
        memory = "" if None in p.bytes else " -> ".join(f"{n / MIB:.1f}" for n in p.bytes)
        ratio = f"{p.ratio:.3f}{' ' if p.references else '*'}"
        rows.append((ratio, interval, f"{p.time:.3f}", *(f"{ms:.4f}" for ms in p.ms), memory,
                     _verdict(p, found.threshold), _name(p.key)))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *numbers, verdict, name in rows:
        aligned = [cell.rjust(width) for cell, width in zip(numbers, widths, strict=False)]
        lines.append("  ".join([*aligned, verdict.ljust(widths[-2]), name]).rstrip())
    lines.append("")
    lines += [f"REGRESSION: {_name(p.key)}: {'; '.join(p.problems)}" for p in found.regressions]
    lines += [f"GONE: {_name(key)}: {reason}" for key, reason in found.lost.items()]
    hidden = [p for p in found.pairs if p.hidden]
    for p in hidden:
        lines.append(
            f"no regression: {_name(p.key)}: {p.ratio:.2f} x in units of its references, {p.time:.2f} x by itself"
        )
    lines += [f"not measured: {_name(key)}: {reason}" for key, reason in found.not_run.items()]
    lines += [f"only in the base: {_name(key)}" for key in found.only_base]
    lines += [f"only in the new file: {_name(key)}" for key in found.only_new]
    ours = sum(p.kind == "ours" for p in found.pairs)
    if ours:
        lines.append(f"Ours, geometric mean of {ours} ratios: {found.mean_ratio:.3f}")
    if found.scatter:
        lines.append(f"References of a case differ by {found.scatter:.1%} between the files; the intervals count it.")
    lines.append(f"{len(found.regressions)} of ours became worse, {len(found.lost)} are gone.")
    return "\n".join([*lines, LEGEND])


def _name(key: Key) -> str:
    op, label, dtype, provider = key
    return f"{provider}: {op}, {label}, {dtype}"


def _verdict(p: Pair, threshold: float) -> str:
    if p.regressed:
        return "REGRESSION"
    if p.hidden:
        return "slower?"
    better = p.high < 1 and max(p.ratio, p.time) < 1 / (1 + threshold)
    change = "worse" if p.problems else "better" if better else ""
    return change if p.kind == "ours" else f"{p.kind} {change}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="result file")
    parser.add_argument("new", help="result file")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="a change that counts (default %(default)s)")
    parser.add_argument("--provider", action="append", help="compare this one alone; may be given again")
    parser.add_argument("--different-devices", action="store_true", help="compare although the devices differ")
    options = parser.parse_args(argv)
    try:
        if not 0 < options.threshold < math.inf:
            raise ValueError(f"--threshold must be above 0, got {options.threshold}")
        a, b = load(options.base), load(options.new)
        if device_of(a) != device_of(b) and not options.different_devices:
            raise ValueError(
                f"{options.base} is of {device_of(a)}, {options.new} of {device_of(b)}; "
                "--different-devices compares them all the same"
            )
        known = {e["extra_info"]["provider"] for e in a["benchmarks"] + b["benchmarks"]}
        if unknown := set(options.provider or ()) - known:
            raise ValueError(f"no provider {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        found = compare(a, b, options.threshold, options.provider)
        if not (found.pairs or found.lost or found.not_run):
            raise ValueError(f"{options.base} and {options.new} have no benchmark in common")
    except ValueError as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    print(rendered(found))
    return 1 if found.failed else 0

"""Two result files against each other: what became slower, larger or wrong.

    python -m sfr_kernels bench compare BASE.json NEW.json [--threshold 0.05] [--provider NAME ...]

Benchmarks are matched by op, label, dtype and provider. The ratio that is judged is that of the medians, each in units
of its own race's limit: a clock that differs between the runs moves the limit too. Where a race has no limit, or the
limit is not of the same work in both files, it is the ratio of the medians alone.

A slow-down counts if it exceeds the threshold and the 99% interval of the ratio lies above 1. The interval is a
bootstrap of the medians, the limit's included, with a fixed seed. Neighbouring rounds of a run are not independent, so
no sample counts as more than 30.

Exit status: 0; 1 if one of ours became slower, needs more memory, is no longer right or is gone; 2 on bad input.
"""

import argparse
import math
import sys
from dataclasses import dataclass

import numpy as np

from .resultfile import MIB, device_of, load

DRAWS, EFFECTIVE_ROUNDS, LEAST_ROUNDS = 2000, 30, 3
OUTER = (0.5, 99.5)  # percentiles
THRESHOLD = 0.05
LIMIT = "limit"  # the kind, and the provider behind "limit_ms"

Key = tuple[str, str, str, str]  # op, label, dtype, provider


@dataclass(frozen=True)
class Pair:
    """One provider at one case, in both files. Ratios are new over base."""

    key: Key
    kind: str
    ms: tuple[float, float]
    bytes: tuple[int | None, int | None]  # at the peak
    ratio: float  # the judged one
    low: float
    high: float
    by_limit: bool  # `ratio` is of times in units of the limit
    problems: tuple[str, ...]  # in words

    @property
    def regressed(self) -> bool:
        return self.kind == "ours" and bool(self.problems)


@dataclass(frozen=True)
class Comparison:
    pairs: list[Pair]  # regressions first, then by ratio, the slowest first
    lost: dict[Key, str]  # ours that are only in the base, and why
    only_base: list[Key]  # that are no loss
    only_new: list[Key]
    notes: list[str]  # how the two runs differ
    threshold: float

    @property
    def regressions(self) -> list[Pair]:
        return [p for p in self.pairs if p.regressed]

    @property
    def failed(self) -> bool:
        return bool(self.regressions or self.lost)

    @property
    def mean_ratio(self) -> float | None:
        """Geometric mean of our judged ratios."""
        logs = [math.log(p.ratio) for p in self.pairs if p.kind == "ours"]
        return math.exp(sum(logs) / len(logs)) if logs else None


def compare(a: dict, b: dict, threshold: float, providers: list[str] | None = None) -> Comparison:
    """a: the base's content, b: the new file's; providers: those that take part, None for all."""
    old, new = _by_key(a), _by_key(b)
    cases = {key[:3] for key in new}
    same_selection = a["sfr_kernels"].get("selection") == b["sfr_kernels"].get("selection")
    pairs, lost, only_base = [], {}, []
    for key, entry in old.items():
        if providers and key[3] not in providers:
            continue
        limit = (*key[:3], LIMIT)
        if key in new:
            pairs.append(_paired(key, entry, new[key], old.get(limit), new.get(limit), threshold))
        elif entry["extra_info"]["kind"] == "ours" and (same_selection or key[:3] in cases):
            lost[key] = _why_gone(key, b)
        else:
            only_base.append(key)
    only_new = [key for key in new if key not in old and (not providers or key[3] in providers)]
    pairs.sort(key=lambda p: (not p.regressed, -p.ratio))
    return Comparison(pairs, lost, only_base, only_new, differences(a, b), threshold)


def _by_key(content: dict) -> dict[Key, dict]:
    return {
        tuple(entry["extra_info"][name] for name in ("op", "label", "dtype", "provider")): entry
        for entry in content["benchmarks"]
    }


def _paired(key: Key, a: dict, b: dict, limit_a: dict | None, limit_b: dict | None, threshold: float) -> Pair:
    """Entries of one provider; limits: the entries of what bounds it, where the files have them."""
    x, y = a["extra_info"], b["extra_info"]
    by_limit = x["kind"] != LIMIT and bool(x.get("limit_ms") and y.get("limit_ms"))
    by_limit &= all(x.get(name) == y.get(name) for name in ("flops", "bytes"))
    rng = np.random.default_rng(0)
    ms = tuple(1e3 * entry["stats"]["median"] for entry in (a, b))
    ratio, drawn = ms[1] / ms[0], medians(b["stats"], rng) / medians(a["stats"], rng)
    if by_limit:
        scale = x["limit_ms"] / y["limit_ms"]
        ratio, drawn = ratio * scale, drawn * scale
        # and the limit's own noise
        for power, limit in ((1, limit_a), (-1, limit_b)):
            if limit:
                drawn = drawn * (medians(limit["stats"], rng) / limit["stats"]["median"]) ** power
    low, high = (float(bound) for bound in np.percentile(drawn, OUTER))
    if min(entry["stats"]["rounds"] for entry in (a, b)) < LEAST_ROUNDS:
        low, high = 0.0, math.inf
    problems = [f"{ratio:.2f} x the time"] if ratio > 1 + threshold and low > 1 else []
    memory = x.get("peak_bytes"), y.get("peak_bytes")
    if None not in memory and memory[1] > (1 + threshold) * memory[0] + MIB:
        problems.append(f"peak memory {memory[0] / MIB:.1f} -> {memory[1] / MIB:.1f} MiB")
    problems += _no_longer_right(x, y)
    return Pair(key, x["kind"], ms, memory, ratio, low, high, by_limit, tuple(problems))


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
                return f"{kind}: {item['reason']}"
    return "not in the new file"


def differences(a: dict, b: dict) -> list[str]:
    """How two runs differ in more than our code, the weightiest first."""
    x, y = a["sfr_kernels"], b["sfr_kernels"]
    dtypes = [sorted({e["extra_info"]["dtype"] for e in content["benchmarks"]}) for content in (a, b)]
    pairs = {"devices": (x["device"].get("name"), y["device"].get("name")), "dtypes": tuple(map(", ".join, dtypes))}
    versions = x.get("versions") or {}, y.get("versions") or {}
    pairs |= {key: tuple(v.get(key) for v in versions) for key in [*versions[0], *versions[1]]}
    pairs["drivers"] = x["device"].get("driver"), y["device"].get("driver")
    pairs["clocks"] = x["device"].get("clocks"), y["device"].get("clocks")
    pairs["selections"] = x.get("selection"), y.get("selection")
    found = [f"different {name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    runs = (("base", x), ("new", y))
    return found + [f"the {name} file's run did not end" for name, run in runs if run.get("complete") is False]


LEGEND = """\
ratio: new over base, of times in units of the race's limit, or of the times alone (*); below 1 is faster.
time: of the times alone. MiB: peak memory."""


def rendered(found: Comparison) -> str:
    """The comparison in words: how the runs differ, the table, what is gone, the mean."""
    lines = [f"!!! {note}" for note in found.notes]
    rows = [("ratio ", "99% interval", "time", "base ms", "new ms", "MiB", "", "")]
    for p in found.pairs:
        interval = f"{p.low:.3f} to {p.high:.3f}" if math.isfinite(p.high) else "too few rounds"
        memory = "" if None in p.bytes else " -> ".join(f"{n / MIB:.1f}" for n in p.bytes)
        ratio = f"{p.ratio:.3f}{' ' if p.by_limit else '*'}"
        rows.append((ratio, interval, f"{p.ms[1] / p.ms[0]:.3f}", *(f"{ms:.4f}" for ms in p.ms), memory,
                     _verdict(p, found.threshold), _name(p.key)))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *numbers, verdict, name in rows:
        aligned = [cell.rjust(width) for cell, width in zip(numbers, widths, strict=False)]
        lines.append("  ".join([*aligned, verdict.ljust(widths[-2]), name]).rstrip())
    lines.append("")
    lines += [f"REGRESSION: {_name(p.key)}: {'; '.join(p.problems)}" for p in found.regressions]
    lines += [f"GONE: {_name(key)}: {reason}" for key, reason in found.lost.items()]
    lines += [f"only in the base: {_name(key)}" for key in found.only_base]
    lines += [f"only in the new file: {_name(key)}" for key in found.only_new]
    ours = sum(p.kind == "ours" for p in found.pairs)
    if ours:
        lines.append(f"Ours, geometric mean of {ours} ratios: {found.mean_ratio:.3f}")
    lines.append(f"{len(found.regressions)} of ours became worse, {len(found.lost)} are gone.")
    return "\n".join([*lines, LEGEND])


def _name(key: Key) -> str:
    op, label, dtype, provider = key
    return f"{provider}: {op}, {label}, {dtype}"


def _verdict(p: Pair, threshold: float) -> str:
    if p.regressed:
        return "REGRESSION"
    change = "worse" if p.problems else "better" if p.high < 1 and p.ratio < 1 / (1 + threshold) else ""
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
        if not (found.pairs or found.lost):
            raise ValueError(f"{options.base} and {options.new} have no benchmark in common")
    except ValueError as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    print(rendered(found))
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())

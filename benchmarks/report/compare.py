"""Two result files against each other: what of ours became slower, larger or wrong, or is gone.

A time counts in units of its case's reference, round by round; its ratio is new over old. Worse is a ratio above 1 +
threshold whose interval lies above 1, if that of the times alone does, too: a machine that is slower as a whole moves
only the times, a reference that became faster only the ratio, and neither is our doing. (A slow-down that faster clocks
make up for is missed.) Without a reference in both files, times count. Intervals: bootstrapped medians with a fixed
seed, 99% for all of ours together (Bonferroni), from 3 rounds on. Exit status: 0, 1 (worse), 2 (bad input)."""

import argparse
import math
import sys
from statistics import NormalDist

import numpy as np

from .data import KEY, Results, medians, read
from .tables import Table, duration, render, size


def change(old: list[float], new: list[float], errors: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """New over old, and the interval that reaches so many standard errors."""
    ratio = float(np.median(new) / np.median(old))
    reach = math.exp(errors * np.log(medians(new, rng) / medians(old, rng)).std())
    return (ratio, ratio / reach, ratio * reach) if min(len(old), len(new)) > 2 else (ratio, 0.0, math.inf)


def compare(a: Results, b: Results, threshold: float) -> tuple[Table, list[str], list[str]]:
    """Ours in both files, what became worse, and notes."""
    old, new = ({tuple(getattr(r, name) for name in KEY): r for r in x.frame.itertuples()} for x in (a, b))
    ours, rng, rows, worse = [key for key in old if old[key].kind == "ours"], np.random.default_rng(0), [], []
    errors = NormalDist().inv_cdf(1 - 0.005 / max(1, len(ours)))
    facts = {name: (a.facts.get(name), b.facts.get(name)) for name in a.facts | b.facts}
    notes = [f"different {name}: {x} -> {y}" for name, (x, y) in facts.items() if x != y]
    notes += [f"{x.name}: {warning}" for x in (a, b) for warning in x.warnings]
    gone = {tuple(x.get(name) for name in KEY): f"{x['line']}: {x['reason']}" for x in b.gone}
    for key in ours:
        x, y, name = old[key], new.get(key), ", ".join(key)
        if y is None:
            lost = key in gone or (b.complete and a.run["selection"] == b.run["selection"])
            (worse if lost else notes).append(f"{name}: {gone.get(key, 'not in the new file')}")
            continue
        unit = "ratios" if len(x.ratios) and len(y.ratios) else "samples_ms"
        alone, ratio = (change(getattr(x, of), getattr(y, of), errors, rng) for of in ("samples_ms", unit))
        memory = f"{size(x.held_bytes)} -> {size(y.held_bytes)}"
        problems = {f"{ratio[0]:.2f} × the time": ratio[0] > 1 + threshold and min(ratio[1], alone[1]) > 1,
                    f"memory {memory}": y.held_bytes > (1 + threshold) * x.held_bytes + 2**20,
                    "error over its bound": y.of_bound > 1}  # fmt: skip
        worse += [f"{name}: {problem}" for problem, is_so in problems.items() if is_so]
        rows.append({"case": ", ".join(key[:3]), "": key[3] + " !" * any(problems.values()), "ratio": f"{ratio[0]:.3f}",
                     "interval": f"{ratio[1]:.3f} to {ratio[2]:.3f}", "of times": f"{alone[0]:.3f}",
                     "time": f"{duration(x.ms)} -> {duration(y.ms)}", "peak memory": memory})  # fmt: skip
    return Table("Ours, new over old", rows, 2), worse, notes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench compare", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs=2, help="result files, the old one first")
    parser.add_argument("--threshold", type=float, default=0.05, help="a change that counts (default %(default)s)")
    parser.add_argument("--different-devices", action="store_true", help="compare although the devices differ")
    options = parser.parse_args(argv)
    try:
        a, b = map(read, options.files)
        if a.facts["device"] != b.facts["device"] and not options.different_devices:
            raise ValueError("the devices differ: --different-devices compares them all the same")
        table, worse, notes = compare(a, b, options.threshold)
        if not (table.rows or worse):
            raise ValueError("the files have nothing of ours in common")
    except (OSError, ValueError) as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    print(render(table, "text"), *(f"note: {n}" for n in notes), *(f"WORSE: {w}" for w in worse), sep="\n")
    return int(bool(worse))

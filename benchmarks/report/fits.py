"""How time grows along a sweep: the slope of log time on log x."""

import math
from dataclasses import dataclass

LEAST_POINTS = 3  # two points fit any power


@dataclass(frozen=True)
class Sweep:
    """One provider's times along one axis, by growing x."""

    series: str  # what is held fixed: "linear_cross_entropy, trained, bfloat16"
    axis: str  # "tokens", "vocab", "hidden_size", "supervised"
    provider: str
    xs: list[float]
    ms: list[float]  # medians
    exponent: float | None  # None: too few points to fit


def exponent(xs: list[float], ys: list[float]) -> float:
    """p of y = c xᵖ by least squares of log y on log x.

    ValueError for fewer than three distinct xs, for lists of different lengths, and for what has no logarithm.
    """
    if len(xs) != len(ys):
        raise ValueError(f"xs and ys must be of one length, got {len(xs)} and {len(ys)}")
    for name, values in (("xs", xs), ("ys", ys)):
        if wrong := [v for v in values if not (v > 0 and math.isfinite(v))]:
            raise ValueError(f"{name} must be positive and finite, got {wrong[0]}")
    if len(set(xs)) < LEAST_POINTS:
        raise ValueError(f"xs must have at least {LEAST_POINTS} distinct points, got {len(set(xs))}")
    log_x, log_y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = math.fsum(log_x) / len(xs), math.fsum(log_y) / len(ys)
    covariance = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(log_x, log_y, strict=True))
    return covariance / math.fsum((x - mean_x) ** 2 for x in log_x)


def by_plot(curves: list[Sweep]) -> dict[tuple[str, str], list[Sweep]]:
    """(series, axis) → the curves that belong into one plot. A case may be a point of several, and so the curves of
    one plot need not follow each other."""
    found: dict[tuple[str, str], list[Sweep]] = {}
    for curve in curves:
        found.setdefault((curve.series, curve.axis), []).append(curve)
    return found


def sweeps(benchmarks: list[dict]) -> list[Sweep]:
    """The curves in a result file's `benchmarks`, one for each series, axis and provider, in the order of the file."""
    curves: dict[tuple[str, str, str], dict[float, float]] = {}
    for entry in benchmarks:
        extra = entry["extra_info"]
        for point in extra.get("sweeps") or []:
            curve = curves.setdefault((point["series"], point["axis"], extra["provider"]), {})
            curve[point["x"]] = 1e3 * entry["stats"]["median"]
    found = []
    for (series, axis, provider), curve in curves.items():
        xs = sorted(curve)
        ms = [curve[x] for x in xs]
        found.append(Sweep(series, axis, provider, xs, ms, exponent(xs, ms) if len(xs) >= LEAST_POINTS else None))
    return found

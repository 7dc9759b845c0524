"""A run's results in the terminal: every case and provider, the sweeps' exponents, and what is missing, wrong or slow.

A case's name stands above its providers, so that the numbers line up at 80 columns. Columns that nobody fills are left
out, and so are the least important ones where they would not fit.
"""

import sys
import textwrap

from rich.console import Console
from rich.text import Text

from . import words
from .fits import by_plot, sweeps
from .reading import Race, Result, races, troubles
from .resultfile import MIB, described, is_gpu, missed_goals, races_by_op, shortfall
from .tables import of_baseline

PLAIN_WIDTH = 120  # where the output is no terminal
NARROW = 100  # below it, heads are short
GAP = 2
COLUMNS = ("", "ms", "± IQR", "× limit", "× products", "TB/s", "TFLOP/s", "tokens/s", "peak MiB", "error", "of bound",
           "× ours", "× baseline")  # fmt: skip
LEAST_IMPORTANT = ("error", "of bound", "TB/s", "± IQR", "TFLOP/s", "peak MiB", "× products", "tokens/s")
SHORT = {"× products": "× prod.", "peak MiB": "MiB"}

LEGEND = (
    "ms: median. ± IQR: between the quartiles. × limit: the products and a copy of the bytes that must move besides, "
    "timed in the same race. × products: the products alone. peak MiB: beyond inputs and results. error: relative L2, "
    "against float64. of bound: the largest error in units of what is allowed. × ours, or × a step: times as long as "
    "the fastest of ours, or that step. TB/s: of all bytes that must move, operands and results of products included."
)


def render(content: dict, console: Console | None = None) -> None:
    """Prints all of it."""
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    _say(console, described(content), "bold")
    if not is_gpu(content):
        _say(console, "These are times of a CPU: they say nothing of a GPU.", "yellow")
    if lacking := shortfall(content):
        _say(console, lacking, "bold yellow")
    left_out = set()
    for op, found in races_by_op(content).items():
        left_out |= _op(console, op, found)
    _say(console, LEGEND, "dim", before=True)
    if left_out:
        _say(console, f"Left out for want of width: {', '.join(c for c in COLUMNS if c in left_out)}.", "dim")
    _exponents(console, content)
    for key, title, style in (("absent", "Absent", "yellow"), ("failed", "Failed", "red")):
        lines = [
            f"{'ours: ' * (t.ours and key == 'failed')}{t.provider}: {t.reason} "
            f"({_some(t.cases) if key == 'failed' else t.extent})"
            for t in troubles(content, key)
        ]
        _list(console, title, lines, style)
    _list(console, "Missed goals", missed_goals(content), "yellow")
    _summary(console, content)


def _op(console: Console, op: str, found: list[Race]) -> set[str]:
    """One op's table; returns the columns that did not fit."""
    decimals = _decimals(found)
    rows = [(race, r, _cells(race, r, decimals)) for race in found for r in (*race.runners, *race.of("limit"))]
    kept = [c for c in COLUMNS if c == "" or any(cells.get(c) for _, _, cells in rows)]
    heads = {c: SHORT.get(c, c) if console.width < NARROW else c for c in kept}
    if "× baseline" in heads:
        heads["× baseline"] = of_baseline(found)
    widths = {c: max(len(heads[c]), *(len(cells.get(c, "")) for _, _, cells in rows)) for c in kept}

    def too_wide() -> int:
        return sum(widths.values()) + GAP * (len(widths) - 1) - console.width

    left_out = set()
    for c in LEAST_IMPORTANT:
        if too_wide() > 0 and widths.pop(c, None):
            left_out.add(c)
    widths[""] -= max(0, too_wide())
    _say(console, op, "bold", before=True)
    _say(console, _line(heads, widths), "dim")
    shown = None
    for race, result, cells in rows:
        if race is not shown:
            shown = race
            _say(console, race.heading, "cyan")
        fastest = result is race.fastest("ours") and not race.baseline  # else it is whoever does the least work
        _say(console, _line(cells, widths), "green" if fastest else "dim" if result.kind == "limit" else "")
    return left_out


def _decimals(found: list[Race]) -> int:
    """Of an op's milliseconds: so that the smallest has three digits, but no more of the large than anyone reads."""
    least = min(r.ms for race in found for r in race.results)
    return 5 if least < 0.01 else 4 if least < 0.1 else 3 if least < 10 else 2


def _cells(race: Race, r: Result, decimals: int) -> dict[str, str]:
    """Column → text; what was not measured is not there."""
    extra, best = r.extra, race.fastest("ours")
    found = {"": "  " + r.provider, "ms": f"{r.ms:.{decimals}f}", "± IQR": f"{r.q3 - r.q1:.{decimals}f}"}
    if r.kind != "limit":
        for column, bound in (("× limit", race.limit_ms), ("× products", race.products_ms)):
            if bound:
                found[column] = f"{r.ms / bound:.2f}"
    if r.kind == "peer" and best and not race.baseline:
        found["× ours"] = f"{r.ms / best.ms:.2f}"
    if (times := race.times_of(r, race.baseline)) is not None:
        found["× baseline"] = f"{times:.2f}"
    for column, key in (("TFLOP/s", "tflop_per_s"), ("TB/s", "tb_per_s")):
        if extra.get(key):
            found[column] = words.number(extra[key])
    if extra.get("tokens_per_s"):
        found["tokens/s"] = f"{extra['tokens_per_s']:.0f}"
    if extra.get("peak_bytes") is not None:
        mib = extra["peak_bytes"] / MIB
        found["peak MiB"] = f"{mib:.1f}" if mib < 1000 else f"{mib:.0f}"
    if r.error is not None:
        found["error"] = f"{r.error:.1e}"
    if r.worst and r.worst.get("ratio") is not None:
        found["of bound"] = f"{r.worst['ratio']:.2f}"
    return found


def _line(cells: dict[str, str], widths: dict[str, int]) -> str:
    """Providers to the left, cut where they are too long; numbers to the right."""
    (_, width), *numbers = widths.items()
    name = cells.get("", "")
    name = name if len(name) <= width else name[: width - 1] + "…"
    return (" " * GAP).join([name.ljust(width), *(cells.get(c, "").rjust(w) for c, w in numbers)]).rstrip()


def _exponents(console: Console, content: dict) -> None:
    fitted = [s for s in sweeps(content["benchmarks"]) if s.exponent is not None]
    if not fitted:
        return
    _say(console, "Time grows as a power of …", "bold", before=True)
    width = max(len(s.provider) for s in fitted)
    for (series, axis), curves in by_plot(fitted).items():
        _say(console, f"{axis}: {series}", "cyan")
        for s in curves:
            _say(console, f"  {s.provider.ljust(width)}  {s.exponent:6.2f}  from {s.xs[0]:g} to {s.xs[-1]:g}")


def _list(console: Console, title: str, lines: list[str], style: str) -> None:
    if lines:
        _say(console, f"{title}:", f"bold {style}", before=True)
    for line in lines:
        _say(console, line, style, indent=" " * GAP)


def _some(cases: list[str]) -> str:
    return ", ".join(cases[:2]) + (f" and {len(cases) - 2} more" if len(cases) > 2 else "")


def _summary(console: Console, content: dict) -> None:
    failed, wrong = content["sfr_kernels"].get("failed") or [], any(t.ours for t in troubles(content, "failed"))
    counts = f"{len(content['benchmarks'])} measured at {len(races(content))} cases, {len(failed)} failed"
    goals = f"{len(missed_goals(content))} goals missed."
    _say(console, f"{counts}, {goals}", "bold red" if wrong else "bold", before=True)


def _say(console: Console, text: str, style: str = "", *, before: bool = False, indent: str = "") -> None:
    """A line, or a paragraph that is broken at the console's width. No markup is read from it."""
    if before:
        console.print()
    # rich would leave the space at which it breaks a line
    options = dict(initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    for line in textwrap.wrap(text, console.width, **options):
        console.print(Text(line, style))

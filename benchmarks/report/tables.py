"""Tables of text: their rows, and their three forms, for a terminal, as HTML and as Markdown."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from html import escape

import numpy as np
from pandas import DataFrame

from ..case import GRAPH, SWEEP
from .data import KEY, Results

LEGEND = """\
★: the fastest. Time: the median; IQR: in % of it. × reference, × products: the median of the rounds' ratios to the \
case's reference, with a 99% bootstrap interval, and to its matrix products. Limit: the products, and a copy of the \
bytes that must move besides. Peak memory: beyond inputs and results; of a training step, with model and optimizer. \
Error: relative L2, against float64; of bound: in units of what is allowed."""
EMPTY = "–"


def number(value: float | None, unit: str = "") -> str:
    """Three digits: 1,234, 19.5, 1.09, 0.0123."""
    if value is None or value != value:
        return EMPTY
    return (f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}" if value else "0") + unit


def scaled(value: float, base: int, units: tuple[str, ...], at: int = 0) -> str:  # value is in units[at]
    power = max(-at, min(len(units) - 1 - at, math.floor(math.log(value, base)))) if value > 0 else 0
    return number(value / base**power, f" {units[at + power]}")


size = partial(scaled, base=1024, units=("B", "KiB", "MiB", "GiB", "TiB"))
duration = partial(scaled, base=1000, units=("µs", "ms", "s"), at=1)


@dataclass(frozen=True)
class Table:
    title: str
    rows: list[dict[str, str]]  # column → cell; the least important columns last
    texts: int  # so many columns, from the first, are words; of two or more, the first groups the rows
    about: str = ""


def render(table: Table, form: str, width: int = 120, columns: tuple[str, ...] = ()) -> str:
    """form: "text", without the last columns where they do not fit, "html" or "markdown". columns: those to show, or
    all; never those whose cells are empty."""
    shown = [(c, *(row[c] for row in table.rows)) for c in (table.rows or [{}])[0] if c in (columns or table.rows[0])]
    shown = [cells for cells in shown if {*cells[1:]} != {EMPTY}]
    rows, first, texts, lines = [*zip(*shown, strict=True)], int(table.texts > 1), table.texts, []
    if form == "text":
        widths = [max(map(len, cells)) + 2 for cells in shown]
        while sum(widths[first:]) > width and len(widths) > texts + 1:
            widths.pop()
        for i, row in enumerate(rows):
            lines += [row[0]] if first and i and row[0] != rows[i - 1][0] else []
            cells = [f"  {row[j]:<{w - 2}}" if j < texts else f"{row[j]:>{w}}" for j, w in enumerate(widths)]
            lines.append("".join(cells[first:]).rstrip())
        return "\n".join(filter(None, [table.title, table.about, *lines]))
    if first:
        rows = [("" if i > 1 and row[0] == rows[i - 1][0] else row[0], *row[1:]) for i, row in enumerate(rows)]
    if form == "html":
        lines = [f"<tr{' class=first' * bool(r[0])}>{''.join(f'<td>{escape(c)}</td>' for c in r)}</tr>" for r in rows]
        return "\n".join([f"<p>{escape(table.about)}</p><div><table class=words{texts}>", *lines, "</table></div>"])
    rows = [[escape(c, quote=False).replace("|", "\\|").replace("*", "\\*") for c in row] for row in rows]
    rows[1:1] = [["---" if i < texts else "---:" for i, _ in enumerate(row)] for row in rows[:1]]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n\n".join(filter(None, [f"**{table.title}**", table.about, lines]))


def races(frame: DataFrame) -> Iterator[tuple]:
    """(op, case, its rows, the fastest of ours, the fastest peer), None where there is none; no graph is."""
    for (op, label, dtype), case in frame.groupby(KEY[:3], sort=False):
        rows = [*case.itertuples()]
        fastest = {r.kind: r for r in sorted(rows, key=lambda r: -r.ms) if not r.provider.endswith(GRAPH)}
        yield op, f"{label}, {dtype}", rows, fastest.get("ours"), fastest.get("peer")


def of_op(op: str, frame: DataFrame) -> Table:
    rows, references = [], frame[frame.op == op].reference.dropna().unique()
    for _, name, case, ours, peer in races(frame[frame.op == op]):
        fastest = min(filter(None, (ours, peer)), key=lambda r: r.ms, default=None)
        for r in case:
            interval = "" if r.provider == r.reference else f" [{r.low:.2f}, {r.high:.2f}]"
            share, per = 100 * r.parts.get("targets", math.nan) / sum(r.parts.values() or [1]), 1e-9 / r.ms
            rows.append({
                "case": name, "": r.provider + " ★" * (r is fastest), "time": duration(r.ms),
                "± IQR": f"{np.ptp(np.quantile(r.samples_ms, (0.25, 0.75))) / r.ms:.1%}",
                "× reference": EMPTY if math.isnan(r.of_reference) else f"{r.of_reference:.2f}{interval}",
                "× products": number(r.of_products), "tokens/s": number(r.tokens_per_s),
                "segments/s": number(r.segments_per_s),
                "peak memory": size(r.held_bytes), "targets' share": number(share, "%"), "of bound": number(r.of_bound),
                "error": number(r.error), "TB/s": number(per * r.traffic or None),
                "TFLOP/s": number(per * r.flops or None),
            })  # fmt: skip
    return Table(op, rows, 2, f"Reference: {', '.join(references)}." if len(references) else "")


def summary(results: Results) -> Table:
    def spread(values: list[float]) -> str:
        known = sorted(value for value in values if value == value)
        return " to ".join(dict.fromkeys(f"{value:.2f}" for value in known[:1] + known[-1:])) or EMPTY

    rows, missed = [], [row["case"] for row in goals(results.frame).rows]
    failed = [line["op"] for line in results.gone if line["line"] == "failed" and line["kind"] == "ours"]
    for op in dict.fromkeys([*results.frame.op, *(line["op"] for line in results.gone)]):
        frame = results.frame[results.frame.op == op]
        found = [(ours, peer) for *_, ours, peer in races(frame) if ours]
        rows.append({
            "op": op, "cases": str(len(found)), "best × reference": spread([x.of_reference for x, _ in found]),
            "fastest peer / best": spread([peer.ms / x.ms for x, peer in found if peer]),
            "ours failed": str(failed.count(op)), "goals missed": str(sum(x.startswith(f"{op}, ") for x in missed)),
            "worst of bound": number(frame[frame.kind == "ours"].of_bound.max()),
        })  # fmt: skip
    return Table("Summary", rows, 1, "Best: the fastest of ours at a case.")


def goals(frame: DataFrame) -> Table:
    """Those that were missed; what was not measured is."""
    rows = []
    for op, case, providers, _, peer in races(frame):
        named = {r.provider: r for r in providers} | {"peer": peer}
        for row, goal, most in [(r, *wanted) for r in providers for wanted in r.goals.items()]:
            what, _, name = goal.partition("of ")
            field = "ms" if what in ("", "ms") else "held_bytes"
            unit = {"ms": 1, "lm_heads": row.weight_bytes}.get(goal) or getattr(named.get(name), field, math.nan)
            if not (value := getattr(row, field) / unit) <= most:
                words = {"goal": goal, "at most": number(most), "measured": number(value)}
                rows.append({"case": f"{op}, {case}", "": row.provider, **words})
    return Table("Goals missed", rows, 3, "–: not measured." if rows else "None, of those that this selection tests.")


def missing(results: Results) -> Table:
    found = {}
    for x in results.gone:
        whose = x.get("provider", "all") + " (ours)" * (x.get("kind") == "ours")
        found.setdefault(f"{whose} {x['line']}: {x['reason']}", []).append(f"{x['op']}, {x['label']}, {x['dtype']}")
    rows = [{"what": why, "cases": "; ".join(x[:3]) + f"; … ({len(x)})" * (len(x) > 3)} for why, x in found.items()]
    return Table("Failed, absent, skipped", rows, 2, "" if rows else "Nothing failed, is absent or was skipped.")


def curves(frame: DataFrame) -> tuple[Table, DataFrame]:
    """The exponents, and the points: curve (op, axis, and the other sizes), provider, x, ms, in order."""
    points = [(f"{r.op} over {x}; {', '.join(f'{k} {v}' for k, v in r.sizes.items() if k != x)}, {r.dtype}",
               r.provider, r.sizes[x], r.ms) for r in frame.itertuples() for x in r.axes if r.sizes.get(x)]  # fmt: skip
    found = DataFrame(points, columns=["curve", "provider", "x", "ms"]).sort_values("x", kind="stable")
    found = found[found.groupby(["curve", "provider"]).x.transform("nunique") > 1]
    rows = [{"curve": curve, "": provider, "p": f"{np.polyfit(np.log(c.x), np.log(c.ms), 1)[0]:.2f}",
             "from": number(c.x.min()), "to": number(c.x.max())}
            for (curve, provider), c in found.groupby(["curve", "provider"], sort=False)]  # fmt: skip
    return Table("Curves: p of time ∝ sizeᵖ", rows, 2), found


def show(results: Results, width: int = 100) -> str:
    """For a terminal: the summary last, the points of curves only in the page."""
    found = [of_op(op, results.frame[results.frame.worth < SWEEP]) for op in dict.fromkeys(results.frame.op)]
    found += [curves(results.frame)[0], goals(results.frame), missing(results), summary(results)]
    return "\n\n".join([results.about, *(render(t, "text", width) for t in found), LEGEND, *results.warnings])

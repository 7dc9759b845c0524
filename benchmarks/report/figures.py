"""README's figures: time against the limit, and where a training step spends its time.

Each says in its metadata, by a digest, what was drawn and by which version of this drawing, so that whether it is up to
date can be told without drawing: another matplotlib gives other bytes.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from .colours import GRID, INK, PARTS
from .resultfile import WHOLES, shown_by_op

DRAWING = 1  # goes up with every change of how the same data is drawn
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sfr_kernels",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
OURS, PEER = "#0b4f8a", "#d55e00"
PLOT, ROW, FRAME = 5.2, 0.22, 0.9  # inches: the axes' width, a row, and what is above and below the rows
CHARACTER = 0.07  # inches, of a label: what most fonts need at most


def limits(content: dict) -> list[dict]:
    """The cases with a limit, of those shown: who of ours, and of the peers, came nearest to it."""
    found = []
    for op, races in shown_by_op(content).items():
        for race in races:
            if not race.limit_ms or op in WHOLES:
                continue
            fastest = {kind: race.fastest(kind) for kind in ("ours", "peer")}
            row = {k: (r.provider, round(r.ms / race.limit_ms, 4)) for k, r in fastest.items() if r}
            if row:
                found.append(dict(op=op, case=race.title, **row))
    return found


def parts(content: dict) -> list[dict]:
    """The training steps shown that were taken apart: milliseconds of their parts."""
    return [
        dict(case=race.title, provider=r.provider, parts={n: round(ms, 4) for n, ms in r.extra["parts"].items()})
        for race in shown_by_op(content).get("training_step", ())
        for r in race.runners
        if r.extra.get("parts")
    ]


def digest(data: list[dict]) -> str:
    """Of what is drawn, and how."""
    return hashlib.sha256(json.dumps([DRAWING, data]).encode()).hexdigest()


def drawn_digest(path: Path) -> str | None:
    """What a figure says it shows; None where there is no figure."""
    found = re.search(r"data sha256:([0-9a-f]{64})", path.read_text()) if path.exists() else None
    return found[1] if found else None


def draw_limits(data: list[dict], path: Path) -> None:
    rows = with_heads(data, "op")

    def draw(axes) -> None:
        values = [row[kind][1] for row in data for kind in ("ours", "peer") if kind in row]
        for kind, label, color, marker in (("peer", "fastest peer", PEER, "s"), ("ours", "fastest of ours", OURS, "o")):
            points = [(row[kind][1], y) for y, row in enumerate(rows) if kind in row]
            if points:
                axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=26, label=label, zorder=3)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xscale("log")
        low, high = min(0.9, min(values) / 1.1), max(2.0, max(values) * 1.15)
        axes.set_xlim(low, high)
        ticks = [t for t in (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000, 10000) if low <= t <= high]
        axes.set_xticks(ticks, [f"{t:g} ×" for t in ticks])
        axes.minorticks_off()
        axes.grid(axis="x", color=GRID, zorder=0)
        axes.set_xlabel("time, in units of the limit")

    _draw(draw, [row.get("case") for row in rows], [row.get("head") for row in rows], digest(data), path)


def draw_parts(data: list[dict], path: Path) -> None:
    rows, names = with_heads(data, "case"), list(dict.fromkeys(name for row in data for name in row["parts"]))

    def draw(axes) -> None:
        bars = [(y, row["parts"]) for y, row in enumerate(rows) if "parts" in row]
        for i, name in enumerate(names):
            color = PARTS.get(name, INK)
            values = [parts.get(name, 0.0) for _, parts in bars]
            left = [sum(parts.get(before, 0.0) for before in names[:i]) for _, parts in bars]
            axes.barh([y for y, _ in bars], values, left=left, height=0.7, color=color, label=name)
        axes.set_xlim(0, 1.02 * max(math.fsum(parts.values()) for _, parts in bars))
        axes.set_xlabel("milliseconds of a training step")

    _draw(draw, [row.get("provider") for row in rows], [row.get("head") for row in rows], digest(data), path)


def with_heads(data: list[dict], key: str) -> list[dict]:
    """Before the rows that have the same value at `key`, a row with that value as its "head"."""
    found = []
    for head, rows in groupby(data, key=lambda row: row[key]):
        found += [dict(head=head), *rows]
    return found


def _draw(
    draw: Callable,  # draws into the axes it is given, row y at height y
    labels: list[str | None],  # of every row, to the left of the axes
    heads: list[str | None],  # of the rows that have no label, from the left edge on
    found: str,  # the data's digest
    path: Path,
) -> None:
    """One plot with its rows downwards; opaque, for dark pages too."""
    import matplotlib
    from matplotlib.figure import Figure

    rows, left = len(labels), CHARACTER * max(len(label or "") for label in labels) + 0.3
    width, height = left + PLOT + 0.2, FRAME + ROW * rows
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), facecolor="white")
        axes = figure.add_axes((left / width, 0.5 / height, PLOT / width, ROW * rows / height))
        draw(axes)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), [label or "" for label in labels])
        axes.tick_params(axis="y", length=0)
        for y, head in enumerate(heads):
            if head:
                place = 0.1 / width, (0.5 + ROW * (rows - y - 0.5)) / height
                figure.text(*place, head, fontweight="bold", verticalalignment="center")
        figure.legend(loc="upper right", ncols=len(PARTS), frameon=False, borderaxespad=0.2)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = dict(Date=None, Creator="benchmarks/report/figures.py", Description=f"data sha256:{found}")
        figure.savefig(path, format="svg", metadata=metadata)

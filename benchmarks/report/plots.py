"""Bars of the report: a row for each provider under the name of its case.

Rows lie at pixel positions of their own (y is in pixels, downwards), so that the plots of a pair line up and the height
follows the number of rows. Names come from the file and are shown, never interpreted: plotly reads a little HTML, which
`plain` takes out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import plotly.graph_objects as go

from ..harness.work import GRAPH
from . import words
from .colours import FAINT, GRID, INK, PARTS
from .reading import Race, Result, Trouble

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
BAD = "#b3261e"
# Ours are the blues, and no peer is: whose a bar is can be seen before its name is read.
BLUES = {"cuda": "#0b4f8a", "triton": "#2f86c9", "torch": "#9cc9ea"}
MORE_BLUES = ("#14365c", "#5aa6dc", "#6f8fb0", "#bcdcf3")
PEERS = {  # Okabe and Ito's set, and a grey
    "eager": "#8a8f94",
    "torch.compile": "#e69f00",
    "Liger": "#d55e00",
    "cut-cross-entropy": "#009e73",
    "quack": "#cc79a7",
}
MORE_PEERS = ("#8c6d31", "#b8a800", "#7f5f9e", "#e58b7b", "#4d4d4d", "#5a8a3c", "#a23b5a")
MORE_PARTS = ("#80cdc1", "#a6611a", "#018571")
BAR, ROW, HEADER, GAP, FOOT = 13, 18, 24, 6, 46  # pixels
CUT = 6.0  # times the slowest of ours, where the bar of a slower peer is cut
LONGEST = 28  # letters of a provider's name that are shown


def plain(text: str) -> str:
    """Text that plotly shows as it is."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def palette(races: list[Race]) -> dict[str, str]:
    """A colour for each provider, the same in every plot; with and without a CUDA graph it has the same."""
    found = {}
    for kind, known, more in (("ours", BLUES, MORE_BLUES), ("peer", PEERS, MORE_PEERS)):
        names = sorted({r.provider for race in races for r in race.of(kind)})
        bases = dict.fromkeys(name.removesuffix(GRAPH) for name in names)
        others = [name for name in bases if name not in known]
        of_base = known | {name: more[i % len(more)] for i, name in enumerate(others)}
        found |= {name: of_base[name.removesuffix(GRAPH)] for name in names}
    return found


def pattern(provider: str) -> dict:
    """Hatched where a CUDA graph replays the launches."""
    return dict(shape="/", size=5, solidity=0.25, fgcolor="white") if provider.endswith(GRAPH) else dict(shape="")


@dataclass(frozen=True)
class Row:
    y: float  # pixels
    race: Race
    provider: str
    result: Result | None  # None: it failed


class Rows:
    """Where everything of a list of cases is drawn."""

    def __init__(self, races: list[Race], failed: list[Trouble] = ()):
        self.rows, self.headers, self.spans = [], [], []
        y = 0.0
        for race in races:
            self.headers.append((y + HEADER / 2, race))
            y += HEADER
            top = y
            names = {r.provider: r for r in race.runners}
            names |= {t.provider: None for t in failed if race.group in t.cases and t.provider not in names}
            for name, result in names.items():
                self.rows.append(Row(y + ROW / 2, race, name, result))
                y += ROW
            self.spans.append((top, y, race))
            y += GAP
        self.height = y
        longest = max((len(row.provider) for row in self.rows), default=0)
        self.left = 16 + 6.9 * min(longest, LONGEST)  # pixels, for the names; bold ones are the widest

    def figure(self, traces: list, title: str) -> go.Figure:
        """The rows with their names at the left; `traces` are drawn over them. What is written at the ends of bars
        lies in the right margin if need be, so that no width of the page cuts it off."""
        written = [t for t in traces if t.type == "scatter" and t.mode == "text"]
        ends = [(x, len(text)) for t in written for x, text in zip(t.x, t.text, strict=True)]
        most = max(x for x, _ in ends)
        figure = go.Figure(traces, layout(self.height + FOOT))
        ours = {(row.race.title, r.provider) for row in self.rows for r in row.race.of("ours")}
        names = []
        for row in self.rows:
            name = row.provider if len(row.provider) <= LONGEST else f"{row.provider[: LONGEST - 1]}…"
            names.append(f"<b>{plain(name)}</b>" if (row.race.title, row.provider) in ours else plain(name))
        figure.update_layout(
            margin=dict(l=self.left, r=10 + 6.2 * max(letters for _, letters in ends), t=0, b=FOOT - 4),
            yaxis=dict(
                range=[self.height, 0], tickvals=[row.y for row in self.rows], ticktext=names, fixedrange=True,
                showgrid=False, zeroline=False, ticks="", automargin=False, ticklabelstandoff=5,
            ),
            xaxis=dict(
                title=dict(text=title, font_size=12, standoff=8), gridcolor=GRID, zeroline=False,
                range=[0, most or 1.0],
            ),
            bargap=0,
        )  # fmt: skip
        for y, race in self.headers:
            figure.add_annotation(
                text=plain(race.title), x=0, xref="paper", xshift=-self.left, xanchor="left", y=y, yanchor="middle",
                showarrow=False, font=dict(size=12, color=FAINT), align="left",
            )  # fmt: skip
        return figure


def layout(height: float) -> go.Layout:
    return go.Layout(
        template="none", height=height, font=dict(family=FONT, size=12, color=INK), paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", showlegend=False, dragmode="zoom",
        hoverlabel=dict(bgcolor="white", bordercolor=FAINT, font=dict(color=INK, size=12), align="left"),
    )  # fmt: skip


def hover(race: Race, r: Result) -> str:
    """All that was measured of one bar or point."""
    lines = [
        f"<b>{plain(r.provider)}</b>",
        plain(race.heading),
        f"median {words.milliseconds(r.ms)}, quartiles {words.number(r.q1)} to {words.number(r.q3)}, {r.rounds} rounds",
    ]
    if race.limit_ms:
        lines.append(f"{words.times(r.ms / race.limit_ms)} the limit of {words.milliseconds(race.limit_ms)}")
    if (of_baseline := race.times_of(r, race.baseline)) is not None:
        lines.append(f"{words.times(of_baseline)} {plain(race.baseline)}")
    if (rate := words.rate(r.extra)) != words.EMPTY:
        lines.append(rate)
    if r.extra.get("tokens_per_s"):
        lines.append(f"{words.number(r.extra['tokens_per_s'])} tokens/s")
    if r.extra.get("peak_bytes") is not None:
        lines.append(f"peak memory {words.size(r.extra['peak_bytes'])}")
    if r.error is not None:
        bound = f", {words.number(r.worst['ratio'])} of its bound" if r.worst else ""
        lines.append(f"error {words.error(r.error)}{bound}")
    return "<br>".join(lines)


def bars(
    rows: Rows,
    value: Callable[[Row], float | None],
    text: Callable[[Row], str],
    colours: dict[str, str],
    spread: Callable[[Row], tuple[float, float]] | None = None,  # what its error bar adds and takes away
    most: float = math.inf,  # where longer bars are cut
) -> list:
    """A bar for each row that has a value, and what is written at its end."""
    traces = []
    for provider in dict.fromkeys(row.provider for row in rows.rows):
        shown = [row for row in rows.rows if row.provider == provider and row.result and value(row) is not None]
        if not shown:
            continue
        error = None
        if spread:
            plus, minus = zip(*(spread(row) for row in shown), strict=True)
            error = dict(type="data", array=plus, arrayminus=minus, thickness=1, width=3, color=INK)
        traces.append(
            go.Bar(
                orientation="h", name=plain(provider), y=[row.y for row in shown], x=[value(row) for row in shown],
                width=BAR, error_x=error, hoverinfo="text",
                marker=dict(color=colours[provider], line_width=0, pattern=pattern(provider)),
                hovertext=[hover(row.race, row.result) for row in shown],
            )
        )  # fmt: skip
    return [*traces, labels(rows, value, text, spread, most)]


def labels(rows: Rows, value: Callable, text: Callable, spread=None, most: float = math.inf) -> go.Scatter:
    """What stands at the end of each bar, and FAILED where there is none; no further right than `most`."""
    ends, words_, colours = [], [], []
    for row in rows.rows:
        number = (value(row) if row.result else None) or 0.0
        ends.append(min(number + (spread(row)[0] if spread and row.result else 0.0), most))
        words_.append(f" {'cut: ' * (number > most)}{text(row)}" if row.result else " FAILED")
        colours.append(INK if row.result else BAD)
    return go.Scatter(
        x=ends, y=[row.y for row in rows.rows], mode="text", text=words_, textposition="middle right", hoverinfo="skip",
        textfont=dict(size=11, color=colours), cliponaxis=False,
    )  # fmt: skip


def marks(
    rows: Rows, name: str, bound: Callable[[Race], float | None], unit: Callable[[Race], float], dash: str
) -> go.Scatter:
    """A vertical line across each case, where its bound lies."""
    x, y, text = [], [], []
    for top, bottom, race in rows.spans:
        if (ms := bound(race)) is not None:
            x += [ms / unit(race)] * 2 + [None]
            y += [top, bottom, None]
            text += [f"{name}: {words.milliseconds(ms)}"] * 2 + [""]
    return go.Scatter(
        x=x, y=y, mode="lines", line=dict(color=INK, width=2 if dash == "solid" else 1.5, dash=dash), hoverinfo="text",
        hovertext=text, name=name,
    )  # fmt: skip


def time_plot(races: list[Race], failed: list[Trouble], colours: dict) -> go.Figure:
    """Times in units of the limit where every case has one, in milliseconds elsewhere."""
    rows = Rows(races, failed)
    relative = all(race.limit_ms for race in races)

    def unit(race: Race) -> float:
        return race.limit_ms if relative else 1.0

    def value(row: Row) -> float:
        return row.result.ms / unit(row.race)

    def quartiles(row: Row) -> tuple[float, float]:
        r = row.result
        return max(r.q3 - r.ms, 0.0) / unit(row.race), max(r.ms - r.q1, 0.0) / unit(row.race)

    def text(row: Row) -> str:
        ms = words.milliseconds(row.result.ms)
        return f"{value(row):.2f} × · {ms}" if relative else ms

    # one peer that takes a hundred times as long must not make all the others look alike, nor one wide whisker
    ours = [value(row) for row in rows.rows if row.result and row.result.kind == "ours"]
    longest = max(value(row) for row in rows.rows if row.result)
    most = min(1.15 * longest, CUT * max(ours, default=longest))
    traces = bars(rows, value, text, colours, quartiles, most)
    traces += [marks(rows, "products alone", lambda race: race.products_ms, unit, "dot")]
    traces += [marks(rows, "limit", lambda race: race.limit_ms, unit, "solid")]
    return rows.figure(traces, "time in units of the limit" if relative else "ms")


def memory_plot(races: list[Race], failed: list[Trouble], colours: dict) -> go.Figure | None:
    """Peak memory in the same rows as the times; None if nothing was recorded."""
    rows = Rows(races, failed)
    known = [row.result.extra.get("peak_bytes") for row in rows.rows if row.result]
    known = [count for count in known if count is not None]
    if not known:
        return None
    name, unit = next(
        (n, u) for n, u in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 1024)) if max(known) >= u or u == 1024
    )

    def value(row: Row) -> float | None:
        count = row.result.extra.get("peak_bytes")
        return None if count is None else count / unit

    traces = bars(rows, value, lambda row: words.size(row.result.extra.get("peak_bytes")), colours)
    return rows.figure(traces, f"peak memory, {name}")


def step_plot(races: list[Race], failed: list[Trouble]) -> tuple[go.Figure, dict[str, str]] | None:
    """What a training step's time is made of, and the colour of each part; None if no step was taken apart."""
    rows = Rows([race for race in races if any(r.extra.get("parts") for r in race.runners)], failed)
    names = list(dict.fromkeys(p for row in rows.rows if row.result for p in row.result.extra.get("parts") or ()))
    if not names:
        return None
    others = [name for name in names if name not in PARTS]
    colours = {n: PARTS.get(n) or MORE_PARTS[others.index(n) % len(MORE_PARTS)] for n in names}
    shown, traces = [row for row in rows.rows if row.result and row.result.extra.get("parts")], []
    for name in names:
        traces.append(
            go.Bar(
                orientation="h", name=plain(name), y=[row.y for row in shown], width=BAR,
                x=[row.result.extra["parts"].get(name, 0.0) for row in shown], hoverinfo="text",
                marker=dict(color=colours[name], line=dict(color="white", width=0.5)),
                hovertext=[
                    f"<b>{plain(name)} {words.milliseconds(row.result.extra['parts'].get(name, 0.0))}</b><br>"
                    + hover(row.race, row.result)
                    for row in shown
                ],
            )
        )  # fmt: skip

    def total(row: Row) -> float:
        return sum((row.result.extra.get("parts") or {}).values())

    def text(row: Row) -> str:
        rate = row.result.extra.get("tokens_per_s")
        return words.milliseconds(row.result.ms) + (f" · {words.number(rate)} tokens/s" if rate else "")

    traces.append(labels(rows, total, text))
    figure = rows.figure(traces, "ms of one step")
    return figure.update_layout(barmode="stack"), colours

"""Points and lines of the report: sweeps, the roofline, bandwidths, errors over their bounds."""

import math
from dataclasses import dataclass

import plotly.graph_objects as go

from ..harness.work import LIMIT
from . import words
from .colours import FAINT, GRID, INK
from .fits import Sweep
from .plots import hover, layout, plain
from .reading import Race, Result

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
BELOW = dict(orientation="h", x=0, y=-0.17, yanchor="top", font_size=12)
SHORT = 24  # letters of a name that has room beside its row
TICKS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000, 10000)
UNDER = 96  # pixels for the axis and the legend of a plot of dots


def lines(curves: list[Sweep], races: list[Race], colours: dict) -> go.Figure:
    """One sweep, log against log: a line for each provider, the fitted exponent in the legend; the limit in black."""
    series, axis = curves[0].series, curves[0].axis
    known = {}
    for race in races:
        for point in race.sweeps:
            if (point["series"], point["axis"]) == (series, axis):
                known |= {(r.provider, point["x"]): hover(race, r) for r in race.results}
    ours = {r.provider for race in races for r in race.of("ours")}
    traces = []
    for number, curve in enumerate(sorted(curves, key=lambda c: (c.provider not in ours, c.provider not in colours))):
        bound, own = curve.provider not in colours, curve.provider in ours
        grows = "" if curve.exponent is None else f" ({curve.exponent:.2f})"
        dash = "solid" if not bound else "dash" if curve.provider == LIMIT else "dot"
        traces.append(
            go.Scatter(
                x=curve.xs, y=curve.ms, name=f"{plain(curve.provider)}{grows}",
                mode="lines" if bound else "lines+markers",
                line=dict(color=colours.get(curve.provider, INK), width=2.6 if own else 1.5, dash=dash),
                marker=dict(size=8 if own else 7, symbol=SYMBOLS[number % len(SYMBOLS)]), hoverinfo="text",
                hovertext=[known[curve.provider, x] for x in curve.xs],
            )
        )  # fmt: skip
    xs = sorted({x for curve in curves for x in curve.xs})
    figure = go.Figure(traces, layout(400))
    return figure.update_layout(
        showlegend=True, legend=BELOW,
        margin=dict(l=56, r=28, t=8, b=44),
        xaxis=dict(
            type="log", title=dict(text=plain(axis), standoff=6), tickvals=xs, ticktext=[tick(x) for x in xs],
            gridcolor=GRID, zeroline=False,
        ),
        yaxis=log_axis("ms"),
    )  # fmt: skip


def tick(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:g}"


def log_axis(title: str) -> dict:
    return dict(
        type="log", title=dict(text=title, standoff=4), gridcolor=GRID, zeroline=False, dtick="D2", tickformat="~g",
        exponentformat="none",
    )  # fmt: skip


def intensity(race: Race) -> float | None:
    """FLOP of the products for each byte that must move at least, their operands and results included."""
    for r in race.runners:
        if r.extra.get("flops") and r.extra.get("traffic"):
            return r.extra["flops"] / r.extra["traffic"]
    return None


def achieved(r: Result) -> float:
    """TFLOP/s."""
    return r.extra.get("tflop_per_s") or r.extra["flops"] / r.ms / 1e9


def roofline(races: list[Race], copy: float | None, products: dict[str, float], colours: dict) -> go.Figure | None:
    """TFLOP/s of every case with products, under what the device reached in the same run; None if no case has any."""
    points = [
        (intensity(race), race, r) for race in races if intensity(race) for r in race.runners if r.extra.get("flops")
    ]
    if not points:
        return None
    ops = list(dict.fromkeys(race.op for _, race, _ in points))
    symbols = {op: SYMBOLS[i % len(SYMBOLS)] for i, op in enumerate(ops)}
    roofs = {dtype: products[dtype] for dtype in sorted({race.dtype for _, race, _ in points} & set(products))}
    corners = [top / copy for top in roofs.values()] if copy else []
    xs = [x for x, *_ in points] + corners
    left, right, traces = min(xs) / 2, max(xs) * 2, []
    for dtype, top in roofs.items():
        name = f"{plain(dtype)}: {words.number(top)} TFLOP/s"
        xs = [left, top / copy, right] if copy else [left, right]
        ys = [min(top, x * copy) if copy else top for x in xs]
        traces.append(
            go.Scatter(
                x=xs, y=ys, mode="lines", name=name, line=dict(color=INK, width=2), hoverinfo="text",
                hovertext=[f"measured ceiling, {name}"] * len(xs),
            )
        )  # fmt: skip
    for provider, colour in colours.items():
        if own := [p for p in points if p[2].provider == provider]:
            marker = dict(color=colour, size=9, line=dict(color="white", width=0.7))
            traces.append(
                go.Scatter(
                    x=[x for x, *_ in own], y=[achieved(r) for *_, r in own], mode="markers", name=plain(provider),
                    marker=marker | dict(symbol=[symbols[race.op] for _, race, _ in own]), hoverinfo="text",
                    hovertext=[f"{hover(race, r)}<br>{plain(race.op)}" for _, race, r in own],
                )
            )  # fmt: skip
    for op in ops:  # what the symbols mean
        marker = dict(color=FAINT, symbol=symbols[op], size=9)
        traces.append(go.Scatter(x=[None], y=[None], mode="markers", name=plain(op), marker=marker))
    figure = go.Figure(traces, layout(480))
    return figure.update_layout(
        showlegend=True, legend=BELOW, margin=dict(l=60, r=28, t=8, b=44),
        xaxis=log_axis("FLOP for each byte that must move at least"), yaxis=log_axis("TFLOP/s"),
    )  # fmt: skip


@dataclass(frozen=True)
class Dot:
    x: float
    race: Race
    result: Result
    large: bool = True


def dots(
    rows: list[tuple[str, list[Dot]]],  # a name, and what is in its row
    colours: dict[str, str],
    title: str,
    bound: float | None,  # where there is a black line
    *,
    log: bool = False,
) -> go.Figure:
    """A row of points beside each name, or under it where names are long."""
    longest = max(len(name) for name, _ in rows)
    beside = longest <= SHORT
    pitch, middle = (24, 12) if beside else (38, 27)  # pixels
    height, traces = pitch * len(rows), []
    xs = [dot.x for _, found in rows for dot in found] + [bound] * (bound is not None)
    if bound is not None:
        line = dict(color=INK, width=2)
        ends = dict(x=[bound] * 2, y=[0, height])
        traces.append(go.Scatter(**ends, mode="lines", line=line, hoverinfo="skip", showlegend=False))
    for provider, colour in colours.items():
        own = [(i, dot) for i, (_, found) in enumerate(rows) for dot in found if dot.result.provider == provider]
        if own:
            marker = dict(color=colour, opacity=0.85, line=dict(color="white", width=0.7))
            traces.append(
                go.Scatter(
                    x=[dot.x for _, dot in own], y=[pitch * i + middle for i, _ in own], mode="markers",
                    name=plain(provider), marker=marker | dict(size=[11 if dot.large else 7 for _, dot in own]),
                    hoverinfo="text", cliponaxis=False,
                    hovertext=[f"{plain(dot.race.op)}<br>{hover(dot.race, dot.result)}" for _, dot in own],
                )
            )  # fmt: skip
    figure = go.Figure(traces, layout(height + UNDER))
    for i, (name, _) in enumerate([] if beside else rows):
        figure.add_annotation(
            text=plain(name), x=0, xref="paper", xanchor="left", y=pitch * i + 10, showarrow=False,
            font=dict(size=12, color=FAINT),
        )  # fmt: skip
    axis = dict(title=dict(text=title, standoff=6), gridcolor=GRID, zeroline=False)
    if log:
        low, high = math.log10(min(xs)), math.log10(max(xs))
        ticks = [t for t in TICKS if 0.9 * min(xs) <= t <= 1.1 * max(xs)]
        axis |= dict(type="log", range=[low - 0.04, high + 0.06], tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    else:
        axis |= dict(range=[0, 1.06 * max(xs)])
    return figure.update_layout(
        showlegend=True, legend=BELOW | dict(y=-46 / height), xaxis=axis,
        margin=dict(l=16 + 6.9 * longest if beside else 12, r=16, t=0, b=UNDER),
        yaxis=dict(
            range=[height, 0], tickvals=[pitch * i + middle for i in range(len(rows))],
            ticktext=[plain(name) if beside else "" for name, _ in rows], gridcolor=GRID, zeroline=False,
            fixedrange=True, ticklabelstandoff=6,
        ),
    )  # fmt: skip


def overview(by_op: dict[str, list[Race]], colours: dict) -> go.Figure | None:
    """Of every case with a limit the best of ours and the fastest peer, a row for each op; None if there is none."""
    rows = []
    for op, races in by_op.items():
        found = [
            Dot(r.ms / race.limit_ms, race, r, kind == "ours")
            for kind in ("peer", "ours")
            for race in races
            if race.limit_ms and (r := race.fastest(kind))
        ]
        rows += [(op, found)] * bool(found)
    return dots(rows, colours, "time in units of the limit, log scale", 1.0, log=True) if rows else None


def bandwidth(races: list[Race], copy: float | None, colours: dict) -> go.Figure | None:
    """TB/s of the kernels without products beside the copy; None if there is none."""
    rows = []
    for race in races:
        rates = [(r, r.extra.get("tb_per_s")) for r in race.runners if not race.flops]
        if found := [Dot(rate, race, r) for r, rate in rates if rate]:
            rows.append((f"{race.op}: {race.title}", found))
    return dots(rows, colours, "TB/s, read and written", copy) if rows else None


def errors(races: list[Race], colours: dict) -> go.Figure | None:
    """Errors of ours over their bounds, a row for each op; None if none was recorded."""
    rows: dict[str, list[Dot]] = {}
    for race in races:
        for r in race.of("ours"):
            if r.worst and r.worst["ratio"] is not None:
                rows.setdefault(race.op, []).append(Dot(r.worst["ratio"], race, r))
    return dots(list(rows.items()), colours, "error over its bound", 1.0) if rows else None

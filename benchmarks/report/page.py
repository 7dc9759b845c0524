"""The report: a single HTML file with plots and tables that needs no network. Names in it are data, and escaped."""

from html import escape
from itertools import cycle
from pathlib import Path
from string import Template
from textwrap import wrap

import plotly.express as px
from pandas import DataFrame
from plotly.offline import get_plotlyjs

from sfr_kernels.atomic import write_atomically

from ..case import SWEEP
from . import tables
from .data import Results

COLOURS = {"ours": ["#0b4f8a", "#3b8bd0", "#8fc1ea"], "limit": ["#9aa3ab", "#c8cdd2"],
           "peer": ["#c51b7d", "#e08214", "#7fbc41", "#8073ac", "#b35806", "#35978f"]}  # fmt: skip


def text(name: str) -> str:  # as plotly shows it: tags are formatting there
    return "<br>".join(map(escape, wrap(name, 38)))


def drawn(plot, frame: DataFrame, x: str, y: str, title: str, height: int, **looks) -> str:
    if (frame := frame[frame[x].notna()]).empty:
        return ""
    figure = plot(frame, x=x, y=y, color="name", **looks).update_xaxes(title=title).update_yaxes(ticklabelstandoff=6)
    figure.update_layout(template="plotly_white", height=height, margin=dict(l=8, r=8, t=8, b=8),
                         legend=dict(title="", orientation="h", y=1, yanchor="bottom"))  # fmt: skip
    if plot is px.bar:
        figure.update_traces(textangle=0, cliponaxis=False).update_yaxes(autorange="reversed", title="")
    return figure.to_html(full_html=False, include_plotlyjs=False, config=dict(displayModeBar=False, responsive=True))


def write(results: Results, path: Path | str) -> None:
    frame = results.frame.assign(name=results.frame.provider.map(text), mib=results.frame.held_bytes / 2**20)
    frame["case"] = (frame.label + ", " + frame.dtype).map(text)
    palettes = {kind: cycle(colours) for kind, colours in COLOURS.items()}
    colours = {r.name: next(palettes[r.kind]) for r in frame.drop_duplicates("name").itertuples()}
    looks, lines = dict(color_discrete_map=colours, log_x=True), ""
    bars, line = dict(orientation="h", text_auto=",.3r", color_discrete_map=colours), dict(log_y=True, markers=True)
    errors = drawn(px.strip, frame, "of_bound", "op", "error over its bound", 400, hover_name="case", **looks)
    found = [(tables.summary(results), errors), (tables.missing(results), ""), (tables.goals(frame), "")]
    for op in dict.fromkeys(frame.op):
        shown = frame[(frame.op == op) & (frame.worth < SWEEP)]
        timed = ("of_reference", "time × reference") if shown.of_reference.notna().any() else ("ms", "ms")
        plots = [drawn(px.bar, shown, x, "case", title, 110 + 26 * len(shown), barmode="group", **bars)
                 for x, title in (timed, ("mib", "peak memory, MiB"))]  # fmt: skip
        parts = [(f"{r.name}<br>{r.case}", text(part), ms) for r in shown.itertuples() for part, ms in r.parts.items()]
        parts = DataFrame(parts, columns=["step", "name", "ms"])
        plots.append(drawn(px.bar, parts, "ms", "step", "ms of the parts", 110 + 60 * parts.step.nunique(), **bars))
        found.append((tables.of_op(op, frame), "".join(plots)))
    exponents, curves = tables.curves(frame)
    for name, points in curves.assign(name=curves.provider.map(text)).groupby("curve", sort=False):
        lines += f"<h3>{escape(name)}</h3>" + drawn(px.line, points, "x", "ms", "", 380, **line, **looks)
    found.append((exponents, lines))
    body = [f"<section><h2>{escape(t.title)}</h2>{plots}\n{tables.render(t, 'html')}</section>" for t, plots in found]
    warnings = [f"<p class=banner>{escape(warning)}</p>" for warning in results.warnings]
    page = Template(Path(__file__).with_name("page.html").read_text()).substitute(
        device=escape(results.facts["device"]), about=escape(results.about), legend=tables.LEGEND,
        warnings="".join(warnings), body="\n".join(body), plotly=get_plotlyjs())  # fmt: skip
    write_atomically(Path(path), page.encode())

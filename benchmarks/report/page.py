"""The report of one result file: a single HTML file that needs no network.

Every plot is a <div> with an id of its own, so that it can be linked to; a plot that has nothing to show is left out,
and the section says why. Names in the file are data: they are escaped for HTML, for JSON inside it, and for plotly.
"""

from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sfr_kernels.atomic import write_atomically

from ..harness.work import LIMIT, PRODUCTS
from . import curves, plots, tables, words
from .fits import Sweep, by_plot, sweeps
from .reading import Race, Trouble, ceilings, troubles, validate
from .resultfile import OPS, device_of, is_gpu, missed_goals, races_by_op, shortfall

NOT_RACED = "ceilings"  # what the device can do, not a case
LEGEND_OF_BARS = "Bars: medians; whiskers: quartiles."
SCRIPT = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


@dataclass(frozen=True)
class Plot:
    id: str
    heading: str
    reading: str  # one sentence: how to read it
    json: Markup
    key: dict[str, str]  # what colours mean that the plot itself does not name


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    about: str
    plots: list[Plot]
    notes: list[str]  # what is not shown, and why
    table: tables.Table | None = None  # all numbers, folded away
    short: tables.Table | None = None


def plot(id: str, heading: str, reading: str, figure: go.Figure, key: dict[str, str] | None = None) -> Plot:
    return Plot(id, heading, reading, Markup(figure.to_json().translate(SCRIPT)), key or {})


def op_section(op: str, found: list[Race], failed: list[Trouble], colours: dict) -> Section:
    """Times and memory of an op's cases; the points of sweeps are in its table, and drawn as curves elsewhere."""
    shown, drawn, notes = [race for race in found if race.is_main and race.runners], [], []
    if len(shown) < len(found):
        notes.append(f"{len(found) - len(shown)} of {len(found)} cases are points of sweeps: see Sweeps.")
    stepped = op == "training_step" and plots.step_plot(shown, failed)
    if stepped:
        figure, key = stepped
        reading = "Each bar is a step, cut into what it consists of; at its end the median of whole steps."
        drawn.append(plot("plot-step", "Time of a step", reading, figure, key))
    elif shown:
        known = [name for name in (LIMIT, PRODUCTS) if any(getattr(race, f"{name}_ms") for race in shown)]
        marks = {LIMIT: " Black line: the limit.", PRODUCTS: " Dotted: the matrix products alone."}
        reading = LEGEND_OF_BARS + "".join(marks[name] for name in known) + " Shorter is better."
        figure = plots.time_plot(shown, failed, colours)
        drawn.append(plot(f"plot-time-{op}", "Time against the limit" if known else "Time", reading, figure))
        if op == "training_step":
            notes.append("No step was taken apart, so there is no breakdown.")
        if not known:
            notes.append("No limit was measured for these cases.")
    if memory := plots.memory_plot(shown, failed, colours) if shown else None:
        reading = "Most bytes held beyond inputs and returned results."
        drawn.append(plot(f"plot-memory-{op}", "Peak memory", reading, memory))
    elif shown:
        notes.append("Peak memory was not recorded.")
    short = tables.steps(shown) if stepped else None
    return Section(f"op-{op}", op, OPS.get(op, ""), drawn, notes, tables.results(found), short)


def overview(by_op: dict[str, list[Race]], colours: dict) -> list[Plot]:
    """All cases with a limit, in one plot."""
    if (figure := curves.overview(by_op, colours)) is None:
        return []
    reading = (
        "A large point for the best of ours at each case, a small one for the fastest peer. Black line: the limit."
    )
    return [plot("plot-overview", "Every case against its limit", reading, figure)]


def sweep_section(found: list[Sweep], raced: list[Race], colours: dict) -> Section:
    groups, drawn, notes = by_plot(found), [], []
    for number, ((series, axis), group) in enumerate(groups.items(), 1):
        if max(len(curve.xs) for curve in group) < 2:
            notes.append(f"{series}, against {axis}: a single point was measured, which is no curve.")
            continue
        reading = f"In brackets: p of time ∝ {axis}ᵖ, by least squares over all points."
        figure = curves.lines(group, raced, colours)
        drawn.append(plot(f"plot-sweep-{number}", f"{series}, against {axis}", reading, figure))
    if not groups:
        notes.append("No sweep was measured: the selection has none, or it was stopped before.")
    return Section("sweeps", "Sweeps", "one size varied, the others held; log against log", drawn, notes)


def roofline_section(content: dict, raced: list[Race], colours: dict) -> Section:
    copy, products = ceilings(content)
    shown, drawn, notes = [race for race in raced if race.is_main], [], []
    if figure := curves.roofline(shown, copy, products, colours):
        reading = "Points: cases; lines: the product and copy rates of this run. Nearer to its line is better."
        drawn.append(plot("plot-roofline", "Products", reading, figure))
    else:
        notes.append("No case has both matrix products and a count of the bytes that move: there is no roofline.")
    if figure := curves.bandwidth(shown, copy, colours):
        reading = "Kernels without products. Black line: a copy of this run. Further right is better."
        drawn.append(plot("plot-bandwidth", "Bandwidth", reading, figure))
    else:
        notes.append("No kernel without products was measured.")
    if not copy or not products:
        lacking = " and ".join(name for name, there in (("copy", copy), ("matrix product", products)) if not there)
        notes.append(f"This run measured no ceiling for {lacking}: points stand without it.")
    return Section("roofline", "Roofline", "what the hardware did, against what it can do", drawn, notes)


def correctness_section(raced: list[Race], colours: dict) -> Section:
    drawn, notes = [], []
    if figure := curves.errors(raced, colours):
        reading = "A point for each case of ours, at the output nearest to its bound; right of the black line is wrong."
        drawn.append(plot("plot-errors", "Worst error over its bound", reading, figure))
    else:
        notes.append("No errors of ours were recorded.")
    about = "L2 errors against float64, of the loss and every gradient, before anything was timed"
    return Section("correctness", "Correctness", about, drawn, notes, tables.errors(raced))


def facts(content: dict) -> list[tuple[str, str]]:
    """Where and when, in words; what is unknown is left out, except for libraries: those are absent."""
    about, (copy, products) = content["sfr_kernels"], ceilings(content)
    device, clocks = about["device"], about["device"].get("clocks") or {}
    found = [("Device", device_of(content)), ("Compute capability", device.get("capability"))]
    found.append(("Memory", words.size(device["memory_bytes"]) if device.get("memory_bytes") else None))
    now = []
    for name, key in (("SM", "sm"), ("memory", "memory")):
        if clocks.get(f"{key}_mhz"):
            most = clocks.get(f"max_{key}_mhz")
            now.append(f"{name} {clocks[f'{key}_mhz']} MHz" + (f" of at most {most}" if most else ""))
    found.append(("Clocks", ", ".join(now) or "not recorded"))
    found.append(("Power limit", f"{clocks['power_limit_w']:g} W" if clocks.get("power_limit_w") else None))
    ceiling = [f"copy {words.number(copy)} TB/s"] if copy else []
    ceiling += [f"{dtype} product {words.number(rate)} TFLOP/s" for dtype, rate in products.items()]
    found.append(("Measured ceilings", ", ".join(ceiling) or "none"))
    found.append(("Driver", device.get("driver")))
    versions = about.get("versions") or {}
    found.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    found.append(("Not there", ", ".join(name for name, version in versions.items() if not version)))
    revision = (about.get("revision") or "unknown")[:12] + (", with local changes" if about.get("modified") else "")
    found += [("Revision", f"sfr_kernels {about.get('version', '')}, {revision}"), ("Date", about.get("date"))]
    state = "complete" if shortfall(content) is None else "NOT COMPLETE"
    found.append(("Selection", f"{about.get('selection', 'unknown')}, {state}"))
    return [(name, value) for name, value in found if value]


def render(content: dict) -> str:
    """The report's HTML. ValueError if `content` is not that of a result file."""
    validate(content)
    by_op = {op: found for op, found in races_by_op(content).items() if op != NOT_RACED}
    raced = [race for races in by_op.values() for race in races]
    colours, failed, absent = plots.palette(raced), troubles(content, "failed"), troubles(content, "absent")
    sections = [op_section(op, races, failed, colours) for op, races in by_op.items()]
    if "training_step" not in by_op:
        note = "No training step was measured: there is no breakdown of one."
        sections.append(Section("op-training_step", "training_step", OPS["training_step"], [], [note]))
    sections.append(sweep_section(sweeps(content["benchmarks"]), raced, colours))
    sections.append(roofline_section(content, raced, colours))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        device=device_of(content),
        is_gpu=is_gpu(content),
        shortfall=shortfall(content),
        facts=facts(content),
        summary=tables.summary(by_op, failed),
        against=tables.against(raced),
        overview=overview(by_op, colours),
        failed=failed,
        absent=absent,
        goals=missed_goals(content),
        correctness=correctness_section(raced, colours),
        sections=sections,
        plotly=Markup(get_plotlyjs()),
    )


def write_report(content: dict, path: Path) -> None:
    """Writes the report of a result file's content, whole or not at all; ValueError if it is not one."""
    write_atomically(path, render(content).encode())

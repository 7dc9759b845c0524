"""What the commands show: a progress bar, loss curves, tables of answers and of what they measure, and plots of it."""

import io
import itertools
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback

from ..atomic import write_atomically
from ..evaluation.compare import CLAIMS, DETAILS, FEWEST_PROMPTS, Cell, Measured, Setting, compare, measure
from ..evaluation.generate import Answer

_COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa3377", "#999933", "#66ccee", "#ee7733", "#bbbbbb")


class ProgressBar(TrainerCallback):
    """A bar of optimizer steps, with the losses and tokens per second."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")
        self.start, self.seen = time.monotonic(), None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        shown = {"ce": f"{logs.get('ce_loss', logs['loss']):.3f}"}
        if "flow_loss" in logs:
            shown["flow"] = f"{logs['flow_loss']:.3f}"
        tokens = state.num_input_tokens_seen
        if self.seen is None:  # the first step warms up
            self.start, self.seen = time.monotonic(), tokens
        elif tokens > self.seen:
            shown["tok/s"] = f"{(tokens - self.seen) / (time.monotonic() - self.start):.0f}"
        self.bar.set_postfix(shown, refresh=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def loss_curves(history: list[dict], results: dict, path: Path) -> None:
    """Draws the training losses, with the held-out values before and after, and the share of the flow, as PNG."""
    titles = {
        "ce_loss": "cross-entropy (nats per token)", "flow_loss": "flow loss",
        "flow_share": "flow share: ‖∂(λ L_flow)/∂h‖ / ‖∂L_CE/∂h‖",
    }  # fmt: skip
    names = [n for n in titles if n in history[0]] or ["loss"]
    figure = _figure(5 * len(names), 3.6)
    steps = [h["step"] for h in history]
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot(steps, [h.get(name, math.nan) for h in history], color=_COLOURS[0], label="training")
        held = "ce_loss" if name == "loss" else name
        points = [results[k].get(held) for k in ("held_out_before", "held_out_after")]
        if None not in points:
            axis.plot([0, steps[-1]], points, "o--", color=_COLOURS[1], label="held out")
        axis.set(title=titles.get(name, name), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def samples_table(
    title: str,
    cells: Sequence[Cell],
    answers: dict[str, Sequence[str]],  # by model, for each cell
    path: Path,
    printed: tuple[int, int] = (0, 0),  # prompts, and personas of each
) -> None:
    """Writes the answers as Markdown, persona by persona, and prints the first of them."""
    lines, columns = [f"# {title}"], ["persona", *answers]
    rows = [(cell.prompt, [cell.persona, *texts]) for cell, *texts in zip(cells, *answers.values(), strict=True)]
    for number, (prompt, group) in enumerate(itertools.groupby(rows, key=lambda row: row[0])):
        table = [row for _, row in group]
        if number < printed[0]:
            _print(prompt, columns, table[: printed[1]], ratios=(1, *[4] * len(answers)))
        lines += ["", f"## {' '.join(prompt.split())}", "", *_markdown(columns, table)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def write_comparison(
    path: Path,  # without its ending: .json, .md and the plots' names are added
    setting: Setting,
    measured: dict[str, Measured],  # the baseline first
    about: dict,  # how the answers were made
) -> None:
    """Prints the table and writes what it is made of, in place of what is there."""
    baseline, *_ = measured
    found = compare({label: m.values for label, m in measured.items()}, baseline)
    result = {
        "about": about, "prompts": setting.prompts, "personas": [p for p in setting.personas if p],
        "answers": len(setting.cells) * about["sampling"]["samples"], "baseline": baseline, "models": found,
    }  # fmt: skip
    if setting.references is not None:
        of_data = measure(setting, [[Answer(text, True) for text in texts] for texts in setting.references])
        result["data"] = {name: float(np.nanmean(column)) for name, column in of_data.values.items()}
        if setting.probe_knows_references:
            result["data"].pop("style fidelity", None)
        measured = {"the data": of_data} | measured
    shown = {label: m.similarity for label, m in measured.items() if m.similarity is not None}
    result["similarity"] = {label: matrix.tolist() for label, matrix in shown.items()}
    text = json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"
    write_atomically(path.with_suffix(".json"), text.encode())
    comparison_table(result, path.with_suffix(".md"))
    plots = [path.with_name(f"{path.name}-{name}.png") for name in ("collapse", "fidelity")]
    for plot in plots:
        plot.unlink(missing_ok=True)
    if shown:
        collapse_matrices(setting.personas, shown, plots[0])
    diversity_against_fidelity(result, plots[1])


def comparison_table(result: dict, path: Path) -> None:
    """Prints a comparison of models, the result of `write_comparison`, as a table, and writes it as Markdown."""
    baseline, models, data = result["baseline"], result["models"], result.get("data")
    others = [label for label in models if label != baseline]
    columns = ["measure", *(["the data"] if data else []), baseline, *others]
    rows = [
        [
            f"{name} {_ARROWS[(CLAIMS | DETAILS).get(name, 1)]}".strip(),
            *([_number(data.get(name, math.nan))] if data else []),
            _number(models[baseline][name]["mean"] if name in models[baseline] else math.nan),
            *(_cell(models[label].get(name)) for label in others),
        ]
        for name in dict.fromkeys(name for measures in models.values() for name in measures)
    ]
    title = f"Prompts: {len(result['prompts'])}; answers of each model: {result['answers']}"
    notes = []
    if others and len(result["prompts"]) < FEWEST_PROMPTS:
        notes = [f"Fewer than {FEWEST_PROMPTS} prompts say nothing of a difference (evaluate --prompts all)."]
    elif others:
        notes = [
            f"In brackets: the difference from {baseline}, and its 95% interval over prompts. ★: more than chance, "
            f"with {', '.join(name for name in models[baseline] if name in CLAIMS)} of a model counted together.",
            *(_verdict(label, baseline, models[label]) for label in others),
        ]
    _print(title, columns, rows)
    print(*notes, sep="\n", flush=True)
    lines = [f"# {title}", "", *_markdown(columns, rows), *itertools.chain.from_iterable(("", note) for note in notes)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


_ARROWS = {1: "↑", -1: "↓", 0: ""}  # which way is better


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}".replace("-0.000", "0.000")


def _signed(value: float) -> str:
    return ("−" if value < 0 else "+") + _number(abs(value))


def _cell(measure: dict | None) -> str:
    """Of a model that is compared: its mean, and the difference."""
    if measure is None:
        return "–"
    difference = measure.get("difference", {"low": math.nan})
    if math.isnan(difference["low"]):
        return _number(measure["mean"])
    mean, low, high = (_signed(difference[name]) for name in ("mean", "low", "high"))
    return f"{_number(measure['mean'])} ({mean} [{low}, {high}]{' ★' if difference['differs'] else ''})"


def _verdict(label: str, baseline: str, measures: dict) -> str:
    found = {name: m["difference"] for name, m in measures.items() if name in CLAIMS and "difference" in m}
    parts: dict[str, list[str]] = {"higher": [], "lower": [], "no difference": [], "too few prompts": []}
    for name, difference in found.items():
        way = "higher" if difference["mean"] > 0 else "lower"
        tested = "too few prompts" if math.isnan(difference["p"]) else "no difference"
        parts[way if difference["differs"] else tested].append(name)
    if parts["no difference"] == list(found):
        return f"{label} and {baseline}: no difference."
    told = "; ".join(f"{word}: {', '.join(names)}" for word, names in parts.items() if names)
    return f"{label} against {baseline}: {told}."


def collapse_matrices(personas: Sequence[str], similarity: dict[str, np.ndarray], path: Path) -> None:
    """Draws, for each model, how alike two personas answer the same prompt: the mean cosine of their answers. On the
    diagonal it is of the samples of one."""
    size = min(max(2.6, 0.32 * len(personas)), 12.0)
    names = [_plain(name) if len(name) <= 24 else _plain(f"{name[:23]}…") for name in personas]
    names = names if len(names) <= 60 else []
    figure = _figure((size + 0.6) * len(similarity) + 1.2, size + 1.4)
    axes = figure.subplots(1, len(similarity), squeeze=False, sharey=True)[0]
    for axis, (label, matrix) in zip(axes, similarity.items(), strict=True):
        image = axis.imshow(matrix, vmin=0.0, vmax=1.0, cmap="viridis")
        for at, value in np.ndenumerate(matrix if len(personas) <= 12 else np.zeros((0, 0))):
            if not math.isnan(value):
                axis.text(*at[::-1], f"{value:.2f}".lstrip("0"), ha="center", va="center", color="white", fontsize=6)
        off = matrix[~np.eye(len(personas), dtype=bool)]
        axis.set_title(f"{_plain(label)}\nbetween personas: {np.nanmean(off):.3f}", fontsize=9)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(image, ax=list(axes), label="mean cosine of answers", shrink=0.8)
    _save(figure, path)


def diversity_against_fidelity(result: dict, path: Path) -> None:
    """Draws the distance between personas against style fidelity; without personas, that within a prompt's answers
    against their relevance."""
    names = next(iter(result["models"].values()))
    pairs = [("style fidelity", "distance between personas"), ("relevance", "distance between samples")]
    chosen = next((pair for pair in pairs if set(pair) <= set(names)), None)
    if chosen is None:
        return
    figure = _figure(5, 4.5)
    axis = figure.subplots()
    for colour, (label, measures) in zip(itertools.cycle(_COLOURS), result["models"].items(), strict=False):
        (x, y), bars = [measures[name]["mean"] for name in chosen], [_bar(measures[name]) for name in chosen]
        axis.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt="o", capsize=3, color=colour, label=_plain(label))
    if set(chosen) <= set(result.get("data", {})):
        axis.plot(*(result["data"][name] for name in chosen), "*", color="black", markersize=12, label="the data")
    axis.set(xlabel=chosen[0], ylabel=chosen[1], title="bars, if any: 95% intervals of each mean")
    axis.locator_params(nbins=5)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    _save(figure, path)


def spread_plot(
    tokens: Sequence[str], spread: Sequence[float], trained: Sequence[bool], together: float, path: Path
) -> None:
    """Draws the spread of futures along a response, and that of all its tokens together, as PNG; grey where training
    has no target."""
    named = len(tokens) <= 80
    figure = _figure(min(max(5.0, 0.2 * len(tokens)), 16.0), 3.6)
    axis = figure.subplots()
    axis.plot(range(len(tokens)), spread, "o-", markersize=3, color=_COLOURS[0], label="of a token")
    axis.axhline(together, linestyle="--", color=_COLOURS[1], label="of whatever tokens")
    for at, known in enumerate(trained):
        if not known:
            axis.axvspan(at - 0.5, at + 0.5, color="#eeeeee", linewidth=0)
    if named:
        names = [_plain(token.strip(" ").replace("\n", "\\n")) for token in tokens]
        axis.set_xticks(range(len(tokens)), names, rotation=90, fontsize=7)
    axis.set(xlabel="" if named else "token of the response", ylabel="spread of futures", xmargin=0.01)
    axis.set_ylim(bottom=0.0)
    axis.legend()
    axis.grid(alpha=0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # which is drawn as a box
        _save(figure, path)


def _plain(text: str) -> str:
    """Not to be read as mathematics."""
    return text.replace("$", r"\$")


def _bar(measure: dict) -> list[list[float]] | None:
    if not math.isfinite(measure["high"] - measure["low"]):
        return None
    return [[measure["mean"] - measure["low"]], [measure["high"] - measure["mean"]]]


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], ratios: Sequence[int] = ()) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 140  # of a log, which folds nothing
    table = Table(title=Text(title), title_justify="left", show_lines=bool(ratios))
    for column, ratio in itertools.zip_longest(columns, ratios):
        table.add_column(Text(column), ratio=ratio)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in (columns, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, dpi=120, format="png")
    write_atomically(path, data.getvalue())


def _finite(value):
    """NaN and infinity as null, for which JSON has no numbers."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

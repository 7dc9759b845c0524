"""What the commands show: a progress bar, loss curves, tables of answers and of what they measure, and plots of it."""

import io
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import TrainerCallback

from ..atomic import write_atomically
from ..evaluation.compare import CLAIMS, DETAILS, FEWEST_PROMPTS
from ..training.formats import Example

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
    """Draws the training losses, with the held-out values before and after, as PNG."""
    names = [n for n in ("ce_loss", "flow_loss") if n in history[0]] or ["loss"]
    titles = {"ce_loss": "cross-entropy (nats per token)", "flow_loss": "flow loss", "loss": "loss"}
    figure = _figure(5 * len(names), 3.6)
    steps = [h["step"] for h in history]
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot(steps, [h[name] for h in history], color=_COLOURS[0], label="training")
        held = "ce_loss" if name == "loss" else name
        points = [results[k].get(held) for k in ("held_out_before", "held_out_after")]
        if None not in points:
            axis.plot([0, steps[-1]], points, "o--", color=_COLOURS[1], label="held out")
        axis.set(title=titles[name], xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def samples_table(examples: Sequence[Example], before: Sequence[str], after: Sequence[str], path: Path) -> None:
    """Prints the answers before and after, persona by persona, and writes them as Markdown."""
    lines, columns = ["# Held-out prompts, before and after"], ["persona", "before", "after"]
    for prompt, group in itertools.groupby(zip(examples, before, after, strict=True), key=lambda row: row[0].prompt):
        rows = [[example.persona, *answers] for example, *answers in group]
        _print(prompt, columns, rows, ratios=(1, 4, 4))
        lines += ["", f"## {prompt}", "", *_markdown(columns, rows)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


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
    title = f"{result['prompts']} prompts, {result['answers']} answers of each model"
    notes = []
    if others and result["prompts"] < FEWEST_PROMPTS:
        notes = [f"Fewer than {FEWEST_PROMPTS} prompts say nothing of a difference."]
    elif others:
        notes = [
            f"In brackets: the difference from {baseline}, and its 95% interval over prompts. ★: more than chance, of "
            f"{', '.join(name for name in models[baseline] if name in CLAIMS)}, all counted.",
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
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


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
    holds = {name: d["mean"] * CLAIMS[name] for name, d in found.items() if d["differs"]}
    if not holds:
        return f"{label} and {baseline}: no difference."
    parts = {
        "better": [name for name, gain in holds.items() if gain > 0],
        "worse": [name for name, gain in holds.items() if gain < 0],
        "no difference": [name for name in found if name not in holds],
    }
    told = "; ".join(f"{word}: {', '.join(names)}" for word, names in parts.items() if names)
    return f"{label} against {baseline}: {told}."


def collapse_matrices(personas: Sequence[str], similarity: dict[str, np.ndarray], path: Path) -> None:
    """Draws, for each model, how alike two personas answer the same prompt: the mean cosine of their answers. On the
    diagonal it is of the samples of one."""
    size = min(max(2.6, 0.32 * len(personas)), 12.0)
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in personas] if len(personas) <= 60 else []
    figure = _figure((size + 0.6) * len(similarity) + 1.2, size + 1.4)
    axes = figure.subplots(1, len(similarity), squeeze=False, sharey=True)[0]
    low = min(np.nanmin(matrix) for matrix in similarity.values())
    for axis, (label, matrix) in zip(axes, similarity.items(), strict=True):
        image = axis.imshow(matrix, vmin=low, vmax=1.0, cmap="viridis")
        off = matrix[~np.eye(len(personas), dtype=bool)]
        axis.set_title(f"{label}\nbetween personas: {np.nanmean(off):.3f}", fontsize=9)
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
        axis.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt="o", capsize=3, color=colour, label=label)
    if set(chosen) <= set(result.get("data", {})):
        axis.plot(*(result["data"][name] for name in chosen), "*", color="black", markersize=12, label="the data")
    axis.set(xlabel=chosen[0], ylabel=chosen[1], title="bars: 95% intervals over prompts")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    _save(figure, path)


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
    table = Table(title=title, title_justify="left", show_lines=bool(ratios))
    for column, ratio in itertools.zip_longest(columns, ratios):
        table.add_column(column, ratio=ratio)
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

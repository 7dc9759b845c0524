"""What the `train` command shows: a progress bar, and afterwards the loss curves and a table of answers."""

import itertools
import time
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback

from ..atomic import write_atomically
from ..training.formats import Example


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
    from matplotlib.figure import Figure

    names = [n for n in ("ce_loss", "flow_loss") if n in history[0]] or ["loss"]
    titles = {"ce_loss": "cross-entropy (nats per token)", "flow_loss": "flow loss", "loss": "loss"}
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    steps = [h["step"] for h in history]
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot(steps, [h[name] for h in history], color="#4477aa", label="training")
        held = "ce_loss" if name == "loss" else name
        points = [results[k].get(held) for k in ("held_out_before", "held_out_after")]
        if None not in points:
            axis.plot([0, steps[-1]], points, "o--", color="#cc6677", label="held out")
        if name == "flow_loss" and "blind_flow_loss" in results:
            axis.axhline(results["blind_flow_loss"], color="#999933", ls=":", label="held out, head blind to h")
        axis.set(title=titles[name], xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)


def samples_table(examples: list[Example], before: list[str], after: list[str], path: Path) -> None:
    """Prints the answers before and after, persona by persona, and writes them as Markdown."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines, console = ["# Held-out prompts, before and after"], Console()
    for prompt, group in itertools.groupby(zip(examples, before, after, strict=True), key=lambda row: row[0].prompt):
        lines += ["", f"## {prompt}", "", "| persona | before | after |", "|---|---|---|"]
        table = Table(title=prompt, title_justify="left", show_lines=True)
        for column, ratio in (("persona", 1), ("before", 4), ("after", 4)):
            table.add_column(column, ratio=ratio)
        for example, *answers in group:
            cells = [example.persona, *answers]
            table.add_row(*map(Text, cells))
            escaped = [text.replace("|", "\\|").replace("\n", "<br>") for text in cells]
            lines.append(f"| {' | '.join(escaped)} |")
        console.print(table)
    write_atomically(path, ("\n".join(lines) + "\n").encode())

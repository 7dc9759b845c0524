"""The `futures` command: how far apart the futures are that a trained head sees at each token of a text."""

import html
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from ..atomic import write_atomically
from ..evaluation.futures import sample_futures, spread, spread_together
from ..modules import SFRLoss
from ..rows import IGNORE_INDEX, SupervisedRows
from ..training.checkpoint import load_head
from ..training.formats import parse_chat
from ..training.labelling import label_chats
from ..training.lm_head import output_linear
from ..training.models import load_model, load_tokenizer, model_of_run
from .report import spread_plot

_LISTED = 5  # tokens of highest spread
_LEAST = 0.05  # spread between the palest and the fullest colour, so that differences of nothing stay pale


@dataclass(frozen=True)
class Measured:
    """A response, token by token."""

    context: str  # what comes before it
    tokens: list[str]
    spread: list[float]  # before each token, that is: of futures that begin with it
    trained: list[bool]  # whether training gives such a row a target; not where too few tokens are ahead
    mean: float  # of `spread`, over the trained
    together: float  # the same between samples of whatever trained tokens

    def scale(self) -> tuple[float, float]:
        """The spread at the palest and at the fullest colour."""
        low = min(self.spread)
        return low, max(*self.spread, low + _LEAST)

    def colours(self) -> list[tuple[int, ...]]:
        low, high = self.scale()
        return [_colour((value - low) / (high - low)) for value in self.spread]


def run(args) -> None:
    """Writes `futures.json`, `futures.html` and `futures.png`, and prints the text. ValueError or RuntimeError, before
    anything is written, for a model without a head that can be sampled and a text that does not fit."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if args.noises < 2:
        raise ValueError(f"--noises must be at least 2, got {args.noises}: a spread is between samples")
    if args.system is not None and args.prompt is None:
        raise ValueError("--system needs --prompt: without one, the text alone is read, in no chat")
    try:
        text = args.text if args.file is None else args.file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {args.file}: not UTF-8 ({error.reason})") from error
    if not text.strip():
        raise ValueError("the text is empty")
    folder = model_of_run(args.model)
    loss = _flow_head(args.model, folder)
    tokenizer, longest = load_tokenizer(folder)
    ids, labels = _labelled(text, args.prompt, args.system, tokenizer)
    if longest is not None and len(ids) > longest:
        raise ValueError(f"{len(ids)} tokens of prompt and text are beyond the model's context of {longest}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_model(folder, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    if (size := output_linear(model).in_features) != loss.head.shape.hidden_size:
        raise ValueError(f"the head is for hidden size {loss.head.shape.hidden_size}, the model's is {size}")
    response = [at for at, label in enumerate(labels) if at and label != IGNORE_INDEX]
    hidden = _hidden_states(model, ids, device)[[at - 1 for at in response]]
    samples = sample_futures(
        loss.head.to(device), hidden, noises=args.noises, steps=args.steps, seed=args.seed,
        target_scale=loss.config.scale_for(loss.head.shape.target_size), source_std=loss.config.source_std,
    )  # fmt: skip
    if not samples.isfinite().all():
        raise RuntimeError("the head's samples are not finite: its training has diverged")
    rows = SupervisedRows.from_labels(torch.tensor([labels], dtype=torch.int64), loss.config)
    with_target = {*rows.rows[rows.anchor >= 0].tolist()}
    trained, spreads = [at - 1 in with_target for at in response], spread(samples)
    if not any(trained):
        raise ValueError("the text is too short: by the head's configuration none of its tokens has a target")
    kept = torch.tensor(trained, dtype=torch.bool, device=device)
    measured = Measured(
        tokenizer.decode(ids[: response[0]]), _pieces(tokenizer, ids, response), spreads.tolist(), trained,
        spreads[kept].mean().item(), spread_together(samples[kept]).item(),
    )  # fmt: skip

    about = {name: getattr(args, name) for name in ("model", "prompt", "system", "noises", "steps", "seed")}
    content = json.dumps({"about": about, **asdict(measured)}, indent=1, allow_nan=False) + "\n"
    write_atomically(args.out / "futures.json", content.encode())
    write_atomically(args.out / "futures.html", _page(measured, args.noises).encode())
    spread_plot(measured.tokens, measured.spread, measured.trained, measured.together, args.out / "futures.png")
    _show(measured)
    print(f"Page: {args.out / 'futures.html'}\nPlot: {args.out / 'futures.png'}")


def _flow_head(name: str, folder: str) -> SFRLoss:
    """The saved head and its configuration. ValueError if there is none, or none that carries noise to embeddings."""
    try:
        loss = load_head(folder)
    except FileNotFoundError as error:
        if (Path(name) / "run.json").is_file() and not (Path(name) / "model").exists():
            raise ValueError(f"the run in {name} is not finished: train --resume goes on with it") from error
        raise ValueError(
            f"there is no velocity head beside the model {name!r}: `train` saves one, unless with --objective ce, and "
            "so does save_pretrained of an attached model"
        ) from error
    if loss.config.is_dirac:
        raise ValueError(f"the model was trained with loss={loss.config.loss!r}, which has one future: 'flow' has many")
    if loss.config.source_std == 0:
        raise ValueError("the head was trained with source_std=0, without noise: it has one future")
    return loss


def _labelled(text: str, prompt: str | None, system: str | None, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids, and labels of the response, as `train` makes them of a chat; without a prompt, of all but the first
    token, which nothing comes before."""
    if prompt is None:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) < 2:
            raise ValueError("the text has one token, and nothing before it: give --prompt, or a longer text")
        return ids, [IGNORE_INDEX, *ids[1:]]
    said = [("system", system), ("user", prompt), ("assistant", text)]
    messages = [{"role": role, "content": content} for role, content in said if content is not None]
    found = label_chats([parse_chat({"messages": messages}, "the chat")], tokenizer, sys.maxsize)
    if report := found.report():
        print(report, file=sys.stderr)
    return found.samples[0]["input_ids"], found.samples[0]["labels"]


@torch.no_grad()
def _hidden_states(model: nn.Module, ids: list[int], device: torch.device) -> Tensor:
    """(L, H): what the lm_head is given, which is what the head was trained on."""
    found = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        found.append(args[0][0])
        return (args[0][:, -1:],)  # nobody reads the logits, and of a long text they are large

    output_linear(model).register_forward_pre_hook(keep)
    model(input_ids=torch.tensor([ids], dtype=torch.int64, device=device), use_cache=False)
    return found[0]


def _pieces(tokenizer, ids: list[int], response: Sequence[int]) -> list[str]:
    """The text that each token of the response adds; of a character that several make, the last one has it."""
    pieces, begin, read = [], response[0] - 1, response[0]
    for at in response:
        # beside the token before, since some tokenizers drop the space at the beginning
        before, through = tokenizer.decode(ids[begin:read]), tokenizer.decode(ids[begin : at + 1])
        if through.endswith("�") and at != response[-1]:
            pieces.append("")
            continue
        pieces.append(through[len(before) :])
        begin, read = at, at + 1
    return pieces


def _colour(share: float) -> tuple[int, ...]:
    """From white to orange."""
    return tuple(round(255 + share * (full - 255)) for full in (0xEE, 0x77, 0x33))


def _summary(measured: Measured) -> str:
    return (
        f"Two futures of a token are {measured.mean:.3f} apart on average, {min(measured.spread):.3f} at the least and "
        f"{max(measured.spread):.3f} at the most; two futures of whatever tokens {measured.together:.3f}. The closer "
        "these are, the less the head sees of the future."
    )


def _page(measured: Measured, noises: int) -> str:
    spans = [
        f'<span{"" if trained else " class=short"} style="background:rgb{colour}" title="{value:.3f}">'
        f"{html.escape(token)}</span>"
        for token, value, trained, colour in zip(
            measured.tokens, measured.spread, measured.trained, measured.colours(), strict=True
        )
    ]
    low, high = measured.scale()
    return _PAGE.format(
        low=f"{low:.3f}", high=f"{high:.3f}", summary=_summary(measured),
        noises=noises, context=html.escape(measured.context), text="".join(spans), full=_colour(1.0),
    )  # fmt: skip


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Where the future is open</title>
<style>
body {{ max-width: 50em; margin: 2em auto; padding: 0 1em; font: 1em/1.7 sans-serif; color: #111; background: #fff }}
.text {{ white-space: pre-wrap }}
.text span {{ border-radius: 3px }}
.context {{ color: #888 }}
.short {{ border-bottom: 2px dotted #888 }}
.scale {{ display: inline-block; width: 12em; height: 1em; background: linear-gradient(to right, #fff, rgb{full});
  border: 1px solid #ccc; vertical-align: middle }}
</style>
<h1>Where the future is open</h1>
<p>{low} <span class="scale"></span> {high}</p>
<p>The colour of a token is the mean cosine distance between {noises} embeddings of the text that begins with it,
sampled from what the model had read before: white where the future is locked, orange where it is open. {summary}
<span class="short">Dotted</span>: too near the end, training has no target there.</p>
<p class="text"><span class="context">{context}</span>{text}</p>
</html>
"""


def _show(measured: Measured) -> None:
    """Prints the text: coloured on a terminal; else plain, with the tokens of highest spread."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if console.is_terminal:
        styles = [f"black on rgb({','.join(map(str, colour))})" for colour in measured.colours()]
        console.print(Text.assemble(*zip(measured.tokens, styles, strict=True)), soft_wrap=True)
    else:
        print("".join(measured.tokens))
        shown = (i for i, trained in enumerate(measured.trained) if trained and measured.tokens[i])
        order = sorted(shown, key=lambda i: -measured.spread[i])
        print("\nMost open:")
        for i in order[:_LISTED]:
            before = "".join(measured.tokens[:i])[-40:]
            print(f"  {measured.spread[i]:.3f}  {' '.join(before.split())} [{measured.tokens[i].strip()}]")
    print(f"\n{_summary(measured)}")

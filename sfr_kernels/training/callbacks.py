"""`SFRCallback`: λ's schedule, the losses in the logs, and resuming, for a stock transformers Trainer."""

import math
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from ..atomic import write_atomically
from ..config import SFRConfig
from ..ops.flow_loss import step_seed
from .checkpoint import CONFIG_FILE, HEAD_FILE, pairing, restore_head, save_head
from .guard import NEVER_CALLED, check_head, watch_of
from .head import fit_head, is_new
from .health import health_values, will_log
from .model_card import write_card
from .objectives import WHOLE_BATCHES, Attachment, attachment_of, keep_from_predictions
from .recipe import check_averaged
from .sharding import gathered, is_sharded, parameters_of


def schedule_at(config: SFRConfig, step: int, total: int) -> float:
    """The factor of λ at a step of a run of `total`: a linear warm-up, then constant, linear or cosine decay to 0."""
    warmup = config.flow_warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - warmup, 1)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return max(factor[config.flow_schedule], 0.0)


_WINDOW = "sfr_kernels"  # the name of `_window` among the `stateful_callbacks` of trainer_state.json
_NO_SHARE = (
    "flow_weight is 'auto', and no gradient at the hidden states was measured at this step: there was no label, the "
    "model is frozen, or it is compiled, and the loss one whose share is then not known. λ stays as it is"
)


class _Mean:
    """The means of ce and flow over forwards, kept on the device to avoid syncs."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (3,): of weight · ce, of weight · flow, of the weights

    def add(self, last: Tensor, by_sequence: bool) -> None:
        weight = last[2:] if by_sequence else torch.ones_like(last[2:])
        values = torch.cat([last[:2] * weight, weight])
        self.sums = values if self.sums is None else self.sums.to(values) + values

    def take(self, args, weight: float | None = None) -> dict[str, float]:
        """The means over all processes since the last call; none without a forward. `weight`: other than the sum."""
        if self.sums is None:
            return {}
        found, self.sums = self.sums.to(args.device, torch.float32), None
        if weight is not None:
            found[2] = weight
        if dist.is_available() and dist.is_initialized():
            # Under one global normalizer every rank has a part of the mean, else a mean of its own.
            dist.all_reduce(found)
            if args.average_tokens_across_devices:
                found[2] /= dist.get_world_size()
        ce, flow, total = found.tolist()
        return {"ce_loss": ce / total, "flow_loss": flow / total}


def _save_sharded(folder: str | Path, args, model) -> None:
    """Saves the head of a sharded model, which no state_dict may bring there; every process calls this."""
    sfr = attachment_of(model)
    if isinstance(sfr, Attachment) and is_sharded(model):
        paired, tensors = pairing(model), None if sfr.head is None else gathered(parameters_of(sfr.head))
        if args.should_save:
            save_head(folder, sfr, paired, tensors)


class SFRCallback(TrainerCallback):
    """Fits a new head before training (`config.head_steps`), sets λ by its share (`flow_weight="auto"`) and schedule,
    opens and closes the gate (`flow_gate`), and restores all of them when a run resumes, or ends with its best model.
    Logs `ce_loss` and `flow_loss` averaged since the last log, `flow_gate` (the share of its steps with an open gate),
    `flow_weight` (λ), and of the step that is logged `flow_share`, `flow_gap` and `flow_loss_t00` to `flow_loss_t75`
    (README.md beside this file says how to read them), and `eval_ce_loss` and `eval_flow_loss` (which
    `metric_for_best_model` may name).

    Add it with `add_to(trainer)`: it is then the first callback, so that reporters see its values, puts the Trainer's
    label smoothing into the attached loss, keeps its section in the model card, and knows what a resumed run had summed
    up since its last log, and the folder it is resumed from, which otherwise is `resume_from`, or
    `output_dir/checkpoint-<step>`. Where processes cannot share the evaluated samples evenly, accelerate repeats some,
    which count twice.
    """

    def __init__(self, resume_from: str | Path | None = None):
        self.resume_from, self.last_step = resume_from, 0
        self._loaded, self._trainer = None, None  # the folder a run is resumed from, and the Trainer, after `add_to`
        self._training, self._evaluation = _Mean(), _Mean()
        self._health: list[Tensor] = []  # of the forwards of a measured step
        self._measured: dict[str, float] = {}  # what they say
        self._weight = 0.0  # λ of the step
        self._flows: list[Tensor] = []  # L_flow of the micro-batches of the step
        self._open = 0  # steps with an open gate since the last log
        self._progress = None  # `Watch.progress` when training began; None after the first step

    def add_to(self, trainer) -> "SFRCallback":
        """Adds the callback to a Trainer of an attached model. ValueError if the Trainer has a loss of its own."""
        sfr = attachment_of(trainer.model)
        if sfr is None:
            raise ValueError("trainer.model has no SFR objective: attach it before Trainer is made")
        if trainer.compute_loss_func is not None:
            raise ValueError("compute_loss_func takes the model's logits, of which an attached model makes none")
        stock = type(trainer).prediction_step is Trainer.prediction_step
        if stock and trainer.preprocess_logits_for_metrics is not None:
            raise ValueError(
                "preprocess_logits_for_metrics has no logits to work on: compute_metrics is given the predicted tokens"
            )
        if (smoother := trainer.label_smoother) is not None:
            if sfr.options["label_smoothing"]:
                raise ValueError("label_smoothing_factor is given to Trainer, and label_smoothing to the attached loss")
            compute_loss, trainer.label_smoother = trainer.compute_loss, None
            trainer.compute_loss = lambda model, inputs, *args, **kwargs: compute_loss(
                model, {**inputs, "label_smoothing": smoother.epsilon}, *args, **kwargs
            )
        load, save, create = trainer._load_optimizer_and_scheduler, trainer._save_checkpoint, trainer.create_model_card
        save_model = trainer.save_model

        def load_from(checkpoint):  # with every engine
            self._loaded = checkpoint
            return load(checkpoint)

        def save_checkpoint(*args, **kwargs):
            if self in trainer.callback_handler.callbacks:
                trainer.state.stateful_callbacks[_WINDOW] = self._window(trainer)
            return save(*args, **kwargs)

        def save_model_and_head(output_dir=None, *args, **kwargs):
            _save_sharded(output_dir or trainer.args.output_dir, trainer.args, trainer.model)
            return save_model(output_dir, *args, **kwargs)

        def create_model_card(*args, **kwargs):
            create(*args, **kwargs)
            if trainer.is_world_process_zero() and (sfr := attachment_of(trainer.model)) is not None:
                write_card(trainer.args.output_dir, trainer.model, sfr)

        trainer._load_optimizer_and_scheduler, trainer._save_checkpoint = load_from, save_checkpoint
        trainer.create_model_card, trainer.save_model, self._trainer = create_model_card, save_model_and_head, trainer
        keep_from_predictions(type(trainer.model.config))  # attach did, unless it ran in another process
        trainer.remove_callback(type(self))
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        sfr = attachment_of(model)
        if sfr is None:
            raise ValueError("SFRCallback needs a model with an SFR objective: attach it before Trainer is made")
        if args.label_smoothing_factor and self._trainer is None:
            raise ValueError("label_smoothing_factor does not reach the loss: use SFRCallback().add_to(trainer)")
        if args.world_size > 1 and isinstance(kwargs.get("train_dataloader"), DataLoaderDispatcher):
            raise ValueError(f"one process would read the batches of all, and cut them: {WHOLE_BATCHES}")
        if args.n_gpu > 1:
            raise ValueError(
                "nn.DataParallel, which Trainer uses where it sees several GPUs, is not served: start a process for "
                "each with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
            )
        check_head(sfr)
        if isinstance(sfr, Attachment):
            sfr.step = state.global_step
            if sfr.config.head_ema:
                check_averaged(kwargs["optimizer"], sfr.head.parameters())
        if state.global_step > 0 and isinstance(sfr, Attachment):
            folder = self.resume_from or self._loaded or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._restore(folder, sfr, model)
        elif isinstance(sfr, Attachment):
            self._fit_head(args, state, model, sfr, kwargs.get("train_dataloader"))
        self._training, self.last_step, self._open = _Mean(), state.global_step, 0
        self._restore_window(state.stateful_callbacks.get(_WINDOW), args)
        self._progress = watch_of(model).progress

    def _restore(self, folder: str | Path, sfr: Attachment, model) -> None:
        """The head of a checkpoint, and the state that goes with it; every process must call it."""
        saved = restore_head(folder, sfr, pairing(model))
        sfr.fitted = saved.get("fitted")
        if (weight := saved.get("flow_weight")) is not None:
            sfr.restore_weight(weight)
        if sfr.gate and (gate := saved.get("gate")) is not None:
            sfr.gate.restore(gate)

    def _window(self, trainer) -> dict:
        """What has been summed up since the last log, by each process; every process must call it. Trainer's sum of its
        loss, which it would lose, is in it."""
        sums = self._training.sums
        mine: list = [trainer._tr_loss.item(), *([] if sums is None else sums.tolist())]
        found = [mine]
        if dist.is_available() and dist.is_initialized():
            found *= dist.get_world_size()
            dist.all_gather_object(found, mine)
        since, total = trainer._globalstep_last_logged, trainer._total_loss_scalar
        return {"since": since, "loss": total, "open": self._open, "sums": found}

    def _restore_window(self, saved: dict | None, args) -> None:
        """Goes on with the window of a checkpoint; with another number of processes a new one begins."""
        if saved is None or self._trainer is None or len(saved["sums"]) != args.world_size:
            return
        loss, *sums = saved["sums"][args.process_index]
        if sums:
            self._training.sums = torch.tensor(sums, dtype=torch.float64)
        self.last_step, self._open = saved["since"], saved["open"]
        self._trainer._tr_loss.fill_(loss)
        self._trainer._globalstep_last_logged, self._trainer._total_loss_scalar = saved["since"], saved["loss"]

    def _fit_head(self, args, state, model, sfr: Attachment, batches) -> None:
        """Fits a new head to the data of training, in an order of its own: that of training is as without it."""
        if sfr.head is None or not is_new(sfr.head):
            return
        sfr.fitted = 0
        if not sfr.config.head_steps:
            return
        order = torch.Generator().manual_seed(int(step_seed(sfr.config.seed, -1 - args.process_index)))
        size = state.train_batch_size or args.per_device_train_batch_size
        own = DataLoader(
            batches.dataset, size, not isinstance(batches.dataset, IterableDataset), collate_fn=batches.collate_fn,
            generator=order, drop_last=args.dataloader_drop_last,
        )  # fmt: skip
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16):
            fit_head(model, own, sfr.config.head_steps, progress=args.process_index == 0)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if isinstance(sfr := attachment_of(model), Attachment):
            sfr.step = state.global_step
            sfr.schedule = schedule_at(sfr.config, state.global_step, state.max_steps)
            first = sfr.config.flow_weight == "auto" and not sfr.shared
            self._health, self._measured, self._weight = [], {}, sfr.flow_weight * sfr.schedule
            self._flows = []
            sfr.measuring = first or will_log(args, state, kwargs.get("train_dataloader"))

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        if isinstance(sfr := attachment_of(model), Attachment):
            self._training.add(sfr.last, by_sequence=False)
            if sfr.gate:
                self._flows.append(sfr.last[1])
            if sfr.measuring:
                self._health.append(sfr.health)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._progress is not None:
            if watch_of(model).progress == self._progress:  # the guard does not see an engine's optimizer
                raise RuntimeError(NEVER_CALLED)
            self._progress = None
        self.on_substep_end(args, state, control, model)
        sfr = attachment_of(model)
        was_open = sfr.gate is None or sfr.gate.open
        if sfr.gate:  # under one global normalizer every rank has a part of the loss, else one of its own
            flows, self._open = torch.stack(self._flows), self._open + was_open
            parts = args.world_size if args.average_tokens_across_devices else 1
            whole = sfr.config.flow_normalizer == "weights" or sfr.config.loss == "cka"  # each micro-batch has its own
            sfr.gate.update(flows.mean() if whole else parts * flows.sum())
        if self._health:
            self._measured = health_values(self._health)
            if was_open and sfr.config.flow_weight == "auto" and "flow_share" not in self._measured:
                warnings.warn(_NO_SHARE, RuntimeWarning, stacklevel=2)
            sfr.approach_share(self._measured.get("flow_share", 0.0))

    def on_save(self, args, state, control, model=None, **kwargs):
        if self._trainer is None:
            _save_sharded(Path(args.output_dir) / f"checkpoint-{state.global_step}", args, model)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        """Of a checkpoint that it uploads Trainer copies to the output folder, from where it does, what it knows of."""
        sfr = attachment_of(model)
        if sfr is None or not state.is_world_process_zero:
            return
        folder, checkpoint = Path(args.output_dir), Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for name in (HEAD_FILE, CONFIG_FILE):
            if (checkpoint / name).is_file():
                write_atomically(folder / name, (checkpoint / name).read_bytes())
        write_card(folder, model, sfr)

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        if isinstance(sfr := attachment_of(model), Attachment):
            self._evaluation.add(sfr.last, by_sequence=True)  # as Trainer weighs its batches

    def on_predict(self, args, state, control, metrics, **kwargs):
        self._add_evaluation(args, metrics)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not isinstance(attachment_of(model), Attachment) or logs is None:
            return
        steps = state.global_step - self.last_step
        if "loss" in logs and steps > 0 and (means := self._training.take(args, steps)):
            values = means | {"flow_weight": self._weight} | self._measured
            if attachment_of(model).gate:
                values["flow_gate"] = self._open / steps
            logs.update(values)
            self.last_step, self._open = state.global_step, 0
        else:
            values = self._add_evaluation(args, logs)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def _add_evaluation(self, args, metrics: dict) -> dict[str, float]:
        """Adds the losses of an evaluation to its metrics, under the prefix of its own `…_loss` and `…_runtime`."""
        prefixes = [k.removesuffix("_loss") for k in metrics if k.endswith("_loss")]
        prefixes = [p for p in prefixes if p != "train" and f"{p}_runtime" in metrics]
        means = self._evaluation.take(args) if prefixes else {}
        values = {f"{prefixes[0]}_{name}": value for name, value in means.items()}
        metrics.update(values)
        return values

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not isinstance(sfr := attachment_of(model), Attachment):
            return
        sfr.schedule, sfr.measuring = None, False
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._restore(state.best_model_checkpoint, sfr, model)
            sfr.step = state.best_global_step

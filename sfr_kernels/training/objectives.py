"""What `attach` adds to a model, as its submodule `sfr`: the objective, with its head and the state of a run.

There are two, `Attachment` and `CrossEntropyAttachment`, used alike: `inputs(batch)` makes the loss's arguments of what
a forward was given, and calling it computes the loss from hidden states, the lm_head's weight and these.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from ..config import SFRConfig
from ..kernels.backend import resolve_backend
from ..kernels.softmax_xent import RowStats
from ..modules import LinearCrossEntropy, SFRLoss, VelocityHead
from ..ops import SFROutput, linear_cross_entropy
from ..ops.flow_loss import step_seed
from ..rows import IGNORE_INDEX, SupervisedRows
from ..targets.collator import sfr_inputs
from ..targets.online import OnlineTargets
from ..targets.store import TargetStore
from . import health
from .recipe import FlowGate
from .sharding import check_gathered

WHOLE_BATCHES = 'with a streaming data set on several processes set accelerator_config={"dispatch_batches": False}'
_NO_LOGITS = (
    "given labels or rows, an attached model makes no logits, only their loss and, in evaluation, `predictions`. "
    "A Trainer's label smoothing goes into the loss with SFRCallback().add_to(trainer); with a loss function of logits "
    "detach the model"
)


@dataclass
class SFRModelOutput(ModelOutput):
    """What an attached model returns for labels: the loss, its detached parts, and the model's own other outputs."""

    loss: Tensor | None = None
    predictions: Tensor | None = None  # (B, L) int64, in evaluation: the likeliest next token, −100 at other positions
    ce_loss: Tensor | None = None
    flow_loss: Tensor | None = None
    stats: RowStats | None = None  # of the rows with cross-entropy, where `return_stats` of the attachment is set
    aux_loss: Tensor | None = None
    router_logits: tuple | None = None
    past_key_values: object | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None

    def __getitem__(self, key):
        if key == "logits":
            raise KeyError(_NO_LOGITS)
        return super().__getitem__(key)

    def __getattr__(self, name: str):
        raise AttributeError(_NO_LOGITS if name == "logits" else f"{type(self).__name__} has no attribute {name!r}")


def keep_from_predictions(config: type) -> None:
    """Lists outputs that Trainer must not give to `compute_metrics`; on the class, so that config.json has no list."""
    ours = ("ce_loss", "flow_loss", "stats", "aux_loss", "router_logits")
    config.keys_to_ignore_at_inference = list(dict.fromkeys([*config.keys_to_ignore_at_inference, *ours]))


OBJECTIVES: dict[str, tuple[type, ...]] = {  # and of what each is made
    "sfr": (SFRConfig, VelocityHead, SFRLoss),
    "mtp": (SFRConfig, SFRLoss, type(None)),
    "ce": (LinearCrossEntropy, type(None)),
}


def objective_of(name: str, given: Any, objective: str) -> Any:
    """`given`, the argument `name`, as the objective takes it: with "mtp" the loss of a config becomes that.
    ValueError or TypeError if it does not go with the objective."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be {' or '.join(OBJECTIVES)}, got {objective!r}")
    if not isinstance(given, kinds := OBJECTIVES[objective]):
        names = " or ".join(kind.__name__.replace("NoneType", "None") for kind in kinds)
        raise TypeError(f"{name} must be {names} with objective={objective!r}, got {type(given).__name__}")
    if objective != "mtp":
        return given
    if isinstance(given, SFRLoss):
        if given.config.loss != "mtp":
            raise ValueError(f"{name} must have loss='mtp' with objective='mtp', got loss={given.config.loss!r}")
        return given
    return as_mtp(name, given or SFRConfig())


def as_mtp(name: str, config: SFRConfig) -> SFRConfig:
    """The config with loss="mtp". ValueError if it asks for another than the default's."""
    if config.loss not in ("flow", "mtp"):
        raise ValueError(f"{name} must have loss='mtp', or the default's, with objective='mtp', got {config.loss!r}")
    return replace(config, loss="mtp")


@dataclass
class BatchInputs:
    """What an attached model's forward was given for the loss."""

    labels: Tensor | None
    rows: SupervisedRows | None
    targets: Tensor | list[str | None] | None
    times: Tensor | None
    seed: int | Tensor | None
    sample_id: Tensor | list | None
    num_items_in_batch: float | Tensor | None
    label_smoothing: float | None
    others: dict  # all other keywords: attention_mask, position_ids, …

    def next_labels(self, ignore_index: int) -> Tensor:
        """The label of each token's next one: `shift_labels` where given, as in the model's own loss."""
        if (shifted := self.others.get("shift_labels")) is not None:
            return shifted
        return functional.pad(self.labels[..., 1:].long(), (0, 1), value=ignore_index)  # long: uint8 has no −100

    def own_labels(self) -> Tensor:
        """The label of each token itself, −100 where there is none."""
        ignored = self.others.get("ignore_index", IGNORE_INDEX)
        if self.others.get("shift_labels") is None and ignored == IGNORE_INDEX:
            return self.labels
        shifted = self.next_labels(ignored)
        shifted = shifted.masked_fill(shifted == ignored, IGNORE_INDEX)
        if (shifted[..., -1] != IGNORE_INDEX).any():
            raise ValueError(
                "shift_labels has a label at the last position: sequences cut over processes are not supported"
            )
        return functional.pad(shifted[..., :-1], (1, 0), value=IGNORE_INDEX)

    def check_rows(self, config: SFRConfig | None) -> None:
        if self.rows is None:
            return
        if not isinstance(self.rows, SupervisedRows):
            raise TypeError(f"rows must be SupervisedRows, got {type(self.rows).__name__}")
        for name in ("shift_labels", "ignore_index"):
            if name in self.others:
                raise ValueError(f"{name} has no meaning where a batch has rows, which were made of its labels")
        if self.labels is not None and tuple(self.labels.shape) != self.rows.shape:
            more = self.labels.shape[-1] - self.rows.shape[-1]
            number = f" (num_virtual_tokens={more})" if more > 0 else ""
            raise ValueError(
                f"rows were made for {self.rows.shape} tokens, labels are {tuple(self.labels.shape)}: a batch must "
                f"reach the model as the collator made it ({WHOLE_BATCHES}). Where prompt tuning puts virtual tokens "
                f"before each sequence{number}, give labels and sample_id without rows"
            )
        if config is not None and not torch.compiler.is_compiling():
            self.rows.check_rules(config)


_ON_DEVICE = "_step", "_seed", "last", "health"  # tensors of an attachment that are neither parameters nor buffers


class Attachment(SFRLoss):
    """The SFR objective. The state of a run is the head and the step, the number of optimizer steps taken, which
    `guard` counts. Both are in the `state_dict`. The noise of a step follows from (config.seed, step) alone."""

    return_stats = False  # whether outputs have the `stats` of their rows
    shared = False  # whether λ is one that was set by the share
    measuring = False  # whether training forwards fill `health`, which changes no bit of the training
    restore: dict[str, Any]  # what `attach` has changed of the model, for `detach`
    fitted: int | None = None  # the steps by which the head was fitted before training, where they are known
    inner: str | None = None  # the layer that is given the head's hidden states; None: the lm_head is

    def __init__(self, loss: SFRLoss, store: TargetStore | OnlineTargets | None):
        super().__init__(loss.config, loss.head, **loss.options)
        self.store = store
        self._z3_leaf = True  # DeepSpeed: calling this module gathers the head, whose modules are not called
        # Tensors, since a compiled forward treats a number as a constant. No buffers, which would be cast with the
        # model, broadcast by DDP at each step, and lost on the meta device.
        self._step, self._seed = torch.zeros(2, 1, dtype=torch.int64, device="cpu")
        self._lambdas = torch.zeros(2, dtype=torch.float64, device="cpu")  # λ in training, in evaluation
        self.last = torch.zeros(3, dtype=torch.float32, device="cpu")  # ce, flow and sequences of the last forward
        self.health = torch.zeros(health.SIZE, dtype=torch.float32, device="cpu")  # of the last one measured
        self._rows_config = health.rows_config(loss.config)
        self._flow_weight, self._schedule, self.scheduled = loss.config.first_weight, 1.0, False
        self._set_lambdas()
        self.step = 0
        self.gate = None if loss.config.flow_gate is None else FlowGate(loss.config.flow_gate)

    @property
    def flow_weight(self) -> float:
        """λ, the configuration's (1 for "auto") until it is set."""
        return self._flow_weight

    @flow_weight.setter
    def flow_weight(self, value: float) -> None:
        self._flow_weight = _finite("flow_weight", value)
        self._set_lambdas()

    @property
    def schedule(self) -> float:
        """The factor of λ in training, which SFRCallback sets by the configuration's schedule; None ends that: 1."""
        return self._schedule

    @schedule.setter
    def schedule(self, value: float | None) -> None:
        self.scheduled = value is not None
        self._schedule = _finite("schedule", value) if self.scheduled else 1.0
        self._set_lambdas()

    def _set_lambdas(self) -> None:
        self._lambdas[0] = self._flow_weight * self._schedule
        self._lambdas[1] = self.config.first_weight if self.config.flow_weight == "auto" else self._flow_weight

    @property
    def step(self) -> int:
        """The optimizer's step, which decides the noise. Set it where a run is resumed without this module's state."""
        return int(self._step)

    @step.setter
    def step(self, value: int) -> None:
        self._step.fill_(value)
        self._seed.copy_(step_seed(self.config.seed, self._step))

    def advance(self) -> None:
        """The next step, without a device sync, so that a CUDA graph can capture it with the optimizer's step."""
        self._step += 1
        self._seed.copy_(step_seed(self.config.seed, self._step))

    def get_extra_state(self) -> Tensor:
        """The step, and in the bits of a float64 λ and the two numbers of a gate."""
        values = [self._flow_weight, *(self.gate.state() if self.gate else ())]
        return torch.cat([self._step.cpu(), torch.tensor(values, dtype=torch.float64, device="cpu").view(torch.int64)])

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state[0])
        if len(state) > 1:  # of earlier versions it has the step alone
            weight, *gate = state[1:].cpu().view(torch.float64).tolist()
            self.restore_weight(weight)
            if self.gate and gate:
                self.gate.restore(gate)

    # FSDP2 shards a model on the meta device and fills it with the weights of the first process, without this state.
    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_meta():
            del destination[f"{prefix}_extra_state"]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *others) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *others)
        if self._is_meta() and f"{prefix}_extra_state" in missing_keys:
            missing_keys.remove(f"{prefix}_extra_state")

    def _is_meta(self) -> bool:
        return any(p.is_meta for p in self.parameters())

    def restore_weight(self, value: float) -> None:
        """λ of a run that goes on, where flow_weight="auto" moves it; else it is the configuration's."""
        if self.config.flow_weight == "auto":
            self.flow_weight, self.shared = value, value != self.config.first_weight

    def approach_share(self, share: float) -> None:
        """Moves λ towards the share of "auto", given the one that was measured: at first all of the way, then half of
        it, on a scale of factors, since the share of one step is noisy; by no more than a factor of ten, since that of
        a new head, or one that 16 bits round away, is next to nothing. Not where the flow moved nothing, or overflowed.
        """
        if self.config.flow_weight == "auto" and 0 < share < math.inf and self.schedule > 0:
            wanted = self.config.wanted_share * self.schedule  # the schedule is on top
            factor = (wanted / share) ** (0.5 if self.shared else 1.0)
            self.flow_weight *= min(max(factor, 0.1), 10.0)
            self.shared = True

    def _apply(self, fn, recurse: bool = True) -> "Attachment":
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, dtype=torch.int64, device=self._seed.device)).device
        if device.type != "meta":
            self._move(device)
        return self

    def _move(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._lambdas = self._lambdas.to(device, wide)
        for name in _ON_DEVICE:
            setattr(self, name, getattr(self, name).to(device))

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name in ("_lambdas", *_ON_DEVICE):  # a spawned process is sent tensors in shared memory
            setattr(self, name, getattr(self, name).clone())

    def seed(self) -> int | Tensor:
        """The seed of this forward's noise: that of the step in training, a fixed one in evaluation."""
        return self._seed if self.training else step_seed(self.config.seed, -1)

    def inputs(self, batch: BatchInputs) -> dict:
        """The loss's arguments: rows and targets from the batch where given, else from labels and the store."""
        batch.check_rows(self.config)
        online = isinstance(self.store, OnlineTargets) and self.config.loss != "mtp"
        rows, targets = batch.rows, batch.targets
        if rows is None:
            ids = batch.sample_id
            if ids is not None:
                ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
            store = self.store if targets is None and (online or ids is not None) else None
            rows = sfr_inputs({**batch.others, "labels": batch.own_labels()}, ids, self.config, store)["rows"]
        if targets is None:
            targets = rows.labels if self.config.loss == "mtp" else rows.targets
        if targets is None:
            raise ValueError(
                f"targets must be given for loss={self.config.loss!r}: use SFRCollator, or sample_id and a TargetStore"
            )
        if not isinstance(targets, Tensor):
            if not online:
                raise ValueError("targets are texts, which only a model attached with OnlineTargets can embed")
            targets = self.store.start(targets, rows.device)  # embedded during the decoder's forward
        seed = self.seed() if batch.seed is None else batch.seed
        return dict(
            rows=rows, targets=targets, times=batch.times, seed=seed, normalizer=batch.num_items_in_batch,
            flow_weight=self._lambdas[0 if self.training else 1], label_smoothing=batch.label_smoothing,
        )  # fmt: skip

    def forward(self, hidden: Tensor, weight: Tensor, rows: SupervisedRows, targets, *args, **options) -> SFROutput:
        check_gathered(self)
        if self._seed.device != hidden.device:  # fully_shard moves parameters and buffers alone
            self._move(hidden.device)
        options["return_stats"] = _wants_stats(self, hidden)
        measured = self.measuring and self.training and torch.is_grad_enabled()
        inner = options.get("flow_hidden")
        if self.training and self.gate is not None and not self.gate.open:
            inner = options["flow_hidden"] = (hidden if inner is None else inner).detach()
        options["return_norms"] = measured and health.has_norms(self.config, hidden, options)
        out = super().forward(hidden, weight, rows, targets, *args, **options)
        if measured:
            norms = out.flow.new_zeros(2) if out.norms is None else out.norms
            self.health = health.health_of(
                hidden if inner is None else inner, self.head, rows, targets, options["seed"], norms,
                config=self._rows_config, backend=self.options["backend"],
            )  # fmt: skip
        sequences = torch.full((), rows.shape[0], dtype=out.ce.dtype, device=out.ce.device)
        self.last = torch.stack([out.ce, out.flow, sequences])
        return out


def _wants_stats(sfr: nn.Module, hidden: Tensor) -> bool:
    """Whether a forward makes the statistics of its rows; the reference has none."""
    wanted = sfr.return_stats or not sfr.training
    return wanted and resolve_backend(sfr.options["backend"], hidden.device, hidden.dtype) != "reference"


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


class CrossEntropyAttachment(LinearCrossEntropy):
    """Cross-entropy alone: no head, no targets."""

    config = head = store = inner = gate = None
    restore: dict[str, Any]
    return_stats = False

    def __init__(self, loss: LinearCrossEntropy):
        super().__init__(**loss.options)
        plain, names = LinearCrossEntropy(), ("reduction", "return_stats", "shift", "softcap", "logit_scale")
        for name in (*names, "process_group", "vocab_start", "class_weight"):
            given, wanted = (x.options.get(name, x.class_weight) for x in (loss, plain))
            if given != wanted:
                raise ValueError(f"{name} must be left alone: attach gives the model's own, and wants a mean of labels")

    def inputs(self, batch: BatchInputs) -> dict:
        """The loss's arguments: labels, or rows, whose number is known without a device sync."""
        batch.check_rows(None)
        for name in ("targets", "times", "seed"):
            if getattr(batch, name) is not None:
                raise ValueError(f"{name} has no meaning for a model attached with objective='ce'")
        ignored = batch.others.get("ignore_index", self.options["ignore_index"])
        labels = batch.next_labels(ignored) if batch.rows is None else batch.rows
        inputs = dict(labels=labels, normalizer=batch.num_items_in_batch, ignore_index=ignored)
        return inputs if batch.label_smoothing is None else inputs | dict(label_smoothing=batch.label_smoothing)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor | SupervisedRows, **options) -> SFROutput:
        stats = _wants_stats(self, hidden)
        options = self.options | options | dict(return_stats=stats)
        result = linear_cross_entropy(hidden, weight, labels.to(hidden.device), **options)
        return SFROutput(result[0], None, None, result[1]) if stats else SFROutput(result, None, None)


def placed(predicted: Tensor, inputs: dict) -> Tensor:
    """(B, L): the predictions `predicted` for the rows of a loss with the arguments `inputs`, −100 elsewhere."""
    rows = inputs.get("rows", inputs.get("labels"))
    if isinstance(rows, SupervisedRows):
        flat = predicted.new_full((math.prod(rows.shape),), IGNORE_INDEX)
        return flat.index_copy(0, rows.rows[rows.ce_start :].to(flat.device), predicted).view(rows.shape)
    return torch.full_like(rows, IGNORE_INDEX).masked_scatter(rows != inputs["ignore_index"], predicted.to(rows))


def attachment_of(model: nn.Module) -> Attachment | CrossEntropyAttachment | None:
    """The attachment of a model, which may be wrapped; None if there is none."""
    return next((m for m in model.modules() if isinstance(m, Attachment | CrossEntropyAttachment)), None)

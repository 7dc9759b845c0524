"""What `attach` adds to a model, as its submodule `sfr`: the loss, its head, and the state of a run.

Both kinds answer the same questions: which inputs of a forward the loss takes, and what it is of hidden states and the
lm_head's weight.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..modules import LinearCrossEntropy, SFRLoss
from ..ops import SFROutput, linear_cross_entropy
from ..ops.times import step_seed
from ..rows import SupervisedRows
from ..targets.collator import sfr_inputs
from ..targets.online import OnlineTargets, PendingTargets
from ..targets.store import TargetStore

WHOLE_BATCHES = 'with a streaming data set on several processes set accelerator_config={"dispatch_batches": False}'


@dataclass
class SFRModelOutput(ModelOutput):
    """What an attached model returns for labels: the loss to train on, and its detached parts."""

    loss: Tensor | None = None
    ce_loss: Tensor | None = None
    flow_loss: Tensor | None = None
    aux_loss: Tensor | None = None


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
    others: dict  # what else it was given: attention_mask, position_ids, …

    def check(self) -> None:
        if self.rows is None:
            return
        if not isinstance(self.rows, SupervisedRows):
            raise TypeError(f"rows must be SupervisedRows, got {type(self.rows).__name__}")
        if self.labels is not None and tuple(self.labels.shape) != self.rows.shape:
            raise ValueError(
                f"rows were made for {self.rows.shape} tokens, labels are {tuple(self.labels.shape)}: a batch must "
                f"reach the model as the collator made it ({WHOLE_BATCHES})"
            )


class Attachment(SFRLoss):
    """The SFR objective."""

    def __init__(self, loss: SFRLoss, store: TargetStore | OnlineTargets | None):
        super().__init__(loss.config, loss.head, **loss.options)
        self.store = store
        # What changes from step to step lies in tensors, since a compiled forward takes a number for a constant. No
        # buffers: they would be cast with the model, broadcast at each step, and lost on the meta device.
        self._lambda = torch.zeros((), dtype=torch.float64, device="cpu")
        self._seed, self._forwards = torch.zeros(2, 1, dtype=torch.int64, device="cpu")
        self._sums = torch.zeros(2, dtype=torch.float32, device="cpu")  # of ce and flow since the last log
        self._recorded = False
        self.flow_weight, self.step = loss.config.flow_weight, None

    @property
    def flow_weight(self) -> float:
        """λ."""
        return self._flow_weight

    @flow_weight.setter
    def flow_weight(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"flow_weight must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"flow_weight must be finite, got {value}")
        self._flow_weight = value
        self._lambda.fill_(value)

    @property
    def step(self) -> int | None:
        """The step of the noise, which SFRCallback sets. None: every training forward is one, after the last set; set
        it where a forward of the whole model is recomputed in backward, which would be another one."""
        return self._step

    @step.setter
    def step(self, value: int | None) -> None:
        self._step = value
        self._counts = value is None
        if value is not None:
            self._seed.fill_(step_seed(self.config.seed, value))
            self._forwards.fill_(value + 1)

    def _apply(self, fn, recurse: bool = True) -> "Attachment":
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, dtype=torch.int64, device=self._seed.device)).device
        if device.type != "meta":
            wide = torch.float32 if device.type == "mps" else torch.float64
            self._lambda = self._lambda.to(device, wide)
            self._seed, self._forwards, self._sums = (x.to(device) for x in (self._seed, self._forwards, self._sums))
        return self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name in ("_lambda", "_seed", "_forwards", "_sums"):  # of its own: a spawned process shares memory
            setattr(self, name, getattr(self, name).clone())

    def seed(self) -> int | Tensor:
        """The seed of this forward's noise: of the step in training, always the same in evaluation."""
        if not self.training:
            return step_seed(self.config.seed, -1)
        return step_seed(self.config.seed, self._forwards) if self._counts else self._seed

    def inputs(self, batch: BatchInputs) -> dict:
        """The loss's arguments: rows and targets from the call where given, else from labels and the store."""
        batch.check()
        online = isinstance(self.store, OnlineTargets) and self.config.loss != "mtp"
        rows, targets = batch.rows, batch.targets
        if rows is None:
            ids = batch.sample_id
            if ids is not None:
                ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
            store = self.store if targets is None and (online or ids is not None) else None
            rows = sfr_inputs({"labels": batch.labels, **batch.others}, ids, self.config, store)["rows"]
        if targets is None:
            targets = rows.labels if self.config.loss == "mtp" else rows.targets
        if targets is None:
            raise ValueError(
                f"targets must be given for loss={self.config.loss!r}: use SFRCollator, or pass sample_id to a model "
                "attached with a TargetStore"
            )
        if not isinstance(targets, Tensor):
            if not online:
                raise ValueError("targets are texts, which only a model attached with OnlineTargets can embed")
            # Begun before the decoder's forward, and waited for after it.
            targets = self.store.start(targets, rows.device)
        seed = self.seed() if batch.seed is None else batch.seed
        return dict(
            rows=rows,
            targets=targets,
            times=batch.times,
            seed=seed,
            normalizer=batch.num_items_in_batch,
            flow_weight=self._lambda,
        )

    def forward(self, hidden: Tensor, weight: Tensor, rows: SupervisedRows, targets, *args, **options) -> SFROutput:
        targets = _wait(targets) if isinstance(targets, PendingTargets) else targets
        return super().forward(hidden, weight, rows, targets, *args, **options)

    def record(self, out: SFROutput) -> None:
        """Adds to the running sums, on the device."""
        values = torch.stack([out.ce, out.flow])
        self._sums = self._sums.to(values.device) + values
        self._recorded = True
        if self._counts:
            self._forwards += 1

    def totals(self) -> Tensor | None:
        """The sums (2,) of ce and flow since this was asked last; None if there was no training forward."""
        if not self._recorded:
            return None
        sums, self._sums, self._recorded = self._sums, torch.zeros_like(self._sums), False
        return sums


_wait = torch.compiler.disable(PendingTargets.wait)


class CrossEntropyAttachment(LinearCrossEntropy):
    """Cross-entropy alone: no head, no targets."""

    config = head = store = None

    def __init__(self, loss: LinearCrossEntropy):
        super().__init__(**loss.options)
        plain, names = LinearCrossEntropy(), ("reduction", "return_stats", "shift", "softcap", "logit_scale")
        for name in (*names, "process_group", "vocab_start", "class_weight"):
            given, wanted = (x.options.get(name, x.class_weight) for x in (loss, plain))
            if given != wanted:
                raise ValueError(f"{name} must be left alone: attach gives the model's own, and wants a mean of labels")

    def inputs(self, batch: BatchInputs) -> dict:
        """The loss's arguments: of labels, or of rows, which spare a GPU the wait for their number. `shift_labels` and
        `ignore_index` are those of the model's own loss."""
        batch.check()
        for name in ("targets", "times", "seed"):
            if getattr(batch, name) is not None:
                raise ValueError(f"{name} has no meaning for a model attached with objective='ce'")
        found = dict(labels=batch.rows, shift=False, normalizer=batch.num_items_in_batch)
        if batch.rows is None:
            shifted = batch.others.get("shift_labels")
            found |= dict(labels=batch.labels if shifted is None else shifted, shift=shifted is None)
            if "ignore_index" in batch.others:
                found["ignore_index"] = batch.others["ignore_index"]
        return found

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor | SupervisedRows, **options) -> SFROutput:
        loss = linear_cross_entropy(hidden, weight, labels.to(hidden.device), **self.options | options)
        return SFROutput(loss, None, None)  # nothing beside the loss, which evaluation would take for predictions

    def record(self, out: SFROutput) -> None:
        """There is nothing to log beside the loss."""


def attachment_of(model: nn.Module) -> Attachment | CrossEntropyAttachment | None:
    """The attachment of a model, however it is wrapped."""
    return next((m for m in model.modules() if isinstance(m, Attachment | CrossEntropyAttachment)), None)

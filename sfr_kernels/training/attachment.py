"""What `attach` adds to a model, as its submodule `sfr`: the loss, its head, and the state of a run.

Both kinds answer the same questions: which inputs of a forward the loss takes, and what it is of hidden states and the
lm_head's weight.
"""

from dataclasses import dataclass

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
        self.flow_weight = loss.config.flow_weight
        self.step: int | None = None  # set by SFRCallback; without it, every training forward is a step
        self.forwards = 0
        self.logit_options: dict | None = None  # measured at the first loss
        self.totals: list[Tensor] | None = None  # sums of ce and flow since the last log

    def seed(self) -> int:
        """The seed of this forward's noise: of the step in training, always the same in evaluation."""
        if not self.training:
            return step_seed(self.config.seed, -1)
        return step_seed(self.config.seed, self.forwards if self.step is None else self.step)

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
            flow_weight=self.flow_weight,
        )

    def forward(self, hidden: Tensor, weight: Tensor, rows: SupervisedRows, targets, *args, **options) -> SFROutput:
        targets = targets.wait() if isinstance(targets, PendingTargets) else targets
        return super().forward(hidden, weight, rows, targets, *args, **options)

    def record(self, out: SFROutput) -> None:
        """Adds to the running sums, on the device."""
        values = [out.ce, out.flow]
        self.totals = values if self.totals is None else [a + b for a, b in zip(self.totals, values, strict=True)]
        self.forwards += 1


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
        self.logit_options: dict | None = None

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

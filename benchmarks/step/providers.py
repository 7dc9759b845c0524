"""The providers of the training-step benchmark: each a whole step, on the same weights and the same batches.

    next batch → targets → forward → backward → optimizers, gradients freed

Ours are used as README says: `attach`, and then the model is called. What a collator does, mostly in processes beside
the training, is done within the step here, and counted.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfr_kernels.rows import IGNORE_INDEX

from ..harness.problems import Shape, make_head
from ..peers.published_loss import PublishedFlowLoss
from ..peers.published_targets import LoopedSuffixTargets, SuffixTargets
from .data import Batch, Batches
from .encoder import make_encoder, make_tokenizer
from .models import StepShape, build_model, build_optimizer, bytes_of, share, state_of
from .parts import BACKWARD, FORWARD, LOSS, OPTIMIZER, TARGETS, unmarked

SFT_HF, SFT_OURS = "SFT, HF's loss", "SFT, ours"
PUBLISHED, PUBLISHED_LOOPS = "SFR, as published", "SFR, as published, with its loops"
PUBLISHED_GIVEN = "SFR, as published, targets given"
SFR_STORED, SFR_ONLINE = "SFR, ours, stored targets", "SFR, ours, online targets"


class Stage:
    """What the steps of a case share: the weights, their optimizer, the batches, and the encoder once one needs it."""

    def __init__(self, shape: StepShape, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.model = build_model(shape, dtype, device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(shape.optimizer, self.trained, device)
        self.batches = Batches(shape, device)

    @property
    def encoder(self):
        return make_encoder(self.shape.encoder, self.dtype, self.device)

    @functools.cached_property
    def tokenizer(self):
        return make_tokenizer(self.shape.encoder.vocab)

    def copy(self) -> nn.Module:
        return share(self.model, self.shape.checkpointing)

    def head(self, config) -> nn.Module:
        """A float32 velocity head on the CPU, as in mid-training."""
        s, t = self.shape, self.shape.trunk
        sizes = Shape(s.batch, s.length, t.hidden_size, target_size=s.encoder.hidden_size, width=config.width)
        return make_head(sizes, config)


class Step:
    """A provider's step. `head` is its own, and trained by an optimizer of its own."""

    config = encoder = None

    def __init__(self, stage: Stage, model: nn.Module, head: nn.Module | None = None):
        self.stage, self.model, self.head = stage, model, head
        self.lm_head = model.get_output_embeddings()
        self.optimizers = [stage.optimizer]
        if head is not None:
            self.optimizers.append(build_optimizer("AdamW", head.parameters(), stage.device))

    def targets(self, batch: Batch, mark: Callable[[str], None] = unmarked) -> object:
        """What the loss needs of the batch besides; marks its own parts."""

    def loss(self, batch: Batch, targets: object) -> list[Tensor]:
        """The loss; of SFR also its parts, L_CE and L_flow, detached."""
        return [self.model(**batch.inputs).loss]

    def run(self, mark: Callable[[str], None] = unmarked) -> list[Tensor]:
        """One step; what `loss` returned. The gradients are freed at its end, not at the next one's beginning: they
        belong to this step's memory, not to what the next provider finds allocated."""
        batch = self.stage.batches.next()
        mark(FORWARD)
        targets = self.targets(batch, mark)
        found = self.loss(batch, targets)
        del targets
        mark(LOSS)
        found[0].backward()
        mark(BACKWARD)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mark(OPTIMIZER)
        return [t.detach() for t in found]

    def resident(self) -> list[Tensor]:
        """What stays in memory between its steps, where it is the only one."""
        modules = [m for m in (self.stage.model, self.head, self.encoder) if m is not None]
        held = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        return held + [t for optimizer in self.optimizers for t in state_of(optimizer)]

    @property
    def resident_bytes(self) -> int:
        return bytes_of(self.resident())


class OursStored(Step):
    """Rows and targets as `SFRCollator` makes them, from a store, moved to the device."""

    def __init__(self, stage: Stage):
        from sfr_kernels import SFRLoss, attach
        from sfr_kernels.training.guard import unwatch

        self.config = stage.shape.config
        model, head = stage.copy(), stage.head(self.config)
        self.source = self._source(stage)
        unwatch(attach(model, SFRLoss(self.config, head), self.source))
        super().__init__(stage, model, head)

    def _source(self, stage: Stage):
        return stage.batches.store

    def _collated(self, batch: Batch, sample_ids: list[int] | None) -> dict:
        from sfr_kernels.targets.collator import sfr_inputs

        shape = self.stage.shape
        lengths = [shape.length] * shape.batch
        rows = sfr_inputs(batch.host, sample_ids, self.config, self.source, lengths=lengths)["rows"]
        rows = rows.pin_memory() if self.stage.device.type == "cuda" else rows
        return {"rows": rows.to(self.stage.device)}

    def targets(self, batch: Batch, mark: Callable[[str], None] = unmarked) -> dict:
        found = self._collated(batch, batch.sample_ids)
        mark(TARGETS)
        return found

    def loss(self, batch: Batch, targets: dict) -> list[Tensor]:
        out = self.model(**batch.inputs, **targets, seed=batch.index)
        return [out.loss, out.ce_loss, out.flow_loss]

    def embeddings(self, targets: dict) -> Tensor:
        """(A, d), for the reference."""
        return targets["rows"].targets


class OursOnline(OursStored):
    """Texts as `SFRCollator` makes them, embedded beside the decoder's forward. It remembers a single segment: in
    training every text is new, here the batches come again."""

    def _source(self, stage: Stage):
        from sfr_kernels.targets import OnlineTargets

        self.encoder = stage.encoder
        return OnlineTargets(self.encoder, stage.tokenizer, capacity=1)

    def targets(self, batch: Batch, mark: Callable[[str], None] = unmarked) -> dict:
        found = self._collated(batch, None)
        mark(TARGETS)
        return found

    def embeddings(self, targets: dict) -> Tensor:
        return self.source.start(targets["rows"].targets, self.stage.device).wait()


class Published(Step):
    """The published loss, its targets made by `make`. It sees the lm_head's input: asking the model for all hidden
    states would keep every layer's alive, and is not held against it."""

    def __init__(self, stage: Stage, make: SuffixTargets | None):
        self.config, self.make = stage.shape.official, make
        self.encoder = None if make is None else make.encoder
        ours, s = stage.head(self.config), stage.shape
        head = PublishedFlowLoss(s.trunk.hidden_size, s.encoder.hidden_size, self.config.width, self.config.num_layers)
        head.load_state_dict(ours.state_dict())
        super().__init__(stage, stage.copy(), head.to(stage.device, stage.dtype))
        self.seen = SimpleNamespace(hidden=None)
        self.lm_head.register_forward_pre_hook(lambda module, args, seen=self.seen: setattr(seen, "hidden", args[0]))

    def targets(self, batch: Batch, mark: Callable[[str], None] = unmarked) -> tuple[Tensor, Tensor]:
        return self.make(batch.inputs["labels"], mark)

    def loss(self, batch: Batch, targets: tuple[Tensor, Tensor]) -> list[Tensor]:
        ce = self.model(**batch.inputs).loss
        hidden, self.seen.hidden = self.seen.hidden, None
        flow = self.head(hidden, *targets)
        return [ce + self.config.flow_weight * flow, ce.detach(), flow.detach()]


class PublishedGiven(Published):
    """Its targets are there, the same random ones for every batch."""

    def __init__(self, stage: Stage):
        super().__init__(stage, None)
        labels = stage.batches.hosts[0]["labels"]  # all batches are supervised at the same places
        size = *labels.shape, stage.shape.encoder.hidden_size
        x_1 = F.normalize(torch.randn(size, generator=torch.Generator().manual_seed(3)), dim=-1)
        x_1 *= (labels != IGNORE_INDEX).unsqueeze(-1)
        weight = SuffixTargets(None, None, self.config, stage.dtype).weights(labels)
        self.given = x_1.to(stage.device, stage.dtype), weight.to(stage.device)

    def targets(self, batch: Batch, mark: Callable[[str], None] = unmarked) -> tuple[Tensor, Tensor]:
        return self.given

    def resident(self) -> list[Tensor]:
        return [*super().resident(), *self.given]


def _sft_ours(stage: Stage) -> Step:
    from sfr_kernels import attach
    from sfr_kernels.training.guard import unwatch

    model = attach(stage.copy(), objective="ce")
    unwatch(model)
    return Step(stage, model)


def _published(kind: type[SuffixTargets]) -> Callable[[Stage], Published]:
    def build(stage: Stage) -> Published:
        return Published(stage, kind(stage.encoder, stage.tokenizer, stage.shape.official, stage.dtype))

    return build


STEPS: dict[str, Callable[[Stage], Step]] = {
    SFT_HF: lambda stage: Step(stage, stage.copy()),
    SFT_OURS: _sft_ours,
    PUBLISHED: _published(SuffixTargets),
    PUBLISHED_LOOPS: _published(LoopedSuffixTargets),
    PUBLISHED_GIVEN: PublishedGiven,
    SFR_STORED: OursStored,
    SFR_ONLINE: OursOnline,
}
OURS = SFT_OURS, SFR_STORED, SFR_ONLINE
ENCODING = PUBLISHED, PUBLISHED_LOOPS, SFR_ONLINE  # in the step

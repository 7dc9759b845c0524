"""Providers of a training step, on the same weights and batches: next batch, targets, forward, backward, optimizers.
What a collator does, mostly in processes beside the training, is counted in the step."""

import functools
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sfr_kernels import SFRConfig
from sfr_kernels.rows import IGNORE_INDEX

from ..peers.published import TARGETS, Mark, PublishedFlowLoss, PublishedTargets, unmarked
from ..problem import make_head
from .models import ENCODER_VOCAB, SPECIAL, EncoderShape, Trunk, build_model, make_encoder, make_tokenizer

BATCHES = 4  # each run takes the next, so that no provider can keep anything of the last
FORWARD, BACKWARD = "trunk forward", "backward"
# `host` has input_ids, attention_mask and labels, (B, L), pinned where there is a GPU; `inputs` the same on the device
Batch = namedtuple("Batch", "index host inputs")


@dataclass(frozen=True)
class StepShape:
    """What is trained, on how much."""

    trunk: Trunk
    encoder: EncoderShape
    batch: int
    length: int
    supervised: float  # share of the tokens, the last ones of each sequence
    lora: bool = True  # else every weight is trained
    checkpointing: bool = False
    segments: dict = field(default_factory=dict)  # fields of SFRConfig for sequences shorter than its defaults are for


class Stage:
    """What the steps of a case share."""

    def __init__(self, shape: StepShape, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device, self.position = shape, dtype, device, 0
        self.config, self.official = SFRConfig(**shape.segments), SFRConfig.official(**shape.segments)
        self.model, self.tokenizer = build_model(shape.trunk, shape.lora, dtype, device), make_tokenizer()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.trained)
        self.make_encoder = functools.partial(make_encoder, shape.encoder, dtype, device)
        most, size = min(shape.trunk.vocab_size, ENCODER_VOCAB), (BATCHES, shape.batch, shape.length)
        ids = torch.randint(len(SPECIAL), most, size, generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[..., : shape.length - round(shape.supervised * shape.length)] = IGNORE_INDEX  # the prompt
        columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.columns = {n: t.pin_memory() if device.type == "cuda" else t for n, t in columns.items()}

    def next(self) -> Batch:
        index, self.position = self.position % BATCHES, self.position + 1
        host = {name: column[index] for name, column in self.columns.items()}
        return Batch(index, host, {name: t.to(self.device, non_blocking=True) for name, t in host.items()})

    def copy(self, *objective, **options) -> nn.Module:
        """Modules of its own, attached where there is an objective, around the same parameters and buffers: memory
        holds them, and the optimizer's states, once."""
        model = deepcopy(self.model, {id(t): t for t in (*self.model.parameters(), *self.model.buffers())})
        if self.shape.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if objective or options:
            from sfr_kernels import attach
            from sfr_kernels.training.guard import unwatch

            unwatch(attach(model, *objective, **options))  # the others train the same parameters
        return model

    def head(self, config: SFRConfig) -> nn.Module:
        return make_head(self.shape.trunk.hidden_size, self.shape.encoder.hidden_size, config, torch.float32)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Without a learning rate: it does all its work, and all runs have the same losses."""
    return torch.optim.AdamW(parameters, lr=0.0, fused=parameters[0].is_cuda)


@dataclass
class Step:
    """A provider's step. A head is its own, and so is the head's optimizer."""

    stage: Stage
    model: nn.Module
    loss: Callable  # (batch, its targets) → [loss], of SFR [loss, L_CE, L_flow]
    targets: Callable = lambda batch, mark: None  # (batch, mark) → targets; marks its own parts
    head: nn.Module | None = None
    config: SFRConfig | None = None
    encoder: nn.Module | None = None
    embed: Callable | None = None  # texts → (A, d), where it is done in the step

    def __post_init__(self):
        self.optimizers = [self.stage.optimizer, *([adamw(list(self.head.parameters()))] if self.head else [])]

    def run(self, mark: Mark = unmarked) -> list[Tensor]:
        """What `loss` returned, detached."""
        batch = self.stage.next()
        mark(FORWARD)
        found = self.loss(batch, self.targets(batch, mark))
        mark("loss")
        found[0].backward()
        mark(BACKWARD)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # here, not before the next step: they are this one's memory
        mark("optimizer")
        return [t.detach() for t in found]

    def parts(self) -> dict[str, float]:
        """Milliseconds of the parts of one more step, at whose ends the device is waited for. Ours compute gradients of
        the hidden states with the loss: only the sum of "loss" and "backward" can be compared."""
        found, times = {}, []

        def mark(part: str) -> None:
            if self.stage.device.type == "cuda":
                torch.cuda.synchronize(self.stage.device)
            times.append(time.perf_counter())
            found[part] = found.get(part, 0.0) + 1e3 * (times[-1] - times[-2])

        with self.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: mark(FORWARD)):
            times.append(time.perf_counter())
            self.run(mark)
        return found

    def resident_bytes(self) -> int:
        """What stays in memory between its steps, where it is the only one; what is shared, once."""
        held = [m.state_dict() for m in (self.stage.model, self.head, self.encoder) if m is not None]
        held += [state for optimizer in self.optimizers for state in optimizer.state.values()]
        storages = [t.untyped_storage() for tensors in held for t in tensors.values()]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def sft(stage: Stage, **objective) -> Step:
    model = stage.copy(**objective)
    return Step(stage, model, lambda batch, targets: [model(**batch.inputs).loss])


def ours(stage: Stage, online: bool = False) -> Step:
    """Rows and targets as `SFRCollator` makes them, moved to the device; online its texts, embedded beside the forward.
    One text alone is remembered: in training every one is new, here the batches come again."""
    from sfr_kernels import SFRLoss
    from sfr_kernels.targets import OnlineTargets, build_targets
    from sfr_kernels.targets.collator import sfr_inputs

    encoder, config, (_, b, length) = stage.make_encoder(), stage.config, stage.columns["labels"].shape
    if online:
        source = OnlineTargets(encoder, stage.tokenizer, capacity=1)
    else:
        stage.folder = tempfile.TemporaryDirectory()  # goes with the stage
        samples = [{"labels": row.tolist()} for row in stage.columns["labels"].flatten(0, 1)]
        source = build_targets(samples, config, stage.tokenizer, encoder, folder=stage.folder.name, progress=False)
    head = stage.head(config)
    model = stage.copy(SFRLoss(config, head), source)

    def targets(batch: Batch, mark: Mark = unmarked):
        ids = None if online else list(range(batch.index * b, (batch.index + 1) * b))
        rows = sfr_inputs(batch.host, ids, config, source, lengths=[length] * b)["rows"]
        rows = (rows.pin_memory() if stage.device.type == "cuda" else rows).to(stage.device)
        mark(TARGETS)
        return rows

    def loss(batch: Batch, rows) -> list[Tensor]:
        out = model(**batch.inputs, rows=rows, seed=batch.index)
        return [out.loss, out.ce_loss, out.flow_loss]

    embed = (lambda texts: source.start(texts, stage.device).wait()) if online else None
    return Step(stage, model, loss, targets, head, config, encoder if online else None, embed)


def published(stage: Stage) -> Step:
    """It sees the lm_head's input: asking for all hidden states would keep every layer's alive."""
    model, config, encoder, seen = stage.copy(), stage.official, stage.make_encoder(), []
    make = PublishedTargets(encoder, stage.tokenizer, config, stage.dtype)
    sizes = stage.shape.trunk.hidden_size, stage.shape.encoder.hidden_size, config.width, config.num_layers
    head = PublishedFlowLoss(*sizes).to(stage.device, stage.dtype)
    head.load_state_dict(stage.head(config).state_dict())
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def targets(batch: Batch, mark: Mark = unmarked) -> tuple[Tensor, Tensor]:
        return make(batch.inputs["labels"], mark)

    def loss(batch: Batch, targets: tuple[Tensor, Tensor]) -> list[Tensor]:
        ce = model(**batch.inputs).loss
        flow = head(seen.pop(), *targets)
        return [ce + config.first_weight * flow, ce, flow]

    return Step(stage, model, loss, targets, head, config, encoder, lambda texts: make.embed(texts, stage.device))


SFT_HF, SFT_OURS, PUBLISHED = "SFT, HF's loss", "SFT, ours", "SFR, as published"
SFR_STORED, SFR_ONLINE = "SFR, ours, stored targets", "SFR, ours, online targets"
fused, online = functools.partial(sft, objective="ce"), functools.partial(ours, online=True)
STEPS = {SFT_HF: sft, SFT_OURS: fused, PUBLISHED: published, SFR_STORED: ours, SFR_ONLINE: online}

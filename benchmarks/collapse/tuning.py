"""A fine-tuning of SmolLM2-135M with one arm.

Adapters are on the last ten of the thirty layers alone, so that the others run once for all arms.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, get_linear_schedule_with_warmup

from sfr_kernels import SFRConfig, SupervisedRows, linear_cross_entropy
from sfr_kernels.atomic import write_atomically
from sfr_kernels.evaluation.generate import Answer, Sampling
from sfr_kernels.targets import SFRCollator, TargetStore, build_targets, load_encoder
from sfr_kernels.training.data import split_by_prompt, tokenize
from sfr_kernels.training.formats import Example
from sfr_kernels.training.models import load_model

from .arms import Arm, Objective

MODEL, CUT = "smollm2-135m-instruct", 20
STEPS, WARMUP, BATCH, HEAD_STEPS, HEAD_RATE = 40, 4, 4, 150, 1e-3
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Data:
    """Chats, their targets and the lower layers' hidden states, made once and kept in `folder`."""

    sampling: Sampling
    held_out: float  # share of the prompts
    counts: tuple[int, int]  # of the held-out prompts: answered; others, whose cross-entropy chooses the learning rate

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device, self.examples = folder, device, self.read()
        self.model, self.tokenizer = load_model(MODEL, device, torch.float32)
        self.samples = tokenize(self.examples, self.tokenizer, 1024).samples
        self.train, held = split_by_prompt(self.examples, self.held_out)
        prompts, (asked, choosing) = list(dict.fromkeys(self.examples[i].prompt for i in held)), self.counts
        self.asked = [i for i in held if self.examples[i].prompt in prompts[:asked]]
        self.choosing = [i for i in held if self.examples[i].prompt in prompts[asked : asked + choosing]]
        self.encoder = load_encoder("all-minilm-l6-v2", device)
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)

    def read(self) -> list[Example]:
        raise NotImplementedError

    @property
    def prompts(self) -> list[str]:
        """What is answered, as text."""
        raise NotImplementedError

    def measured(self, answers: Sequence[Sequence[Answer]]) -> dict[str, Sequence[float]]:
        """By measure, a value for each prompt."""
        raise NotImplementedError

    def store(self, config: SFRConfig) -> TargetStore | None:
        if config.loss == "mtp":
            return None
        folder = self.folder / ("targets-published" if config.target_rule == "published" else "targets")
        return build_targets(self.samples, config, self.tokenizer, self.encoder, folder=folder)

    @cached_property
    def lower(self) -> list[Tensor]:
        """Of each sample, what the adapted layers are given."""
        return self._kept("lower", self._lower)

    @cached_property
    def upper(self) -> list[Tensor]:
        """Of each sample, what the lm_head is given before the training."""
        return self._kept("upper", self._upper)

    def _upper(self) -> list[Tensor]:
        adapted = self.adapted(0)  # whose adapters do nothing yet
        return [adapted.hidden([i])[0] for i in range(len(self.samples))]

    @torch.no_grad()
    def _kept(self, name: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            write_atomically(path, save({str(i): x.contiguous() for i, x in enumerate(make())}))
        found = load_file(path, device=str(self.device))
        return [found[str(i)] for i in range(len(found))]

    def _lower(self) -> list[Tensor]:
        trunk = self.model.model
        whole, norm = trunk.layers, trunk.norm
        trunk.layers, trunk.norm = whole[:CUT], nn.Identity()
        try:
            ids = [torch.tensor([s["input_ids"]], device=self.device) for s in self.samples]
            return [trunk(x, use_cache=False).last_hidden_state[0] for x in ids]
        finally:
            trunk.layers, trunk.norm = whole, norm

    def adapted(self, seed: int) -> "Adapted":
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=PROJECTIONS,
            layers_pattern="layers", layers_to_transform=[*range(CUT, len(self.model.model.layers))],
        )  # fmt: skip
        return Adapted(get_peft_model(copy.deepcopy(self.model), lora), self)


@dataclass
class Adapted:
    model: nn.Module
    data: Data

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """(B, L, H) before the lm_head, of samples padded on the right, which a causal model does not see."""
        trunk = self.model.get_base_model().model
        whole = trunk.layers
        trunk.layers = whole[CUT:]
        try:
            lower = nn.utils.rnn.pad_sequence([self.data.lower[i] for i in indices], batch_first=True)
            return trunk(inputs_embeds=lower, use_cache=False).last_hidden_state
        finally:
            trunk.layers = whole

    @property
    def weight(self) -> Tensor:
        return self.model.get_base_model().lm_head.weight

    @torch.no_grad()
    def cross_entropy(self, indices: Sequence[int]) -> float:
        """Nats a token, over those samples' answers."""
        total = count = 0
        for start in range(0, len(indices), 16):
            part = indices[start : start + 16]
            batch = self.data.collate([_plain(self.data.samples[i]) for i in part])
            hidden, labels = self.hidden(part), batch["labels"].to(self.data.device)
            total += linear_cross_entropy(hidden, self.weight, labels, shift=True, reduction="sum").item()
            count += int((labels[:, 1:] != -100).sum())
        return total / count


def _plain(sample: dict) -> dict:
    return {name: sample[name] for name in ("input_ids", "labels")}


def fine_tune(data: Data, arm: Arm, rate: float, seed: int) -> tuple[Adapted, list[dict]]:
    adapted = data.adapted(seed)
    config = arm.config or SFRConfig(loss="mtp", head_steps=0)  # whose rows need no targets
    objective = Objective(arm, adapted.weight, 384, seed)
    collator = SFRCollator(config, data.store(config), data.collate)
    order = torch.Generator().manual_seed(seed)
    batches = []
    while len(batches) < STEPS:
        shuffled = [data.train[i] for i in torch.randperm(len(data.train), generator=order)]
        batches += [shuffled[i : i + BATCH] for i in range(0, len(shuffled) - BATCH + 1, BATCH)]

    def rows_of(indices: list[int]) -> SupervisedRows:
        return collator([data.samples[i] for i in indices])["rows"].to(data.device)

    def untrained() -> Iterator[tuple[Tensor, SupervisedRows, Tensor]]:
        for _ in range(config.head_steps):
            part = [data.train[i] for i in torch.randint(len(data.train), (2 * BATCH,), generator=order)]
            rows = rows_of(part)
            yield nn.utils.rnn.pad_sequence([data.upper[i] for i in part], batch_first=True), rows, rows.targets

    if config.head_steps:
        objective.fit_head(untrained(), HEAD_RATE)
    trained = [p for p in adapted.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": rate}, {"params": objective.parameters(), "lr": HEAD_RATE}], weight_decay=0.0
    )
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    history = []
    for step, indices in enumerate(batches[:STEPS], 1):
        rows = rows_of(indices)
        optimizer.zero_grad()
        objective.loss(adapted.hidden(indices), rows, rows.targets, step, measure=step % 10 == 1).backward()
        optimizer.step()
        schedule.step()
        if step in (STEPS // 2, STEPS):
            point = {
                "step": step,
                "choosing": adapted.cross_entropy(data.choosing),
                "asked": adapted.cross_entropy(data.asked),
            }
            history.append(point | {"share": objective.share})
    return adapted, history

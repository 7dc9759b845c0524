"""Data, trainers and the oracle for the tests of SFRTrainer."""

import copy
import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("trl")

from corpora import HashEncoder
from datasets import Dataset
from operations import Operations
from tiny import CONFIG, HIDDEN, TARGET, VOCAB, adapted, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from sfr_kernels import SFRLoss, VelocityHead, detach, sfr_loss
from sfr_kernels.ops.flow_loss import step_seed
from sfr_kernels.targets import rows_and_texts
from sfr_kernels.training.attach import base_of
from sfr_kernels.training.objectives import attachment_of
from sfr_kernels.training.trl import SFRTrainer

WORDS = [*"thecatdogsrunmywxv."]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' <eos> ' }}{% endgeneration %}"
    "{% else %}{{ m.content + ' <eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
CHUNK_ROWS = 8  # of some 30 supervised rows of a micro-batch and more
ENCODER = HashEncoder()


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", *WORDS]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **special)


def texts(kind: str, count: int = 12, seed: int = 0) -> Dataset:
    """Texts of 5 to 25 words: "plain", "completion" of a prompt, or "chat" of two turns each."""
    generator = random.Random(seed)

    def said() -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(5, 25)))

    def turn(role: str) -> dict:
        return {"role": role, "content": said()}

    makers = {
        "plain": lambda: {"text": said()},
        "completion": lambda: {"prompt": said(), "completion": " " + said()},
        "chat": lambda: {"messages": [turn(role) for role in ("user", "assistant") * 2]},
    }
    return Dataset.from_list([makers[kind]() for _ in range(count)])


# Three steps of four samples, in order, by plain SGD.
STEPS = dict(
    per_device_train_batch_size=4, max_steps=3, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    dataloader_pin_memory=False, save_strategy="no", bf16=False, max_grad_norm=0.0,
    optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", train_sampling_strategy="sequential",
)  # fmt: skip


def settings(folder, **arguments) -> SFTConfig:
    return SFTConfig(str(folder), **STEPS | dict(max_length=64) | arguments)


def make_trainer(folder, kind: str = "plain", *, model=None, train=None, arguments=None, kind_of=SFRTrainer, **given):
    """An SFRTrainer of the tiny model on these texts."""
    if kind_of is SFRTrainer and not {"targets", "objective"} & set(given):
        given = dict(sfr=CONFIG, encoder=ENCODER, targets=folder / "targets") | given
    given |= dict(train_dataset=texts(kind) if train is None else train, processing_class=tokenizer())
    return kind_of(tiny_llama() if model is None else model, settings(folder, **arguments or {}), **given)


def documents(sample: dict) -> list[slice]:
    """Where in a sample those lie that are packed into it."""
    ends = itertools.accumulate(sample.get("seq_lengths", [len(sample["input_ids"])]), initial=0)
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def expected_loss(model, head, samples: list[tuple[int, dict]], seed: int, config=CONFIG, **options):
    """The loss of (id, sample)s by the reference, of each document's hidden states alone: no padding, no packing, no
    mask, no batches, and nothing of the attached forward or the collator."""
    base, made = base_of(model), tokenizer()
    hidden, labels, segment, identity = [], [], [], []
    for index, sample in samples:
        for part in documents(sample):
            ids = torch.tensor(sample["input_ids"][part])
            hidden.append(base.model(input_ids=ids[None], use_cache=False).last_hidden_state[0])
            labels.append(torch.tensor(sample["labels"][part]))
            segment.append(torch.full_like(ids, len(segment)))
            identity.append((index << 32) + torch.arange(part.start, part.stop))
    labels = torch.cat(labels)[None]
    named = dict(segment_ids=torch.cat(segment)[None], noise_id=torch.cat(identity)[None])
    rows, found = rows_and_texts(labels, config, made, **named)
    targets = torch.zeros(len(found), TARGET)
    there = [i for i, text in enumerate(found) if text is not None]
    targets[there] = ENCODER.embed([found[i] for i in there])
    return sfr_loss(
        torch.cat(hidden)[None], base.lm_head.weight, head, rows, targets.half(), seed=seed, config=config,
        backend="reference", **options,
    )  # fmt: skip


def train_by_hand(model, head, samples: list[dict], steps: int = 3, batch: int = 4, lr: float = 0.5, **options) -> None:
    """Plain SGD, each step on its whole batch at once."""
    parameters = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    model.eval()  # nothing here drops out
    for step in range(steps):
        chosen = [(i, samples[i]) for i in range(step * batch, (step + 1) * batch)]
        loss = expected_loss(model, head, chosen, step_seed(CONFIG.seed, step), **options).loss
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data.sub_(lr * gradient)


def chunked_loss(**fields) -> SFRLoss:
    config = replace(CONFIG, **fields)
    return SFRLoss(config, VelocityHead.from_config(config, HIDDEN, TARGET), chunk_rows=CHUNK_ROWS)


def in_parts(adapters: bool):
    """The same model twice, and arguments: for steps of a whole batch, and of its samples accumulated one by one."""
    for accumulated in (1, 4):
        model = tiny_llama(initializer_range=0.2)
        if adapters:
            torch.manual_seed(1)
            model = adapted(model, init_lora_weights="gaussian")
        yield model, dict(gradient_accumulation_steps=accumulated, per_device_train_batch_size=4 // accumulated)


class ByHand:
    """Trainings whose ends are those of one by hand, which is done once, at the first."""

    def __init__(self, **options):
        self.options, self.ends = options, None

    def check(self, trainer, samples: list[dict]) -> None:
        """Trains; every parameter must end within 2e-4 of how far it moved by hand, in float32, and no more rows of
        logits be made at once than `chunked_loss` has in a chunk."""
        if self.ends is None:
            model = copy.deepcopy(trainer.model)
            self.before = [p.clone() for p in model.parameters() if p.requires_grad]
            head = detach(model)
            train_by_hand(model, head, samples, **self.options)
            self.ends = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
        with Operations() as seen:
            trainer.train()
        assert 0 < max(math.prod(s) // VOCAB for s in seen.shapes if len(s) > 1 and s[-1] == VOCAB) <= CHUNK_ROWS
        found = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad and ".sfr." not in f".{n}"]
        found += list(attachment_of(trainer.model).head.named_parameters())
        assert len(found) == len(self.ends) == len(self.before)
        for (name, a), b, start in zip(found, self.ends, self.before, strict=True):
            moved, wrong = (b - start).abs().max().item(), (a - b).abs().max().item()
            assert moved > 2e-4 * b.abs().max(), f"{name} hardly moved, which shows nothing"
            assert wrong < 2e-4 * moved, name

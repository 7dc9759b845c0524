"""The `train` command: data, targets, model and Trainer put together, with what changed shown at the end."""

import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

from ..atomic import write_atomically
from ..config import SFRConfig
from ..evaluation.generate import generate
from ..evaluation.held_out import frozen_flow_loss, held_out_losses
from ..targets import SFRCollator, TargetStore, build_targets, load_encoder
from ..targets.encoder import MINILM
from ..targets.manifest import FILE as MANIFEST
from ..training.attach import attach, detach
from ..training.callbacks import SFRCallback
from ..training.chat_file import ChatFile
from ..training.checkpoint import save_head
from ..training.data import read_chats, split_by_prompt, tokenize
from ..training.formats import Example
from ..training.labelling import Tokenized, last_prompt
from ..training.lm_head import output_linear
from ..training.models import load_model
from ..training.objectives import attachment_of
from .report import ProgressBar, loss_curves, samples_table

WARMUP = 5  # steps of rising learning rate


@dataclass(frozen=True)
class TrainOptions:
    """One run of the `train` command."""

    data: Path
    out: Path
    model: str
    encoder: str | None  # None: that of the targets, if there are any, else the packaged one
    targets: Path | None  # a store's folder; None: targets in `out`
    config: SFRConfig
    objective: str  # "sfr" or "ce"
    full: bool
    epochs: float
    max_steps: int  # -1: as many as the epochs have
    batch_size: int
    accumulate: int
    learning_rate: float
    max_length: int
    save_every: int
    seed: int
    resume: bool
    overwrite: bool
    samples: int  # held-out prompts in the table

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "save_every", "max_length", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"--steps must be at least 1, got {self.max_steps}")
        if not (self.epochs > 0 and self.learning_rate > 0):
            raise ValueError(f"--epochs and --lr must be positive, got {self.epochs} and {self.learning_rate}")

    def identity(self) -> dict:
        """What must not change when a run is resumed."""
        content = hashlib.sha256(self.data.read_bytes()).hexdigest()
        values = asdict(self) | {"data": str(self.data), "sha256": content, "config": self.config.to_dict()}
        values["targets"] = self.targets and str(self.targets)
        return {k: v for k, v in values.items() if k not in ("out", "resume", "overwrite", "save_every", "samples")}


def finetune(options: TrainOptions) -> Path:
    """Runs a whole fine-tuning and returns the folder of the saved model.

    The run's folder holds `run.json`, the targets, checkpoints while it runs, and at the end `model/`, `losses.json`,
    `losses.png` and `samples.md`. ValueError, FileNotFoundError or RuntimeError, before anything is written, for input
    that does not work.
    """
    began = time.monotonic()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    checkpoint = _check_folder(options)
    examples = read_chats(options.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.device_count() > 1:
        raise RuntimeError("this command trains on one GPU: choose it with CUDA_VISIBLE_DEVICES")
    torch.manual_seed(options.seed)
    model, tokenizer = load_model(options.model, device, _weights_dtype(options, device))
    context = min(options.max_length, getattr(model.config, "max_position_embeddings", options.max_length))
    data = tokenize(examples, tokenizer, context)
    if report := data.report():
        print(report, file=sys.stderr)
    output_linear(model)
    _check_ids(data, model, examples)
    train, held_out, shown = _split(examples, data)
    sfr = options.objective == "sfr"
    store = encoder = None
    if sfr and options.config.loss != "mtp":
        corpus = ChatFile(options.data, tokenizer, context)
        store, encoder = _open_targets(options, corpus, tokenizer, device)

    _start_folder(options)
    if encoder is not None:
        folder = _targets_folder(options)
        store = build_targets(corpus, options.config, tokenizer, encoder, folder=folder, replace=options.overwrite)
        del encoder
    collator = DataCollatorForSeq2Seq(tokenizer)
    collate = SFRCollator(options.config, store, collator) if sfr else _without_sample_id(collator)
    model = _trainable(model, options)
    attach(model, options.config if sfr else None, store, objective=options.objective)

    order = torch.Generator().manual_seed(options.seed)

    def loader(samples, batch_size=options.batch_size, shuffle=False):
        last = options.config.loss == "cka"  # compares the responses of a batch, and needs a few
        return DataLoader(samples, batch_size, shuffle, collate_fn=collate, generator=order, drop_last=last)

    shown = shown[: 3 * options.samples]
    prompts = [last_prompt(example, tokenizer) for example in shown]
    before = held_out_losses(model, loader(held_out), device) if held_out else {}
    answers_before = generate(model, tokenizer, prompts, seed=options.seed)
    print(f"{len(train)} training and {len(held_out)} held-out examples; held out before: {_text(before)}", flush=True)

    trainer = Trainer(
        model=model,
        args=_arguments(options, device),
        train_dataset=train,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[ProgressBar()],
    )
    SFRCallback().add_to(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    steps = trainer.state.max_steps

    after = held_out_losses(model, loader(held_out), device) if held_out else {}
    results = {"held_out_before": before, "held_out_after": after, "steps": steps}
    if sfr and options.config.loss == "flow" and held_out:
        whole = options.batch_size * options.accumulate
        epochs = math.ceil(steps * whole / len(train))
        batches = (b for _ in range(epochs) for b in loader(train, whole, shuffle=True))
        size = attachment_of(model).head.shape.hidden_size
        results["blind_flow_loss"] = frozen_flow_loss(
            options.config, lambda batch: torch.zeros(*batch["labels"].shape, size, dtype=torch.float32),
            _first(batches, steps), loader(held_out), steps, options.learning_rate, WARMUP, device,
        )  # fmt: skip
    return _finish(options, trainer, tokenizer, shown, prompts, answers_before, results, began)


def _check_folder(options: TrainOptions) -> str | None:
    """The checkpoint to go on from, if any. ValueError if the folder holds something this run would destroy."""
    run = options.out / "run.json"
    if not run.is_file():
        if options.out.exists() and any(options.out.iterdir()):
            raise ValueError(f"--out {options.out} is not empty and holds no run: choose another folder")
        if options.resume:
            raise ValueError(f"--resume: there is no run in {options.out}")
        return None
    if not options.resume:
        if options.overwrite:
            return None
        raise ValueError(f"--out {options.out} already holds a run: --resume continues it, --overwrite starts anew")
    if (options.out / "losses.json").is_file():
        raise ValueError(f"--resume: the run in {options.out} is finished; --overwrite starts anew")
    stored, wanted = json.loads(run.read_text()), json.loads(json.dumps(options.identity()))
    if differences := [f"{k}: {stored.get(k)!r} → {v!r}" for k, v in wanted.items() if stored.get(k) != v]:
        raise ValueError(f"--resume needs the options the run was started with; changed: {'; '.join(differences)}")
    # Trainer writes trainer_state.json last: a checkpoint with one is whole.
    whole = [p.parent for p in options.out.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda p: int(p.name.split("-")[1]))) if whole else None


def _start_folder(options: TrainOptions) -> None:
    if options.out.exists() and options.overwrite and not options.resume:
        (options.out / "losses.json").unlink(missing_ok=True)
        for path in [*options.out.glob("checkpoint-*"), options.out / "model"]:
            shutil.rmtree(path, ignore_errors=True)
    for partial in options.out.glob("checkpoint-*"):
        if not (partial / "trainer_state.json").is_file():
            shutil.rmtree(partial)
    write_atomically(options.out / "run.json", (json.dumps(options.identity(), indent=2) + "\n").encode())


def _weights_dtype(options: TrainOptions, device: torch.device) -> torch.dtype:
    """float32 where the weights themselves are trained (under autocast on a GPU) and on CPUs; else bf16."""
    return torch.float32 if options.full or device.type == "cpu" else torch.bfloat16


def _arguments(options: TrainOptions, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(options.out),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        weight_decay=0.0,
        logging_steps=1,
        save_steps=options.save_every,
        save_total_limit=2,
        seed=options.seed,
        data_seed=options.seed,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        report_to=[],
        include_num_input_tokens_seen="all",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=options.config.loss == "cka",
        dataloader_pin_memory=device.type == "cuda",
    )


def _check_ids(data: Tokenized, model, examples: list[Example]) -> None:
    vocab = model.get_output_embeddings().weight.shape[0]
    for sample in data.samples:
        if (top := max(sample["input_ids"])) >= vocab:
            where = examples[sample["sample_id"]].where
            raise ValueError(f"{where}: token id {top} is outside the model's vocabulary of {vocab}")


def _split(examples: list[Example], data: Tokenized):
    """Training samples, held-out samples, and examples for the table of answers: three personas a prompt."""
    train_ids, held_ids = split_by_prompt(examples)
    sample = {s["sample_id"]: s for s in data.samples}
    by_prompt: dict[str, list] = {}
    for i in held_ids or train_ids:
        by_prompt.setdefault(examples[i].prompt, []).append(examples[i])
    shown = [example for group in by_prompt.values() for example in group[:3]]
    if not any(i in sample for i in train_ids):
        raise ValueError("no training example is left within --max-length")
    return [sample[i] for i in train_ids if i in sample], [sample[i] for i in held_ids if i in sample], shown


def _targets_folder(options: TrainOptions) -> Path:
    return options.targets or options.out / "targets"


def _open_targets(options: TrainOptions, corpus: ChatFile, tokenizer, device: torch.device):
    """The store of every example of the file, by its index there; or, where it is to be built, the encoder.

    ValueError naming every difference if there are other targets, unless they are the run's own and it starts anew.
    """
    folder, encoder = _targets_folder(options), None
    if options.encoder is not None or not (folder / MANIFEST).is_file():
        encoder = load_encoder(options.encoder or MINILM, device)
    try:
        found = TargetStore.open(folder, options.config, tokenizer=tokenizer, encoder=encoder, data=corpus.fingerprint)
        return found, None
    except FileNotFoundError:
        return None, encoder
    except ValueError:
        if options.targets is not None or not options.overwrite:
            raise
        return None, encoder or load_encoder(MINILM, device)


def _trainable(model, options: TrainOptions):
    """The model itself, or LoRA adapters on every linear layer of it but the lm_head."""
    if options.full:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def _without_sample_id(collator):
    return lambda features: collator([{k: v for k, v in f.items() if k != "sample_id"} for f in features])


def _first(batches, count: int):
    for _, batch in zip(range(count), batches, strict=False):
        yield batch


def _text(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in losses.items()) or "nothing"


def _finish(options, trainer, tokenizer, shown, prompts, answers_before, results, began) -> Path:
    """Saves the plain model, the head, the curves and the samples, and prints what changed."""
    model, out = trainer.model, options.out
    history = [h for h in trainer.state.log_history if "loss" in h]
    answers = generate(model, tokenizer, prompts, seed=options.seed)
    folder = out / "model"
    loss = attachment_of(model)
    detach(model)
    if options.objective == "sfr":
        save_head(folder, loss)
    plain = model if options.full else model.merge_and_unload()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)

    results["seconds"] = round(time.monotonic() - began, 1)
    write_atomically(out / "losses.json", (json.dumps(results | {"history": history}, indent=1) + "\n").encode())
    loss_curves(history, results, out / "losses.png")
    samples_table(shown, answers_before, answers, out / "samples.md")
    before, after = results["held_out_before"], results["held_out_after"]
    print(f"\nHeld out, before: {_text(before)}\nHeld out, after:  {_text(after)}")
    if "blind_flow_loss" in results:
        print(f"Flow loss of a head that cannot see the hidden states: {results['blind_flow_loss']:.3f}")
    print(f"Loss curves: {out / 'losses.png'}\nAnswers:     {out / 'samples.md'}\nModel:       {folder}")
    return folder

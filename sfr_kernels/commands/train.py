"""The `train` command: data, targets, model and Trainer put together, with what changed shown at the end."""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

from ..atomic import write_atomically
from ..evaluation.compare import measure
from ..evaluation.generate import Answer, Sampling, TransformersEngine, generate, stored
from ..evaluation.held_out import held_out_losses
from ..targets import SFRCollator, TargetStore, build_targets, load_encoder
from ..targets.encoder import MINILM
from ..targets.manifest import FILE as MANIFEST
from ..training.attach import attach, detach
from ..training.callbacks import SFRCallback
from ..training.checkpoint import save_head
from ..training.comparison import Asked, choose, prompts_of, setting_of, with_room
from ..training.data import PERSONAS, ChatFile, read_chats, split_by_prompt, tokenize
from ..training.formats import Example
from ..training.inner_layer import layer_of
from ..training.labelling import Tokenized
from ..training.lm_head import output_linear
from ..training.model_card import write_card
from ..training.models import load_model
from ..training.objectives import OBJECTIVES, as_mtp, attachment_of
from .report import ProgressBar, loss_curves, samples_table, write_comparison

WARMUP = 5  # steps of rising learning rate
_PRINTED = 3, 3  # prompts, and personas of each, in the table of answers
_COMPARED = ("objective", "encoder", "targets", "config", "data")  # in what runs that are compared may differ
# The options that a resumed run must have again, beside data, targets and config.
_FIXED = ("model", "encoder", "objective", "full", "epochs", "max_steps", "batch_size", "accumulate", "learning_rate",
          "max_length", "seed")  # fmt: skip


def run(args) -> None:
    """Runs a whole fine-tuning. The run's folder holds `run.json`, the targets, checkpoints while it runs, and at the
    end `model/`, `losses.json`, `losses.png`, `samples.md`, `comparison.md` and its plots. ValueError,
    FileNotFoundError or RuntimeError, before anything is written, for input that does not work."""
    began = time.monotonic()
    args.data, args.seed = args.data or PERSONAS, args.config.seed
    if args.objective == "mtp":
        args.config = as_mtp("--config", args.config)
    if args.targets is not None and (args.objective == "ce" or args.config.loss == "mtp"):
        raise ValueError("--targets has no meaning with --objective ce or mtp, which have no targets")
    if args.objective == "ce":
        for name in ("head_steps", "flow_weight"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} has no meaning with --objective ce, which has no head")
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.full else 1e-3
    if args.max_steps < 1 and args.max_steps != -1:
        raise ValueError(f"--steps must be at least 1, got {args.max_steps}")
    if not (args.epochs > 0 and args.learning_rate > 0):
        raise ValueError(f"--epochs and --lr must be positive, got {args.epochs} and {args.learning_rate}")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    checkpoint = _check_folder(args)
    examples = read_chats(args.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.device_count() > 1:
        raise RuntimeError("this command trains on one GPU: choose it with CUDA_VISIBLE_DEVICES")
    torch.manual_seed(args.seed)
    # float32 where the weights themselves are trained, under autocast on a GPU, and on CPUs
    dtype = torch.float32 if args.full or device.type == "cpu" else torch.bfloat16
    model, tokenizer = load_model(args.model, device, dtype)
    context = min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length))
    data = tokenize(examples, tokenizer, context)
    if report := data.report():
        print(report, file=sys.stderr)
    vocab = output_linear(model).out_features
    for sample in data.samples:
        if (top := max(sample["input_ids"])) >= vocab:
            where = examples[sample["sample_id"]].where
            raise ValueError(f"{where}: token id {top} is outside the model's vocabulary of {vocab}")
    layer = None if args.objective == "ce" else layer_of(model, args.config.layer_index)
    if layer is not None and layer.endswith(".0") and not args.full:
        raise ValueError("layer_index must not be 0 without --full: no parameter before it is trained")
    train, held_out, asked = _split(examples, data, args.max_prompts)
    asked, setting = _compared(args, asked, [examples[s["sample_id"]] for s in train], model, tokenizer, device)
    prompts = prompts_of(asked, tokenizer)
    sampling = Sampling(samples=1 if len({cell.persona for cell in asked}) > 1 else 2, seed=args.seed)
    sfr = args.objective != "ce"
    store = encoder = None
    if sfr and args.config.loss != "mtp":
        corpus, folder = ChatFile(args.data, tokenizer, context), args.targets or args.out / "targets"
        store, encoder = _open_targets(args, folder, corpus, tokenizer, device)

    _start_folder(args)
    if encoder is not None:
        store = build_targets(corpus, args.config, tokenizer, encoder, folder=folder, replace=args.overwrite)
        del encoder
    collate = DataCollatorForSeq2Seq(tokenizer)
    if sfr:
        collate = SFRCollator(args.config, store, collate)
    else:
        for sample in data.samples:
            del sample["sample_id"]
    if not args.full:  # adapters on every linear layer but the lm_head
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    attach(model, args.config if sfr else None, store, objective=args.objective)

    order = torch.Generator().manual_seed(args.seed)

    def loader(samples, batch_size=args.batch_size, shuffle=False):
        last = args.config.loss == "cka"  # compares the responses of a batch, and needs at least 4
        return DataLoader(samples, batch_size, shuffle, collate_fn=collate, generator=order, drop_last=last)

    engine = TransformersEngine(model, tokenizer)
    before = held_out_losses(model, loader(held_out), device) if held_out else {}
    answers = {"before": _answer(args, "before", engine, prompts, sampling)}
    print(f"{len(train)} training and {len(held_out)} held-out examples; held out before: {_text(before)}", flush=True)

    trainer = Trainer(
        model=model, args=_arguments(args, device), train_dataset=train, data_collator=collate,
        processing_class=tokenizer, callbacks=[ProgressBar()],
    )  # fmt: skip
    SFRCallback().add_to(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    steps = trainer.state.max_steps

    after = held_out_losses(model, loader(held_out), device) if held_out else {}
    results = {"held_out_before": before, "held_out_after": after, "steps": steps}
    history = [h for h in trainer.state.log_history if "loss" in h]
    answers[args.objective] = _answer(args, args.objective, engine, prompts, sampling)
    _save_model(args, model, tokenizer)

    results["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(results | {"history": history}, indent=1) + "\n"
    write_atomically(args.out / "losses.json", text.encode())
    loss_curves(history, results, args.out / "losses.png")
    first = {label: [row[0].text.strip() for row in rows] for label, rows in answers.items()}
    samples_table("Held-out prompts, before and after", list(asked), first, args.out / "samples.md", printed=_PRINTED)
    print(f"\nHeld out, before: {_text(before)}\nHeld out, after:  {_text(after)}")
    if setting is not None:
        answers |= _answers_of_other_runs(args, prompts, sampling)
        first = next((label for label in answers if label.startswith("ce")), "before")  # what others are compared with
        labels = [first, *(label for label in answers if label != first)]
        measured = {label: measure(setting, answers[label]) for label in labels}
        about = _identity(args) | {"encoder": args.encoder or MINILM, "sampling": vars(sampling)}
        write_comparison(args.out / "comparison", setting, measured, about)
        print(f"Comparison:  {args.out / 'comparison.md'}")
    print(f"Loss curves: {args.out / 'losses.png'}\nAnswers:     {args.out / 'samples.md'}")
    print(f"Model:       {args.out / 'model'}")


def _compared(args, asked: Asked, train: list[Example], model, tokenizer, device: torch.device):
    """The chats that are answered before and after, and what the answers are measured with. None are answered whose
    personas cannot be told apart, and nothing is measured where there is no sentence encoder, and none was asked for;
    why is said."""
    longest = getattr(model.config, "max_position_embeddings", None)
    try:
        asked = with_room(asked, tokenizer, longest, Sampling().max_new_tokens)
    except ValueError as error:
        print(f"Answers will not be compared: {error}", file=sys.stderr)
        return {}, None
    try:
        return asked, setting_of(asked, train, load_encoder(args.encoder or MINILM, device)) if asked else None
    except RuntimeError as error:
        if args.encoder is not None:
            raise
        print(f"Answers will not be compared: {error}", file=sys.stderr)
        return asked, None


def _shared(args, whose: str) -> dict:
    """What runs have in common whose answers can be compared, and whose answers they are."""
    return {k: v for k, v in _identity(args).items() if k not in _COMPARED} | {"whose": whose}


def _answer(args, whose: str, engine, prompts: list[str], sampling: Sampling) -> list[list[Answer]]:
    """Answers of the model before, or after training with an objective, kept in the run's folder."""
    keep = args.out / f"answers-{whose}.jsonl"
    identity, progress = _shared(args, whose), f"answers, {whose}"
    return generate(engine, prompts, sampling, batch_size=32, keep=keep, identity=identity, progress=progress)


def _label(objective: str, folder: str) -> str:
    return objective if folder == objective else f"{objective} ({folder})"


def _answers_of_other_runs(args, prompts: list[str], sampling: Sampling) -> dict[str, list[list[Answer]]]:
    """Of runs of the other objectives that lie in the same folder and differ in nothing else."""
    found = {}
    for objective in OBJECTIVES.keys() - {args.objective}:
        for file in args.out.parent.glob(f"*/answers-{objective}.jsonl"):
            label = _label(objective, file.parent.name)
            found[label] = stored(file, prompts, sampling, _shared(args, objective))
    return {label: answers for label, answers in sorted(found.items()) if answers is not None}


def _identity(args) -> dict:
    """What must not change when a run is resumed."""
    return {name: getattr(args, name) for name in _FIXED} | {
        "data": str(args.data),
        "sha256": hashlib.sha256(args.data.read_bytes()).hexdigest(),
        "targets": args.targets and str(args.targets),
        "config": args.config.to_dict(),
    }


def _check_folder(args) -> str | None:
    """The checkpoint to go on from, if any. ValueError if the folder holds something this run would destroy."""
    run = args.out / "run.json"
    if not run.is_file():
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"--out {args.out} is not empty and holds no run: choose another folder")
        if args.resume:
            raise ValueError(f"--resume: there is no run in {args.out}")
        return None
    if not args.resume:
        if args.overwrite:
            return None
        raise ValueError(f"--out {args.out} already holds a run: --resume continues it, --overwrite starts anew")
    if (args.out / "losses.json").is_file():
        raise ValueError(f"--resume: the run in {args.out} is finished; --overwrite starts anew")
    stored, wanted = json.loads(run.read_text()), json.loads(json.dumps(_identity(args)))
    if differences := [f"{k}: {stored.get(k)!r} → {v!r}" for k, v in wanted.items() if stored.get(k) != v]:
        raise ValueError(f"--resume needs the options the run was started with; changed: {'; '.join(differences)}")
    # Trainer writes trainer_state.json last: a checkpoint with one is whole.
    whole = [p.parent for p in args.out.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda p: int(p.name.split("-")[1]))) if whole else None


def _start_folder(args) -> None:
    if args.out.exists() and args.overwrite and not args.resume:
        (args.out / "losses.json").unlink(missing_ok=True)
        for path in [*args.out.glob("checkpoint-*"), args.out / "model"]:
            shutil.rmtree(path, ignore_errors=True)
        for path in (*args.out.glob("answers-*.jsonl"), *args.out.glob("comparison*"), args.out / "samples.md"):
            path.unlink(missing_ok=True)
    for partial in args.out.glob("checkpoint-*"):
        if not (partial / "trainer_state.json").is_file():
            shutil.rmtree(partial)
    write_atomically(args.out / "run.json", (json.dumps(_identity(args), indent=2) + "\n").encode())


def _arguments(args, device: torch.device) -> TrainingArguments:
    gpu = device.type == "cuda"
    return TrainingArguments(
        output_dir=str(args.out), num_train_epochs=args.epochs, max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate, lr_scheduler_type="linear", warmup_steps=WARMUP, weight_decay=0.0,
        seed=args.seed, data_seed=args.seed, bf16=gpu, use_cpu=not gpu,
        save_steps=args.save_every, save_total_limit=2,
        logging_steps=1, report_to=[], disable_tqdm=True, include_num_input_tokens_seen="all",
        remove_unused_columns=False, dataloader_drop_last=args.config.loss == "cka", dataloader_pin_memory=gpu,
    )  # fmt: skip


def _split(examples: list[Example], data: Tokenized, most: int):
    """Training samples, held-out samples, and the chats that are answered, of the first `most` prompts."""
    train_ids, held_ids = split_by_prompt(examples)
    sample = {s["sample_id"]: s for s in data.samples}
    if not any(i in sample for i in train_ids):
        raise ValueError("no training example is left within --max-length")
    asked = choose([examples[i] for i in held_ids or train_ids], most)
    return [sample[i] for i in train_ids if i in sample], [sample[i] for i in held_ids if i in sample], asked


def _open_targets(args, folder: Path, corpus: ChatFile, tokenizer, device: torch.device):
    """The store of every example of the file, by its index there; or, where it is to be built, the encoder. ValueError
    naming every difference if there are other targets, unless they are the run's own and it starts anew."""
    encoder = None
    if args.encoder is not None or not (folder / MANIFEST).is_file():
        encoder = load_encoder(args.encoder or MINILM, device)
    try:
        found = TargetStore.open(folder, args.config, tokenizer=tokenizer, encoder=encoder, data=corpus.fingerprint)
        return found, None
    except FileNotFoundError:
        return None, encoder
    except ValueError:
        if args.targets is not None or not args.overwrite:
            raise
        return None, encoder or load_encoder(MINILM, device)


def _text(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in losses.items()) or "nothing"


def _save_model(args, model, tokenizer) -> None:
    """Saves the plain model and the head, and removes the checkpoints."""
    folder, loss = args.out / "model", attachment_of(model)
    detach(model)
    if args.objective != "ce":
        save_head(folder, loss)
    plain = model if args.full else model.merge_and_unload()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, plain, loss)
    for checkpoint in args.out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)

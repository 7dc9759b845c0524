"""Trainings of tiny models by the engines that spread them over processes, on CPUs, for test_engines.py."""

import os
import sys
from pathlib import Path

import torch
import trl_cases
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from corpora import build
from outcomes import trained
from test_trainer import chunked_trainer
from tiny import adapted, tiny_llama
from transformers import Trainer
from trl_cases import ENCODER, chunked_loss, texts, tokenizer

from sfr_kernels.training.objectives import attachment_of
from sfr_kernels.training.sharding import gathered, parameters_of
from sfr_kernels.training.trl import SFRTrainer

BATCH, STEPS, SAVED = 8, 3, 2
LAYERS = dict(transformer_layer_cls_to_wrap=["LlamaDecoderLayer"])
ZERO3 = dict(stage=3, stage3_gather_16bit_weights_on_model_save=True)
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def _zero(**optimization) -> dict:
    untested = dict(zero_allow_untested_optimizer=True)  # by DeepSpeed, which is any but Adam
    return dict(deepspeed=untested | dict(zero_optimization=optimization) | dict.fromkeys(AUTO, "auto"))


def _fsdp(**config) -> dict:
    return dict(fsdp=True, fsdp_config=LAYERS | config)


# A Trainer's arguments. DDP alone is what accelerate does on CPUs, the others it must be led to.
ENGINES = {
    "one process": {},
    "DDP": {},
    "FSDP2": _fsdp(version=2, state_dict_type="FULL_STATE_DICT"),
    "FSDP2, sharded checkpoints": _fsdp(version=2, state_dict_type="SHARDED_STATE_DICT"),
    "FSDP2, cpu_ram_efficient_loading": _fsdp(version=2, cpu_ram_efficient_loading=True),
    "ZeRO-2": _zero(stage=2),
    "ZeRO-3": _zero(**ZERO3),
}
KINDS = {name: "FSDP" if "FSDP" in name else "DEEPSPEED" if "ZeRO" in name else "MULTI_CPU" for name in ENGINES}
KINDS["one process"] = "NO"
ADAPTERS = {
    "full": None,
    "LoRA": "all-linear",
    "LoRA with lm_head": ["q_proj", "v_proj", "up_proj", "lm_head"],
}
STATE = "λ, step and gate"
TRAINERS = {"Trainer": Trainer, "SFRTrainer": SFRTrainer}


def lead_to(engine: str) -> None:
    """In a process of its own: accelerate takes the CPUs for GPUs, and DeepSpeed compiles nothing."""
    if engine == "one process":
        return
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # and not "cpu:0", where no checkpoint can be loaded
    if engine == "DDP":
        return
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if "deepspeed" in ENGINES[engine]:
        import deepspeed  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def model_for(adapters: str):
    model = tiny_llama(initializer_range=0.2)
    if (modules := ADAPTERS[adapters]) is not None:
        torch.manual_seed(1)
        model = adapted(model, modules, init_lora_weights="gaussian")
    return model


def make_trainer(
    folder: Path, engine: str, trainer: str, adapters: str, accumulation: int, fields: dict | None = None, **arguments
):
    """Three steps of SGD with momentum, which a checkpoint must hold, of eight samples, in order."""
    processes = 1 if engine == "one process" else 2
    given = ENGINES[engine] | dict(
        per_device_train_batch_size=BATCH // (processes * accumulation), gradient_accumulation_steps=accumulation,
        optim="sgd", optim_args="momentum=0.5", save_strategy="steps", save_steps=SAVED, max_steps=STEPS,
        use_cpu=engine in ("one process", "DDP"), learning_rate=0.2,
    ) | arguments  # fmt: skip
    model, data, targets = model_for(adapters), texts("plain", BATCH * STEPS), folder.parent / "targets"
    if trainer == "SFRTrainer":
        objective = dict(sfr=chunked_loss(**fields or {}), encoder=ENCODER, targets=targets / "of texts")
        return trl_cases.make_trainer(folder, model=model, train=data, arguments=given, **objective)
    ids = [tokenizer()(text)["input_ids"] for text in data["text"]]
    samples = [dict(input_ids=x, labels=list(x), sample_id=i) for i, x in enumerate(ids)]
    store = build(targets / "of samples", samples, tokenizer=tokenizer())
    return chunked_trainer(folder, model, samples, store, loss=chunked_loss(**fields or {}), **given)


def outcome(trainer) -> dict[str, torch.Tensor]:
    """What a training has made of the model, gathered; and the state that it goes on from."""
    sfr = attachment_of(trainer.model)
    state = [sfr.flow_weight, sfr.step, *(sfr.gate.state() if sfr.gate else ())]
    return gathered(weights_of(trainer.model)) | {STATE: torch.tensor(state, dtype=torch.float64)}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in parameters_of(model).items() if p.requires_grad}


def losses(trainer) -> list[tuple]:
    names = ("step", "loss", "ce_loss", "flow_loss", "flow_weight")
    steps = [h for h in trainer.state.log_history if set(names) <= h.keys()]
    return [(*(h[n] for n in names), h.get("flow_gate", 1.0)) for h in steps]


def run(
    rank: int, folder: Path, engine: str, trainer: str, adapters: str, accumulation: int, fields: dict | None = None
) -> None:
    """Trains, and again from the checkpoint; leaves {rank}.pt, of both. `fields`: the configuration's."""
    lead_to(engine)
    case = (engine, trainer, adapters, accumulation, fields)
    whole = trained(make_trainer(folder / "whole", *case))
    found = dict(whole=outcome(whole), logs=losses(whole), kind=whole.accelerator.distributed_type.value)
    assert whole.args.world_size == (1 if engine == "one process" else 2)
    whole.save_model(str(folder / "whole" / "end"))
    del whole
    again = make_trainer(folder / "again", *case)
    again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{SAVED}"))
    found |= dict(resumed=outcome(again), logs_resumed=losses(again))
    torch.save(found, folder / f"{rank}.pt")

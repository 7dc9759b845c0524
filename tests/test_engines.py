"""Training that an engine spreads over processes ends where one process with the whole batch does, what it saved goes
on to the same bits, and its head loads anywhere.

`make test` runs a few of the cells of engine × accumulation × adapter × trainer, `make test-long` the others.
"""

import itertools

import engines
import pytest
import torch
from engines import ADAPTERS, ENGINES, STATE, TRAINERS
from marks import long
from safetensors.torch import load_file
from tiny import in_two_processes
from transformers import AutoModelForCausalLM

from sfr_kernels.training.checkpoint import load_head

pytestmark = pytest.mark.usefixtures("one_thread")
ACCUMULATION = (1, 4)
WHOLE = ("DDP", "FSDP2", "ZeRO-3")  # with every adapter, trainer and accumulation
# What make test runs: each trainer, adapter and accumulation with one engine or another.
CHOSEN = {
    ("DDP", "SFRTrainer", "full", 1),
    ("FSDP2", "Trainer", "LoRA with lm_head", 4),
    ("FSDP2, sharded checkpoints", "Trainer", "LoRA", 4),
    ("ZeRO-2", "Trainer", "LoRA", 4),
    ("ZeRO-3", "SFRTrainer", "full", 1),
}


def cell(engine: str, trainer: str, adapters: str, accumulation: int):
    marks = [pytest.mark.engine(trainer, engine, adapters)]
    if (engine, trainer, adapters, accumulation) not in CHOSEN:
        marks.append(pytest.mark.long)
    return pytest.param(
        engine, trainer, adapters, accumulation, marks=marks, id=f"{engine}, {adapters}, {trainer}, {accumulation}"
    )


CELLS = [cell(*c) for c in itertools.product(WHOLE, TRAINERS, ADAPTERS, ACCUMULATION)]
CELLS += [cell(*c, 4) for c in itertools.product([e for e in ENGINES if e not in WHOLE], TRAINERS, ADAPTERS)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the whole batch, and of what: a function of trainer, adapters and the configuration's
    fields, run once each."""
    found: dict = {}

    def trained(trainer: str, adapters: str, fields: dict | None = None):
        case = trainer, adapters, str(fields)
        if case not in found:
            folder, of_one = tmp_path_factory.mktemp("alone"), ("one process", trainer, adapters, 1, fields)
            start = engines.outcome(engines.make_trainer(folder / "start", *of_one))
            engines.run(0, folder, *of_one)
            found[case] = start, torch.load(folder / "0.pt")
        return found[case]

    return trained


def assert_near(found: dict, wanted: dict, start: dict) -> None:
    """Within 2e-4 of how far each parameter moved, and a rounding of the largest, in float32."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name == STATE:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0)
            continue
        moved = (value - start[name]).abs().max()
        assert moved > 2e-4 * value.abs().max(), f"{name} hardly moved, which shows nothing"
        assert (found[name] - value).abs().max() < 2e-4 * moved + 2**-23 * value.abs().max(), name


@pytest.mark.parametrize(("engine", "trainer", "adapters", "accumulation"), CELLS)
def test_an_engine_trains_as_one_process_and_resumes_to_the_same_bits(
    tmp_path, alone, engine, trainer, adapters, accumulation
):
    if engine.startswith("ZeRO"):
        pytest.importorskip("deepspeed")
    start, one = alone(trainer, adapters)
    case = engine, trainer, adapters, accumulation
    if engine == "one process":
        engines.run(0, tmp_path, *case)
    else:
        in_two_processes(engines.run, tmp_path, *case)
    _assert_outcomes(tmp_path, engine, start, one)
    for name in ("checkpoint-3", "end"):
        _assert_saved(tmp_path / "whole" / name, torch.load(tmp_path / "0.pt")["whole"], engine, adapters)


# The flow loss of the first step is 1.9547, that of the second 1.9565 or more: in the second the gate is closed.
RECIPE = dict(flow_gate=1.9555, flow_warmup=0.4, flow_schedule="cosine", flow_weight=4.0, layer_index=1)


@pytest.mark.parametrize("engine", ["DDP", "FSDP2", *long("ZeRO-3")])
def test_the_published_recipe_is_the_same_on_every_process(tmp_path, alone, engine):
    """Gate, ramp, inner layer and the head's average, which DeepSpeed cannot have."""
    if engine.startswith("ZeRO"):
        pytest.importorskip("deepspeed")
    fields = RECIPE if engine.startswith("ZeRO") else RECIPE | dict(head_ema=0.2)
    start, one = alone("Trainer", "LoRA", fields)
    assert [log[-1] for log in one["logs"]] == [1.0, 0.0, 1.0]
    in_two_processes(engines.run, tmp_path, engine, "Trainer", "LoRA", 4, fields)
    _assert_outcomes(tmp_path, engine, start, one)


def _assert_outcomes(folder, engine: str, start: dict, one: dict) -> None:
    for rank in range(1 if engine == "one process" else 2):
        found = torch.load(folder / f"{rank}.pt")
        assert found["kind"] == engines.KINDS[engine]
        assert_near(found["whole"], one["whole"], start)
        assert len(found["logs"]) == 3
        for values, wanted in zip(found["logs"], one["logs"], strict=True):
            assert values == pytest.approx(wanted, rel=1e-5)
        assert all(torch.equal(found["resumed"][name], value) for name, value in found["whole"].items())
        assert found["logs_resumed"] == found["logs"]


def _assert_saved(folder, ends: dict, engine: str, adapters: str) -> None:
    """The head loads in one process, every tensor at its shape; and the model is the plain one."""
    head = load_head(folder).head
    saved = {name: p for name, p in ends.items() if ".sfr." in f".{name}"}
    assert len(saved) == len(list(head.parameters()))
    for name, p in saved.items():
        assert torch.equal(head.state_dict()[name.split("sfr.head.")[1]], p), name
    if "sharded" in engine:
        return
    if adapters == "full":
        model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(said.values()), said
        assert all(torch.equal(p, ends[name]) for name, p in model.named_parameters())
    else:
        file = load_file(folder / "adapter_model.safetensors")
        assert not any("sfr." in name for name in file)  # with the lm_head's adapters its own weight is saved, too
        for name, p in ends.items():
            assert "lora_" not in name or torch.equal(file[name.replace(".default.", ".")], p), name

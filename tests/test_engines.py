"""Training that an engine spreads over processes ends where one process with the whole batch does, what it saved goes
on to the same bits, and its head loads anywhere.

`make test` runs a few of the cells of engine × accumulation × adapter × trainer, `make test-engines` all of them.
"""

import itertools
from functools import partial

import engines
import pytest
import torch
from engines import ADAPTERS, ENGINES, TRAINERS
from safetensors.torch import load_file
from tiny import in_two_processes
from transformers import AutoModelForCausalLM

from sfr_kernels.training.checkpoint import load_head

pytestmark = pytest.mark.usefixtures("one_thread")
ACCUMULATION = (1, 4)
WHOLE = ("DDP", "FSDP2", "ZeRO-3")  # with every adapter, trainer and accumulation
# What runs where the whole matrix does not: each trainer, adapter and accumulation with one engine or another.
CHOSEN = {("Trainer", "LoRA with lm_head", 4), ("SFRTrainer", "full", 1)}
OF_OTHERS = ("Trainer", "LoRA", 4)


def cell(engine: str, trainer: str, adapters: str, accumulation: int):
    marks = [pytest.mark.engine(trainer, engine, adapters)]
    if (trainer, adapters, accumulation) not in (CHOSEN if engine in WHOLE else [OF_OTHERS]):
        marks.append(pytest.mark.matrix)
    return pytest.param(
        engine, trainer, adapters, accumulation, marks=marks, id=f"{engine}, {adapters}, {trainer}, {accumulation}"
    )


CELLS = [cell(*c) for c in itertools.product(WHOLE, TRAINERS, ADAPTERS, ACCUMULATION)]
CELLS += [cell(*c, 4) for c in itertools.product([e for e in ENGINES if e not in WHOLE], TRAINERS, ADAPTERS)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the whole batch: a function of trainer and adapters, run once each."""
    found: dict = {}

    def trained(trainer: str, adapters: str):
        if (trainer, adapters) not in found:
            folder = tmp_path_factory.mktemp("alone")
            start = engines.outcome(engines.make_trainer(folder / "start", "one process", trainer, adapters, 1))
            engines.run(0, folder, "one process", trainer, adapters, 1)
            found[trainer, adapters] = start, torch.load(folder / "0.pt")
        return found[trainer, adapters]

    return trained


def assert_near(found: dict, wanted: dict, start: dict) -> None:
    """Within 2e-4 of how far each parameter moved, and a rounding of the largest, in float32."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
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
    work = partial(engines.run, folder=tmp_path, engine=engine, trainer=trainer, adapters=adapters)
    if engine == "one process":
        work(0, accumulation=accumulation)
    else:
        in_two_processes(_in_process, work, accumulation)
    for rank in range(1 if engine == "one process" else 2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["kind"] == engines.KINDS[engine]
        assert_near(found["whole"], one["whole"], start)
        assert len(found["logs"]) == 3
        for values, wanted in zip(found["logs"], one["logs"], strict=True):
            assert values == pytest.approx(wanted, rel=1e-5)
        assert all(torch.equal(found["resumed"][name], value) for name, value in found["whole"].items())
        assert found["logs_resumed"] == found["logs"]
    _assert_saved(tmp_path / "whole" / "checkpoint-3", found["whole"], engine, adapters)


def _in_process(rank: int, work, accumulation: int) -> None:
    work(rank, accumulation=accumulation)


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

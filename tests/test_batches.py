"""Batches as trainers make them: padded on either side, packed, streamed, cut; always the rows of the samples alone."""

from types import SimpleNamespace

import pytest
import torch
from corpora import HashEncoder, Words
from tiny import CONFIG, TARGET, pad, tiny_llama, tiny_samples
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from sfr_kernels import SFRConfig, attach
from sfr_kernels.targets import OnlineTargets, SFRCollator, TargetStore, build_targets
from sfr_kernels.targets.collator import sfr_inputs
from sfr_kernels.training.callbacks import SFRCallback

# every token is labelled, as in continued pre-training
WHOLE = [{"input_ids": s["input_ids"], "labels": s["input_ids"], "sample_id": i} for i, s in enumerate(tiny_samples())]


def left_pad(features):
    back = [{name: f[name][::-1] for name in ("input_ids", "labels")} for f in features]
    return {name: x.flip(1) for name, x in pad(back).items()}


CONFIGS = [CONFIG, SFRConfig(**CONFIG.to_dict() | dict(target_rule="published"))]


def online() -> OnlineTargets:
    return OnlineTargets(HashEncoder(TARGET), Words())


def store_of(folder, samples, config=CONFIG, encoder=None) -> TargetStore:
    return build_targets(samples, config, Words(), encoder or HashEncoder(TARGET), folder=folder, progress=False)


def by_place(rows, width: int, left: bool, lengths: list[int]) -> dict:
    """{(sequence, position in its sample): (label, target)} of every row."""
    found = {}
    targets = torch.as_tensor(rows.targets) if isinstance(rows.targets, torch.Tensor) else rows.targets
    for at, label, anchor in zip(rows.rows.tolist(), rows.labels.tolist(), rows.anchor.tolist(), strict=True):
        b, p = divmod(at, width)
        target = None if anchor < 0 else targets[anchor]
        target = tuple(target.tolist()) if isinstance(target, torch.Tensor) else target
        found[b, p - (width - lengths[b]) * left] = label, target
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "official"])
@pytest.mark.parametrize("kind", ["store", "online"])
def test_padding_on_the_left_adds_no_row_and_moves_no_anchor(tmp_path, kind, config):
    targets = store_of(tmp_path / "s", WHOLE, config) if kind == "store" else online()
    lengths = [len(s["labels"]) for s in WHOLE]
    right, left = (SFRCollator(config, targets, collate)(WHOLE)["rows"] for collate in (pad, left_pad))
    wanted = by_place(right, max(lengths), False, lengths)
    assert by_place(left, max(lengths), True, lengths) == wanted and len(wanted) == len(left)
    predicted = {(b, p) for b, n in enumerate(lengths) for p in range(n - 1)}  # by hand: all but each sample's last
    assert {place for place, (label, _) in wanted.items() if label >= 0} == predicted


@pytest.mark.setting("own loop", "padding on the left")
@pytest.mark.setting("own loop", "padding on the right")
@pytest.mark.setting("own loop", "packing")
def test_an_attached_model_reads_padding_and_packing_by_itself(tmp_path):
    """Labels, a mask and targets of one's own, without a collator: the loss of the samples one by one."""
    store = store_of(tmp_path / "s", WHOLE)
    model = attach(tiny_llama().eval(), CONFIG, target_size=TARGET)
    torch.nn.init.normal_(model.sfr.head.output_proj.weight)
    config = model.sfr.config
    assert config.loss == "flow"
    model.sfr.flow_weight = 0.0  # noise depends on the place in the batch
    alone = [model(**pad([s]), targets=store.lookup([i])) for i, s in enumerate(WHOLE)]
    tokens = [len(s["labels"]) - 1 for s in WHOLE]
    wanted = sum(out.ce_loss * n for out, n in zip(alone, tokens, strict=True)) / sum(tokens)
    for collate in (pad, left_pad, DataCollatorWithFlattening(return_tensors="pt")):
        samples = [{k: s[k] for k in ("input_ids", "labels")} for s in WHOLE]
        batch = {k: v for k, v in collate(samples).items() if isinstance(v, torch.Tensor)}
        torch.testing.assert_close(model(**batch, targets=store.lookup(range(8))).ce_loss, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "official"])
def test_a_label_on_padding_makes_no_row_of_it(config):
    """Some collators label it, or mask the end token as if it were padding: the last real token may predict that."""
    batch = pad(WHOLE)
    real = batch["attention_mask"].bool()
    batch["labels"] = batch["labels"].masked_fill(~real, 2)
    for mask in (
        batch["attention_mask"],
        batch["attention_mask"].flip(1),
    ):  # flipped: real tokens in the middle of none
        rows = sfr_inputs(batch | {"attention_mask": mask}, None, config, online())["rows"]
        places = set(rows.rows.tolist())
        assert places <= set(mask.flatten().nonzero().squeeze(1).tolist()) and len(rows) > 40


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "official"])
def test_end_tokens_that_are_masked_between_turns_are_no_padding(tmp_path, config):
    """attention_mask = input_ids != pad, where padding is the end token: the samples are what they are in the store."""
    samples = [{**s, "input_ids": [*s["input_ids"][:-6], 2, *s["input_ids"][-5:]]} for s in tiny_samples()]
    store = store_of(tmp_path / "s", samples, config)
    for collate in (pad, left_pad):
        batch = collate(samples)
        whole = sfr_inputs(batch, list(range(8)), config, store)["rows"]
        mask = batch["attention_mask"] * (batch["input_ids"] != 2)
        assert (mask != batch["attention_mask"]).any()
        rows = sfr_inputs(batch | {"attention_mask": mask}, list(range(8)), config, store)["rows"]
        for name in ("rows", "anchor", "labels", "noise_id", "weight"):
            assert torch.equal(getattr(rows, name), getattr(whole, name)), name


def test_what_a_mask_does_not_tell_is_refused_or_told_by_positions():
    batch = left_pad(WHOLE)
    wanted = sfr_inputs(batch, None, CONFIG, online())["rows"]
    whole = batch["attention_mask"]
    positions = (whole.cumsum(1) - 1).masked_fill(whole == 0, 1)
    for mask in (whole[:, None, None].expand(-1, 1, 28, -1), {"full_attention": whole}):
        with pytest.raises(
            ValueError, match=r"attention_mask must be \(8, 2.\) like labels, or come with position_ids"
        ):
            sfr_inputs(batch | {"attention_mask": mask}, None, CONFIG, online())
        told = sfr_inputs(batch | {"attention_mask": mask, "position_ids": positions}, None, CONFIG, online())["rows"]
        assert torch.equal(told.rows, wanted.rows) and torch.equal(told.anchor, wanted.anchor)
    prefixed = torch.cat([torch.ones(8, 4, dtype=torch.int64), whole], dim=1)  # of an adapter's virtual tokens
    assert torch.equal(
        sfr_inputs(batch | {"attention_mask": prefixed}, None, CONFIG, online())["rows"].rows, wanted.rows
    )


def test_samples_that_cannot_be_told_apart_are_refused():
    collate = SFRCollator(CONFIG, online(), pad)
    with pytest.raises(ValueError, match="some features have a 'sample_id' and some have none"):
        collate([WHOLE[0] | {"sample_id": None}, {k: v for k, v in WHOLE[1].items() if k != "sample_id"}])

    def two_rows(features):
        """The first sample, padded, and the others end to end."""
        rest = {name: features[1][name] + features[2][name] for name in ("input_ids", "labels")}
        batch, places = pad([features[0], rest]), torch.zeros(2, len(rest["labels"]), dtype=torch.int64)
        lengths = [len(f["labels"]) for f in features]
        places[0, : lengths[0]], places[1] = torch.arange(lengths[0]), torch.cat([*map(torch.arange, lengths[1:])])
        return batch | {"position_ids": places}

    with pytest.raises(ValueError, match="pack a batch into one row"):
        SFRCollator(CONFIG, online(), two_rows)(WHOLE[:3])


@pytest.mark.setting("own loop", "attention_mask that numbers packed samples", outcome="refused")
def test_a_mask_that_numbers_packed_samples_is_refused():
    batch = pad(WHOLE)
    mask = batch["attention_mask"].clone()
    mask[:, 4:] *= 2
    with pytest.raises(ValueError, match="attention_mask must be 0 or 1"):
        attach(tiny_llama(), CONFIG, online())(**batch | {"attention_mask": mask})


@pytest.mark.parametrize("drops", [True, False], ids=["lengths dropped", "positions made"])
def test_packs_that_tell_lengths(tmp_path, drops):
    """TRL's packing: no ids, `seq_lengths` for positions, of which its collator makes them."""
    packs = []
    for i in range(0, 8, 2):
        pair = WHOLE[i : i + 2]
        pack = {name: pair[0][name] + pair[1][name] for name in ("input_ids", "labels")}
        packs.append({**pack, "seq_lengths": [len(s["labels"]) for s in pair], "sample_id": i // 2})

    def collate(features):
        batch = pad([{k: v for k, v in f.items() if k != "seq_lengths"} for f in features])
        if not drops:
            width = batch["labels"].shape[1]
            positions = [[p for n in f["seq_lengths"] for p in range(n)] for f in features]
            batch["position_ids"] = torch.tensor([p + [0] * (width - len(p)) for p in positions])
        return batch

    plain = store_of(tmp_path / "s", WHOLE)
    rows = SFRCollator(CONFIG, store_of(tmp_path / "p", packs), collate)(packs)["rows"]
    apart = SFRCollator(CONFIG, plain, pad)(WHOLE)["rows"]
    assert torch.equal(rows.targets, plain.lookup(range(8)))
    assert torch.equal(rows.labels, apart.labels) and torch.equal(rows.anchor, apart.anchor)


def test_features_of_a_vision_model(tmp_path):
    """No input_ids before the wrapped collator makes them, tensors that are not by sample, three axes of positions."""
    store = store_of(tmp_path / "s", WHOLE)

    def processor(features):
        batch = pad([WHOLE[f["text"]] for f in features])
        axis = torch.arange(batch["labels"].shape[1]).expand(batch["labels"].shape)
        return batch | {"pixel_values": torch.zeros(77, 3), "position_ids": torch.stack([axis, axis // 2, axis // 3])}

    rows = SFRCollator(CONFIG, store, processor)([{"text": i, "sample_id": i} for i in range(8)])["rows"]
    wanted = SFRCollator(CONFIG, store, pad)(WHOLE)["rows"]
    for name in ("rows", "anchor", "labels", "noise_id", "targets"):
        assert torch.equal(getattr(rows, name), getattr(wanted, name)), name


@pytest.mark.parametrize("kind", ["store", "online"])
def test_an_answer_without_text_trains_on_no_target(tmp_path, kind):
    class Marked(Words):
        """Ids below 50 are special tokens."""

        def batch_decode(self, pieces, skip_special_tokens):
            return super().batch_decode([[i for i in piece if i >= 50] for piece in pieces], skip_special_tokens)

    class Picky(HashEncoder):
        """As some do: nothing is embedded as NaN."""

        def encode_document(self, texts, **options):
            return (
                super()
                .encode_document(texts, **options)
                .masked_fill(torch.tensor([not t.strip() for t in texts])[:, None], float("nan"))
            )

    samples = [dict(s) for s in tiny_samples()]
    samples[3]["labels"] = [min(x, 7) for x in samples[3]["labels"]]
    samples[3]["input_ids"] = [min(x, 7) for x in samples[3]["input_ids"]]
    if kind == "store":
        targets = build_targets(samples, CONFIG, Marked(), Picky(TARGET), folder=tmp_path / "s", progress=False)
    else:
        targets = OnlineTargets(Picky(TARGET), Marked())
    batch = SFRCollator(CONFIG, targets, pad)(samples)
    rows = batch["rows"]
    third = rows.rows // rows.shape[1] == 3
    assert third.any() and (rows.anchor[third] == -1).all() and (rows.weight[third] == 0).all()
    assert (rows.anchor[rows.rows // rows.shape[1] == 4] >= 0).any()
    model = attach(tiny_llama(), CONFIG, targets)
    torch.nn.init.normal_(model.sfr.head.output_proj.weight)
    out = model(**batch)
    out.loss.backward()
    assert out.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


@pytest.mark.setting("Trainer", "streaming data set")
@pytest.mark.setting("Trainer", "streaming on several processes with dispatch_batches", outcome="refused")
@pytest.mark.parametrize("kind", ["store", "online"])
def test_a_stream_under_a_stock_trainer(tmp_path, kind):
    """accelerate slices every tensor of such a batch to the batch size: targets, which are more, stay whole."""
    samples = tiny_samples(16)
    targets = store_of(tmp_path / "s", samples) if kind == "store" else online()
    histories = []
    for data in (samples, Stream(samples)):
        model = attach(tiny_llama(), CONFIG, targets)
        arguments = TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=3, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        collator = SFRCollator(CONFIG, targets, pad)
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=[SFRCallback()])
        trainer.train()
        histories.append([(h["ce_loss"], h["flow_loss"]) for h in trainer.state.log_history if "ce_loss" in h])
    assert histories[0] == histories[1] and len(histories[0]) == 3
    loader, several = trainer.get_train_dataloader(), SimpleNamespace(world_size=2, n_gpu=0, label_smoothing_factor=0.0)
    state, control = SimpleNamespace(global_step=0), None
    with pytest.raises(ValueError, match="dispatch_batches"):
        SFRCallback().on_train_begin(several, state, control, model=model, train_dataloader=loader)
    cut = collator(samples[:4])
    with pytest.raises(ValueError, match="dispatch_batches"):  # what slicing among two processes would leave
        model(**{k: v[:2] if isinstance(v, torch.Tensor) else v for k, v in cut.items()})


def test_evaluation_data_have_a_store_of_their_own(tmp_path):
    train, held = tiny_samples(8), tiny_samples(6, seed=5)
    first, second = store_of(tmp_path / "t", train), store_of(tmp_path / "e", held)
    both = TargetStore.concat([first, second])
    moved = [{**s, "sample_id": len(first) + s["sample_id"]} for s in held]
    collate = SFRCollator(CONFIG, both, pad)
    assert torch.equal(collate(train)["rows"].targets, first.lookup(range(8)))
    assert torch.equal(collate(moved)["rows"].targets, second.lookup(range(6)))
    with pytest.raises(ValueError, match="the labels of sample 0 are not those"):
        collate(held)

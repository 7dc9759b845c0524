"""`attach` on transformers models: the same cross-entropy as theirs, no logits, and nothing left behind."""

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from corpora import CONFIG, TARGET
from operations import Operations
from outcomes import assert_same, gradients
from test_own_loss import tiny_causal_lm
from tiny import BATCH, HIDDEN, PLAIN, SAMPLES, STORE, VOCAB, attached, ce_attached, pad, tiny_llama
from transformers import LlamaForSequenceClassification

from sfr_kernels import (
    LinearCrossEntropy,
    SFRLoss,
    SupervisedRows,
    VelocityHead,
    attach,
    detach,
    flow_matching_loss,
)
from sfr_kernels.evaluation.held_out import held_out_losses
from sfr_kernels.ops.flow_loss import step_seed
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.checkpoint import load_head

IDS = BATCH["input_ids"]
setting = pytest.mark.setting

# A model for each way of going from hidden states to logits; test_own_loss has many more. One tensor is qwen2's input
# and output embeddings; mixtral's loss has a router loss on top.
EXPERTS = pytest.param("mixtral", marks=setting("own loop", "router loss of a mixture of experts"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "cohere", "phi", EXPERTS])
def test_without_flow_loss_and_gradients_are_the_models_own_and_detach_leaves_nothing_behind(name):
    model = tiny_causal_lm(name)
    keys, attributes, ignored = list(model.state_dict()), set(model.__dict__), model._keys_to_ignore_on_save
    loss = model(**PLAIN).loss
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    head = VelocityHead(HIDDEN, TARGET, 24)
    attach(model, SFRLoss(CONFIG, head), targets=STORE)
    model.sfr.flow_weight = 0.0
    out = model(**BATCH)
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    assert out.aux_loss > 0 if name == "mixtral" else out.ce_loss == out.loss
    out.loss.backward()
    assert_same({name: model.get_parameter(name).grad for name in wanted}, wanted, rtol=1e-4, atol=1e-6)
    assert detach(model) is head
    assert list(model.state_dict()) == keys and set(model.__dict__) == attributes
    assert model._keys_to_ignore_on_save == ignored
    with pytest.raises(ValueError, match="no SFR objective"):
        detach(model)


@setting("own loop", "cross-entropy alone")
def test_cross_entropy_alone_takes_labels_or_rows_and_leaves_nothing_behind():
    model = tiny_causal_lm("gemma2")
    keys, attributes = list(model.state_dict()), set(model.__dict__)
    loss = model(**PLAIN, num_items_in_batch=torch.tensor(50)).loss
    for batch in (PLAIN, BATCH):  # labels, and rows made by a collator
        attach(model, objective="ce")
        out = model(**batch, num_items_in_batch=torch.tensor(50))
        torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
        assert set(out) == {"loss", "predictions"}
        assert model.generate(batch["input_ids"][:1], max_new_tokens=2, do_sample=False).shape[1] > 0
        assert detach(model) is None
        assert list(model.state_dict()) == keys and set(model.__dict__) == attributes


@setting("own loop", "shift_labels")
def test_cross_entropy_alone_takes_what_the_models_own_loss_takes():
    plain, model = tiny_llama().eval(), ce_attached().eval()
    shifted = F.pad(PLAIN["labels"], (0, 1), value=-100)[:, 1:].clone()
    shifted[:, ::2] = -100  # not what labels say: as padding-free collators send them
    zero = PLAIN["labels"].masked_fill(PLAIN["labels"] == -100, 0)
    for options in (dict(shift_labels=shifted), dict(labels=zero, ignore_index=0)):
        batch = {**PLAIN, **options}
        torch.testing.assert_close(model(**batch).loss, plain(**batch).loss, rtol=1e-5, atol=1e-6)
    for name, value in dict(targets=BATCH["rows"].targets, seed=3, times=torch.rand(4)).items():
        with pytest.raises(ValueError, match=name):
            model(**PLAIN, **{name: value})
    unsigned = IDS.to(torch.uint8)  # which has no −100
    assert torch.equal(model(**{**PLAIN, "labels": unsigned}).loss, model(**{**PLAIN, "labels": unsigned.long()}).loss)
    detach(model)
    attach(model, LinearCrossEntropy(ignore_index=0), objective="ce")
    out = model(**{**PLAIN, "labels": zero})
    torch.testing.assert_close(out.loss, plain(**PLAIN).loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(out.predictions, ce_attached().eval()(**PLAIN).predictions)


def test_cross_entropy_alone_takes_the_options_of_its_module(tmp_path):
    model = tiny_llama().eval()
    wanted = model(**PLAIN).loss
    attach(model, LinearCrossEntropy(chunk_rows=5, accum_dtype=torch.float32), objective="ce")
    model(**PLAIN)  # before which nothing is known of its logits
    with Operations() as seen:
        torch.testing.assert_close(model(**PLAIN).loss, wanted, rtol=1e-5, atol=1e-6)
    assert max(torch.Size(s).numel() // VOCAB for s in seen.shapes if len(s) == 2 and s[-1] == VOCAB) == 5
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("sfr_*"))
    detach(model)
    weighted = LinearCrossEntropy(class_weight=torch.ones(VOCAB))
    for error, match, arguments in [
        (ValueError, "objective", dict(objective="mse")),
        (ValueError, "targets", dict(objective="ce", targets=STORE)),
        (TypeError, "head_or_config", dict(objective="ce", head_or_config=CONFIG)),
        (TypeError, "head_or_config", dict(targets=STORE)),
        (ValueError, "reduction", dict(objective="ce", head_or_config=LinearCrossEntropy(reduction="sum"))),
        (ValueError, "softcap", dict(objective="ce", head_or_config=LinearCrossEntropy(softcap=3.0))),
        (ValueError, "vocab_start", dict(objective="ce", head_or_config=LinearCrossEntropy(vocab_start=3))),
        (ValueError, "class_weight", dict(objective="ce", head_or_config=weighted)),
    ]:
        with pytest.raises(error, match=match):
            attach(model, **arguments)


def test_no_logits_of_all_tokens_are_made():
    model = attach(tiny_llama(vocab_size=701, max_position_embeddings=4096), CONFIG, target_size=TARGET)
    labels = torch.randint(3, 701, (1, 3001))
    rows = SupervisedRows.from_labels(labels, CONFIG)
    targets = F.normalize(torch.randn(rows.num_anchors, TARGET), dim=1)
    with Operations() as seen:
        out = model(input_ids=labels, labels=labels, rows=rows, targets=targets)
        out.loss.backward()
    assert "logits" not in out
    rows_of_logits = [torch.Size(s).numel() // 701 for s in seen.shapes if len(s) > 1 and s[-1] == 701]
    assert 0 < max(rows_of_logits) <= 1024  # a chunk, of 3000 rows


def test_noise_is_that_of_the_optimizers_step_and_always_the_same_in_evaluation():
    model = attached(STORE, std=1.0)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.0) for part in (model.model, model.sfr)]
    flows = []
    for _ in range(3):
        micro_batches = [model(**BATCH) for _ in range(2)]
        assert micro_batches[0].flow_loss == micro_batches[1].flow_loss
        micro_batches[0].loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        flows.append(micro_batches[0].flow_loss)
    assert len({f.item() for f in flows}) == 3 and model.sfr.step == 3
    model.sfr.step = 1
    assert model(**BATCH).flow_loss == flows[1]
    assert model(**BATCH, seed=step_seed(CONFIG.seed, 2)).flow_loss == flows[2]
    model.eval()
    assert model(**BATCH).flow_loss == model(**BATCH, seed=step_seed(CONFIG.seed, -1)).flow_loss


def test_hooks_that_an_engine_adds_after_attach_are_part_of_the_loss():
    model, seen = ce_attached().eval(), []
    wanted = model(**PLAIN).loss

    def hook(module, args, out):
        out = out.clone()
        if out.requires_grad:
            out.register_hook(lambda grad: seen.append(grad.shape))
        return out

    handle = model.lm_head.register_forward_hook(hook)
    loss = model(**PLAIN).loss
    loss.backward()
    assert torch.equal(loss, wanted) and seen == [(1, 1, 1)]
    assert model(input_ids=IDS).logits.shape[-1] == VOCAB
    detach(model)
    handle.remove()
    assert not model.lm_head._forward_hooks


@setting("own loop", "save_pretrained")
def test_saving_writes_the_plain_model_and_the_head_beside_it(tmp_path):
    wanted, model = tiny_llama().eval()(input_ids=IDS).logits, attached(STORE, std=1.0)
    model.save_pretrained(tmp_path)
    loss = load_head(tmp_path)
    assert loss.config == CONFIG
    assert_same(loss.head, model.sfr.head)
    script = (
        "import sys; sys.modules['sfr_kernels'] = None\n"  # importing the package would fail
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, output_loading_info=True)\n"
        "assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        f"torch.save(model(input_ids=torch.tensor({BATCH['input_ids'].tolist()})).logits, {str(tmp_path / 'out')!r})\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "out", weights_only=True), wanted)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_errors_name_the_argument_and_change_nothing():
    model, quantised = tiny_llama(), tiny_llama()
    keys, attributes = list(model.state_dict()), set(model.__dict__)
    quantised.lm_head = torch.ao.nn.quantized.dynamic.Linear(4, 4)  # as torch's quantize_dynamic puts there
    for error, match, given, options in [
        (ValueError, "head is for hidden size 8", (model, VelocityHead(8, TARGET, 24)), {}),
        (ValueError, "target size 7", (model, VelocityHead(HIDDEN, 7, 24)), dict(targets=STORE)),
        (ValueError, "target_size", (model, CONFIG), {}),
        (TypeError, "head_or_config", (model, {"loss": "flow"}), {}),
        (TypeError, "targets must be a TargetStore or OnlineTargets, got str.*Store.open", (model, CONFIG, "x"), {}),
        (TypeError, "causal LM", (torch.nn.Linear(2, 2), CONFIG), {}),
        (TypeError, "no lm_head: a causal LM is needed, …ForCausalLM, got LlamaForSeq",
         (LlamaForSequenceClassification(model.config), CONFIG), dict(target_size=TARGET)),
        (TypeError, r"be a torch\.nn\.Linear, got torch\.ao\.nn\.quantized\.dynamic\..*\.Linear",
         (quantised, CONFIG), dict(target_size=TARGET)),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            attach(*given, **options)
    assert list(model.state_dict()) == keys and set(model.__dict__) == attributes
    attach(model, CONFIG, targets=STORE)
    with pytest.raises(ValueError, match="already"):
        attach(model, CONFIG, targets=STORE)
    targets = BATCH["rows"].targets
    for match, batch in {
        "targets must be given": PLAIN,
        "target size": {**BATCH, "targets": targets[:, :5]},
        "NaN": {**BATCH, "targets": targets * float("nan")},
        "labels": {**BATCH, "labels": BATCH["labels"][:, 1:]},
    }.items():
        with pytest.raises(ValueError, match=match):
            model(**batch)


def test_labels_outside_the_vocabulary_are_refused():
    model = attached(None, replace(CONFIG, loss="mtp"))
    labels = PLAIN["labels"].clone()
    labels[0, -1] = labels[3, 5] = VOCAB
    with pytest.raises(ValueError, match=f"labels must be in .0, {VOCAB}."):
        model(input_ids=IDS, labels=labels)


@setting("own loop", "SFRConfig(loss=…) other than flow")
@pytest.mark.parametrize("loss", ["mse", "cosine", "cka", "mtp"])
def test_every_objective_trains(loss):
    config = replace(CONFIG, loss=loss, **dict(segment="response", segment_tokens=0) if loss == "cka" else {})
    store = None if loss == "mtp" else tiny.tiny_store(SAMPLES, config)
    model = attached(store, config)
    batch = SFRCollator(config, store, pad)(SAMPLES)
    optimizer, values = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(20):
        out = model(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(out.flow_loss.item())
    assert values[-1] < 0.95 * values[0]


def by_kind(count, seed, kinds=4):
    """Responses of a few kinds: the target of each is its kind's direction, and so is its hidden state."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(TARGET, TARGET, generator=torch.Generator().manual_seed(9)))[0]
    for i in range(count):
        batch = pad(tiny.tiny_samples(8, seed=seed * 1000 + i))
        batch["rows"] = SupervisedRows.from_labels(batch["labels"], CONFIG)
        kind = torch.randint(kinds, (8,), generator=generator)
        sequence = batch["rows"].segments[:, 0] // batch["labels"].shape[1]
        batch["rows"].targets = directions[kind[sequence]]
        hidden = torch.zeros(*batch["labels"].shape, HIDDEN)
        hidden[..., :TARGET] = 40 * directions[kind][:, None]
        yield batch | {"hidden": hidden}


def held_out_flow_loss(sight: float) -> float:
    """Of a head that was trained on `sight` times the hidden states."""
    torch.manual_seed(0)
    head = VelocityHead.from_config(CONFIG, HIDDEN, TARGET)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)

    def loss_of(batch, seed):
        rows = batch["rows"]
        return flow_matching_loss(sight * batch["hidden"], head, rows, rows.targets, seed=seed, config=CONFIG)

    for step, batch in enumerate(by_kind(120, seed=1)):
        loss_of(batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(loss_of(batch, 1000).item() for batch in by_kind(4, seed=2)) / 4


def test_a_head_that_sees_the_hidden_states_beats_one_that_cannot():
    """Four equally likely directions: what h tells is worth far more than what training leaves to chance."""
    blind = held_out_flow_loss(0.0)
    assert held_out_flow_loss(1.0) < 0.9 * blind
    assert blind < 2.0  # it has learned to cancel the noise: an untrained head has E|u|² = 2


def test_held_out_losses_are_means_over_tokens_whatever_the_batches():
    held = list(by_kind(2, seed=3))
    model = attach(tiny_llama(), CONFIG, target_size=TARGET)
    batch = [{k: v for k, v in b.items() if k != "hidden"} for b in held]
    both = held_out_losses(model, batch, torch.device("cpu"))
    each = [held_out_losses(model, [b], torch.device("cpu")) for b in batch]
    tokens = [b["rows"].num_ce for b in batch]
    for name in ("ce_loss", "flow_loss"):
        mean = sum(e[name] * n for e, n in zip(each, tokens, strict=True)) / sum(tokens)
        assert both[name] == pytest.approx(mean, rel=1e-6)
    assert model.training

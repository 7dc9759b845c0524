"""Multi-token prediction: parallel MTP in a loop, the degenerate case of the flow loss, and an objective."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import LossCase, assert_same, evaluate, make_case, make_labels, our_sfr, sfr_output, small_config
from corpora import CONFIG
from tiny import HIDDEN, SAMPLES, STORE, TARGET, pad, tiny_llama
from torch import Tensor

from sfr_kernels import SFRConfig, SFRLoss, SupervisedRows, VelocityHead, attach, flow_matching_loss
from sfr_kernels.kernels.flow import FlowPath, flow_path
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.checkpoint import load_head, restore_head, save_head

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_head(head: VelocityHead, h: Tensor) -> Tensor:
    """head(0, 0, h) of one h by torch's own layers. The sinusoid at t = 0 is zeros and ones."""
    size = head.shape.target_size
    tau = head.time_embed.mlp(torch.cat([h.new_zeros(size // 2), h.new_ones(size // 2)]))
    h = F.rms_norm(h, h.shape, eps=1e-6)
    a = head.input_proj(torch.cat([h.new_zeros(size), tau, head.shape.hidden_scale * h]))
    for block in head.res_blocks:
        a = a + F.silu(block.norm(block.linear(a)))
    return head.output_proj(a)


def parallel_mtp(
    labels: list, segments: list, real: list, x: SimpleNamespace, count: int, flow_weight: float
) -> Tensor:
    """CE(p + 1) + flow_weight · mean over the offsets 2 … count + 1 of the weighted CE of the head's slices."""
    size = x.hidden.shape[-1]
    ce, total, of_offset = 0.0, 0, [x.hidden.sum() * 0] * count
    for b, row in enumerate(labels):
        length = len(row)
        is_row = [
            p + 1 < length and row[p + 1] != -100 and segments[b][p] == segments[b][p + 1] and bool(real[b][p])
            for p in range(length)
        ]
        for p in range(length):
            if not is_row[p]:
                continue
            first, last = p, p  # of the response
            while first > 0 and is_row[first - 1]:
                first -= 1
            while is_row[last + 1]:
                last += 1
            weight = torch.tensor(2 * (last + 1 - p) / (last - first + 2), dtype=torch.float32)
            h = x.hidden[b, p]
            ce = ce + F.cross_entropy(F.linear(h, x.weight, x.bias), torch.tensor(row[p + 1]))
            total += 1
            v = plain_head(x.head, h)
            for j in range(2, count + 2):
                if p + j - 1 <= last:
                    logits = F.linear(v[(j - 2) * size : (j - 1) * size], x.weight, x.bias)
                    of_offset[j - 2] = of_offset[j - 2] + weight * F.cross_entropy(logits, torch.tensor(row[p + j]))
    return ce / total + flow_weight * torch.stack(of_offset).mean() / total


def padded_case(count: int) -> tuple[LossCase, tuple[list, list, list]]:
    """The responses of `make_labels`, two of them packed, and one behind padding on the left; and its labels, segments
    and mask."""
    (labels, segments), config = make_labels(), small_config(loss="mtp", mtp_tokens=count, flow_weight=0.6)
    real = torch.ones_like(labels)
    labels[1, 4:], labels[1, :4], real[1, :4] = torch.arange(9), -100, 0
    case = make_case(config, labels=labels, segments=segments)
    case.rows = SupervisedRows.from_labels(labels, config, segments, real=real)
    case.targets = case.rows.labels
    return case, (labels.tolist(), segments.tolist(), real.tolist())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("count", [1, 3, 14])  # 14: further ahead than any response is long
def test_it_is_parallel_multi_token_prediction(count, backend):
    case, batch = padded_case(count)
    exact = evaluate(lambda x: parallel_mtp(*batch, x, count, 0.6), case.inputs(), upstream=-1.7)
    assert_same(evaluate(our_sfr(case, backend=backend), case.inputs(), upstream=-1.7), exact)
    assert exact["output_proj.weight"].any() and exact["hidden"][1, 4].any() and not exact["hidden"][1, 3].any()


def test_rows_do_not_depend_on_the_number_of_tokens():
    labels, segments = make_labels()
    one, three = (SFRConfig(loss="mtp", mtp_tokens=count) for count in (1, 3))
    rows = SupervisedRows.from_labels(labels, one, segments)
    rows.check_rules(three)
    others = vars(SupervisedRows.from_labels(labels, three, segments))
    assert all(torch.equal(value, others[name]) for name, value in vars(rows).items() if isinstance(value, Tensor))


@pytest.mark.parametrize("count", [1, 3])
def test_it_is_the_flow_loss_of_a_point_a_token_and_a_one_hot_encoder(count):
    """The rows of "mse", with an anchor in each and a token in each segment; source_std = 0 and t = 0; target one-hot.
    What differs is Σ (u − v)², which becomes −Σ u log softmax v; and the head that stands for each offset."""
    labels, segments = make_labels()
    config = small_config(loss="mse", stride=1, segment_tokens=1, min_tokens=1)
    rows, (vocab, hidden_size) = SupervisedRows.from_labels(labels, config, segments), (17, 12)
    assert ((rows.segments[:, 1] - rows.segments[:, 0]) == 1).all() and rows.num_flow == len(rows)
    one_hot = F.one_hot(labels.flatten()[rows.segments[:, 0]], vocab).float()
    case = make_case(replace(config, loss="mtp", mtp_tokens=count), labels=labels, segments=segments)
    case.head = VelocityHead(hidden_size, vocab, 10, 4, hidden_scale=0.3, output_size=count * hidden_size).double()
    torch.nn.init.normal_(case.head.output_proj.weight)

    def degenerate(x):
        losses = []
        for j in range(count):
            ahead = torch.arange(len(rows))
            for _ in range(j + 1):  # the anchor of the next row of the response, and so on
                following = torch.cat([rows.token_row.long(), torch.tensor([-1])])[rows.rows[ahead] + 1]
                ahead = torch.where(ahead < 0, ahead, following)
            r = (ahead >= 0).nonzero().squeeze(1)
            path = FlowPath(
                one_hot, torch.zeros(1), rows.noise_id[r], rows.anchor[ahead[r]], torch.zeros_like(rows.anchor[r]),
                torch.tensor([case.seed]), target_scale=1.0, source_std=0.0,
            )  # fmt: skip
            x_t, u = flow_path("torch", path, torch.float64)
            assert not x_t.any()
            v = x.head(x_t, 0.0, x.hidden.flatten(0, 1)[rows.rows[r]])[:, j * hidden_size : (j + 1) * hidden_size]
            log_softmax = F.linear(v, x.weight, x.bias).log_softmax(1)
            losses.append((rows.weight[r] * -(u * log_softmax).sum(1)).sum() / rows.num_ce)
        return torch.stack(losses).mean()

    def ours(x):
        zero = sfr_output(case, x, flow_weight=0.0).loss
        return sfr_output(case, x, flow_weight=1.0).loss - zero

    assert_same(evaluate(ours, case.inputs()), evaluate(degenerate, case.inputs()))


def test_a_head_has_no_time_embedding_of_the_size_of_its_output():
    config = SFRConfig(loss="mtp", mtp_tokens=4, width=16)
    head = VelocityHead.from_config(config, 96)
    sizes = {name: p.numel() for name, p in head.named_parameters()}
    assert sizes["output_proj.weight"] == 4 * 96 * 16
    assert sum(size for name, size in sizes.items() if name.startswith("time_embed")) < 1000
    v = head(torch.zeros(5, head.shape.target_size), 0.0, torch.randn(5, 96))
    assert v.shape == (5, 4 * 96)


ONE = SFRConfig(loss="mtp")
HEADS = {
    "target_size must be None": lambda: VelocityHead.from_config(ONE, HIDDEN, 6),
    "target_size must be given": lambda: VelocityHead.from_config(SFRConfig(), HIDDEN),
    "output_size must be": lambda: VelocityHead(4, 4, output_size=0),
    "output size 64, mtp_tokens=2": lambda: SFRLoss(replace(ONE, mtp_tokens=2), VelocityHead.from_config(ONE, HIDDEN)),
    "output size 8, a velocity": lambda: SFRLoss(SFRConfig(), VelocityHead.from_config(ONE, HIDDEN)),
}


@pytest.mark.parametrize("message", HEADS)
def test_a_head_of_another_size_is_refused(message):
    with pytest.raises(ValueError, match=message):
        HEADS[message]()


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine"])
def test_no_flow_loss_takes_a_head_whose_output_is_no_velocity(loss):
    case = make_case(small_config(loss=loss))
    case.head = VelocityHead(12, 6, 10, 4, hidden_scale=0.3, output_size=12).double()
    x = case.inputs()
    for call in (
        lambda: sfr_output(case, x),
        lambda: flow_matching_loss(x.hidden, x.head, case.rows, case.targets, seed=0, config=case.config),
    ):
        with pytest.raises(ValueError, match="output size 6, a velocity"):
            call()


def test_a_saved_head_comes_back(tmp_path):
    config = SFRConfig(loss="mtp", mtp_tokens=2, width=8)
    loss, other = (SFRLoss(config, VelocityHead.from_config(config, HIDDEN)) for _ in range(2))
    torch.nn.init.normal_(loss.head.output_proj.weight)
    save_head(tmp_path, loss)
    found = load_head(tmp_path)
    restore_head(tmp_path, other, "")
    assert found.config == config and found.head.shape == loss.head.shape
    for name, p in loss.head.state_dict().items():
        assert torch.equal(found.head.state_dict()[name], p) and torch.equal(other.head.state_dict()[name], p)
    assert attach(tiny_llama(), found, objective="mtp").sfr.head is found.head


@pytest.mark.parametrize("loss, size", [("flow", 6), ("mtp", HIDDEN)])
def test_what_earlier_versions_saved_loads(tmp_path, loss, size):
    config = SFRConfig(loss=loss, width=8, hidden_norm="none", hidden_scale=0.0625)
    save_head(tmp_path, SFRLoss(config, VelocityHead(HIDDEN, size, 8, hidden_scale=0.0625, hidden_norm="none")))
    saved = json.loads((tmp_path / "sfr_config.json").read_text())
    del saved["head"]["output_size"], saved["config"]["mtp_tokens"]
    del saved["head"]["hidden_norm"], saved["config"]["hidden_norm"]

    def loaded(offset):
        saved["config"]["mtp_offset"] = offset
        (tmp_path / "sfr_config.json").write_text(json.dumps(saved))
        return load_head(tmp_path)

    found = loaded(2)
    assert found.config == config and found.head.shape.output_size == size
    if loss == "mtp":
        with pytest.raises(ValueError, match="mtp_offset=3"):
            loaded(3)
    else:
        assert loaded(3).config == config


def losses_by_offset(model, batch) -> list[float]:
    """Of each of the head's slices, unweighted, by the plain model's own layers."""
    head, labels = model.sfr.head, batch["labels"].tolist()
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    found: list[list[Tensor]] = [[] for _ in range(head.shape.output_size // HIDDEN)]
    for b, row in enumerate(labels):
        for p in range(len(row) - 1):
            if row[p + 1] == -100:
                continue
            for j, v in enumerate(plain_head(head, hidden[b, p]).split(HIDDEN)):
                if p + j + 2 < len(row) and row[p + j + 2] != -100:
                    found[j].append(F.cross_entropy(F.linear(v, model.lm_head.weight), torch.tensor(row[p + j + 2])))
    return [torch.stack(of_offset).mean().item() for of_offset in found]


def test_a_few_steps_lower_the_loss_at_every_offset():
    model = attach(tiny_llama(), replace(CONFIG, mtp_tokens=3), objective="mtp")
    assert model.sfr.config == replace(CONFIG, loss="mtp", mtp_tokens=3)
    batch = SFRCollator(model.sfr.config, None, pad)(SAMPLES)
    with torch.no_grad():
        before = losses_by_offset(model, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(10):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = losses_by_offset(model, batch)
    assert len(after) == 3 and all(b < 0.97 * a for a, b in zip(before, after, strict=True))


def test_the_objective_is_the_config_with_that_loss():
    batch, given = SFRCollator(replace(CONFIG, loss="mtp"), None, pad)(SAMPLES), replace(CONFIG, loss="mtp")
    torch.manual_seed(1)
    one = attach(tiny_llama(), CONFIG, objective="mtp")
    other = attach(tiny_llama(), given)
    other.sfr.head.load_state_dict(one.sfr.head.state_dict())
    for model in (one, other):
        torch.nn.init.ones_(model.sfr.head.output_proj.weight)
    assert torch.equal(one(**batch).loss, other(**batch).loss)
    assert attach(tiny_llama(), objective="mtp").sfr.config == ONE


WRONG = {
    "targets have no meaning with objective='mtp'": dict(targets=STORE),
    "target_size must be None": dict(target_size=TARGET),
    "target_rule must be 'following'": dict(head_or_config=SFRConfig.official()),
    "head_or_config must have loss='mtp'": dict(
        head_or_config=SFRLoss(CONFIG, VelocityHead.from_config(CONFIG, HIDDEN, TARGET))
    ),
    "head_or_config must be SFRConfig or SFRLoss or None": dict(
        head_or_config=VelocityHead.from_config(CONFIG, HIDDEN, TARGET)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_go_with_the_objective_is_refused(message):
    model = tiny_llama()
    with pytest.raises((ValueError, TypeError), match=message):
        attach(model, **WRONG[message], objective="mtp")
    assert not hasattr(model, "sfr")

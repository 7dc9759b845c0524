"""The yardstick of the flow loss: a head that cannot see the hidden states."""

import pytest
import torch
from tiny import CONFIG, pad, tiny_llama, tiny_samples

from sfr_kernels import SupervisedRows, attach
from sfr_kernels.evaluation.held_out import frozen_flow_loss, held_out_losses
from sfr_kernels.ops.times import step_seed

KINDS, SIZE, HIDDEN = 4, 12, 32


def batches(count, seed):
    """Responses of a few kinds: the target of each is its kind's direction, and so is its hidden state."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(9)))[0][:KINDS]
    for i in range(count):
        batch = pad(tiny_samples(8, seed=seed * 1000 + i))
        batch["rows"] = SupervisedRows.from_labels(batch["labels"], CONFIG)
        kind = torch.randint(KINDS, (8,), generator=generator)
        sequence = batch["rows"].segments[:, 0] // batch["labels"].shape[1]
        batch["rows"].targets = directions[kind[sequence]]
        hidden = torch.zeros(*batch["labels"].shape, HIDDEN)
        hidden[..., :SIZE] = 40 * directions[kind][:, None]
        yield batch | {"hidden": hidden}


def test_a_head_that_sees_beats_one_that_cannot():
    """Four equally likely directions: what h tells is worth far more than what training leaves to chance."""
    held = list(batches(4, seed=2))
    loss = {
        name: frozen_flow_loss(CONFIG, hidden_of, batches(120, seed=1), held, 120, 3e-3, 5, torch.device("cpu"))
        for name, hidden_of in (("sees", lambda b: b["hidden"]), ("blind", lambda b: torch.zeros_like(b["hidden"])))
    }
    assert loss["sees"] < 0.9 * loss["blind"]
    assert loss["blind"] < 2.0  # it has learned to cancel the noise: an untrained head has E|u|² = 2


def test_held_out_losses_are_means_over_tokens_whatever_the_batches():
    held = list(batches(2, seed=3))
    model = tiny_llama()
    attach(model, CONFIG, target_size=SIZE)
    batch = [{k: v for k, v in b.items() if k != "hidden"} for b in held]
    both = held_out_losses(model, batch, torch.device("cpu"))
    each = [held_out_losses(model, [b], torch.device("cpu")) for b in batch]
    tokens = [b["rows"].num_ce for b in batch]
    for name in ("ce_loss", "flow_loss"):
        mean = sum(e[name] * n for e, n in zip(each, tokens, strict=True)) / sum(tokens)
        assert both[name] == pytest.approx(mean, rel=1e-6)
    assert model.training
    assert step_seed(0, -1) != step_seed(0, 0)

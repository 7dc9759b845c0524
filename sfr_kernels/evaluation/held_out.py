"""Losses on held-out samples, and the flow loss of a head that cannot see the hidden states.

The flow loss alone says little: part of it is noise that no head can predict. How much the hidden states tell is seen
from a head of the same size, trained as long on the same targets, that is given zeros in their place.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_scheduler

from ..config import SFRConfig
from ..modules import VelocityHead
from ..ops import flow_matching_loss
from ..ops.flow_loss import step_seed
from ..rows import IGNORE_INDEX


@torch.no_grad()
def held_out_losses(model: nn.Module, batches: Iterable[dict], device: torch.device) -> dict[str, float]:
    """Mean cross-entropy per supervised token, and L_flow if the model has an SFR objective."""
    training = model.training
    model.eval()
    totals, tokens = {}, 0
    for batch in batches:
        rows, labels = batch.get("rows"), batch["labels"]
        count = int((labels[:, 1:] != IGNORE_INDEX).sum()) if rows is None else rows.num_ce
        out = model(**{k: v.to(device) for k, v in batch.items()})
        tokens += count
        for name, loss in (("ce_loss", out.get("ce_loss", out.loss)), ("flow_loss", out.get("flow_loss"))):
            if loss is not None:
                totals[name] = totals.get(name, 0.0) + loss.item() * count
    model.train(training)
    return {name: total / max(tokens, 1) for name, total in totals.items()}


def frozen_flow_loss(
    config: SFRConfig,
    hidden_of: Callable[[dict], Tensor],  # the hidden states (B, L, H) of a batch; zeros make the head blind
    train_batches: Iterable[dict],  # one a step
    held_out_batches: Iterable[dict],
    steps: int,
    learning_rate: float,
    warmup: int,
    device: torch.device,
) -> float:
    """L_flow on held-out samples of a new head, trained on frozen hidden states. It is trained as the `train` command
    trains its head: AdamW, linear decay after `warmup` steps, clipping at 1."""

    def loss_of(batch, seed):
        rows, hidden = batch["rows"].to(device), hidden_of(batch).to(device)
        return flow_matching_loss(hidden, head, rows, rows.targets, seed=seed, config=config), rows.num_ce

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        first = next(iter(held_out_batches))
        head = VelocityHead.from_config(config, hidden_of(first).shape[-1], first["rows"].targets.shape[1]).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        for step, batch in enumerate(tqdm(train_batches, total=steps, desc="blind head", unit="step")):
            loss_of(batch, step_seed(config.seed, step))[0].backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in held_out_batches:
                loss, count = loss_of(batch, step_seed(config.seed, -1))
                total, tokens = total + loss.item() * count, tokens + count
    return total / max(tokens, 1)

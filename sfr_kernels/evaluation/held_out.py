"""Losses on held-out samples."""

from collections.abc import Iterable

import torch
from torch import nn

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

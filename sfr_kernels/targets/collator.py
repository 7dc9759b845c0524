"""`SFRCollator`: wraps the collator people have, and adds what the SFR loss needs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import SFRConfig
from ..rows import SupervisedRows
from .store import TargetStore


class SFRCollator:
    """Batches of the wrapped collator, plus `rows` (SupervisedRows) and `targets` (A, d).

    Features carry "sample_id", their index in the store; it also makes the noise of a row independent of batching,
    padding, packing and ranks. The wrapped collator may pad (attention_mask) or pack (position_ids that restart), but
    must keep the samples in order and whole.
    """

    def __init__(
        self,
        config: SFRConfig,
        targets: TargetStore | None,  # None for losses without an encoder ("mtp")
        collator: Callable[[list[dict]], dict[str, Any]],
    ):
        if targets is None and config.loss != "mtp":
            raise ValueError(f"targets must be a TargetStore for loss={config.loss!r}")
        self.config, self.targets, self.collator = config, targets, collator

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        features = [dict(feature) for feature in features]
        try:
            sample_ids = [int(feature.pop("sample_id")) for feature in features]
        except KeyError:
            raise ValueError(
                "features have no 'sample_id', the index of the sample in the target store. With a Trainer, attach "
                "the model first or set remove_unused_columns=False, so that the column reaches the collator"
            ) from None
        batch = dict(self.collator(features))
        return batch | sfr_inputs(batch, sample_ids, self.config, self.targets)


def sfr_inputs(
    batch: dict[str, Any],  # with "labels", and "attention_mask" or "position_ids" where samples are padded or packed
    sample_ids: list[int],
    config: SFRConfig,
    store: TargetStore | None,
) -> dict[str, Any]:
    """`rows` and `targets` of a batch whose samples are `sample_ids`, in order."""
    labels = batch["labels"]
    sample, position, segment_ids = _token_identity(batch, sample_ids)
    rows = SupervisedRows.from_labels(labels, config, segment_ids, noise_id=sample * 2**32 + position)
    if config.loss == "mtp":
        return {"rows": rows, "targets": rows.labels}
    targets = store.lookup(sample_ids).to(labels.device)
    if targets.shape[0] != rows.num_anchors:
        raise ValueError(
            f"the batch has {rows.num_anchors} anchors, its samples {targets.shape[0]} in the store: labels were cut, "
            "reordered or masked differently after the targets were built, or the config's segments differ"
        )
    return {"rows": rows, "targets": targets}


def _token_identity(batch: dict[str, Any], sample_ids: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each token (B, L): its sample, its position there, and its segment where samples are packed."""
    labels = batch["labels"]
    identity = torch.tensor(sample_ids, dtype=torch.int64, device=labels.device)
    if labels.shape[0] == len(sample_ids):
        mask = batch.get("attention_mask")
        mask = torch.ones_like(labels) if mask is None else mask
        return identity[:, None].expand(labels.shape), (mask.long().cumsum(1) - 1).clamp(min=0), None
    positions = batch.get("position_ids")
    if positions is None:
        raise ValueError(f"{len(sample_ids)} samples in {labels.shape[0]} packed rows need position_ids that restart")
    segment = (positions == 0).reshape(-1).long().cumsum(0) - 1
    if int(segment[-1]) + 1 != len(sample_ids):
        raise ValueError(f"position_ids restart {int(segment[-1]) + 1} times for {len(sample_ids)} samples")
    segment = segment.view(labels.shape)
    return identity[segment], positions.long(), segment

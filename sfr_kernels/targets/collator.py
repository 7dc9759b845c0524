"""`SFRCollator`: wraps the collator people have, and adds what the SFR loss needs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import SFRConfig
from ..rows import SupervisedRows
from .online import OnlineTargets
from .segments import hash_labels
from .store import NO_TARGETS, TargetStore


class SFRCollator:
    """Batches of the wrapped collator, plus `rows` (SupervisedRows) and `targets` (A, d).

    Features carry "sample_id", their index in the store; it also makes the noise of a row independent of batching,
    padding, packing and ranks. One whose id is None or −1 trains on cross-entropy alone. The wrapped collator may pad
    (attention_mask) or pack (position_ids that restart), but must keep the samples in order and whole.

    With OnlineTargets, `targets` are the A texts, which the attached model embeds; a sample without "sample_id" then
    has the noise of its place in the batch.

    The seed is that of the step, which a collator in another process cannot know: the attached model makes it. For a
    loop of one's own `seed` is asked at each batch, and its answer added as a (1,) int64 tensor. The times of a step
    follow from its seed on the device (`times=None` of the losses).
    """

    def __init__(
        self,
        config: SFRConfig,
        targets: TargetStore | OnlineTargets | None,  # None for losses without an encoder ("mtp")
        collator: Callable[[list[dict]], dict[str, Any]],
        *,
        seed: Callable[[], int] | None = None,  # for example lambda: step_seed(config.seed, step)
    ):
        if config.loss == "mtp":
            targets = None
        elif targets is None:
            raise ValueError(f"targets must be a TargetStore or OnlineTargets for loss={config.loss!r}")
        else:
            targets.check(config)
        self.config, self.targets, self.collator, self.seed = config, targets, collator, seed

    def __getstate__(self) -> dict:
        # A dataloader's worker makes texts, and has no use for the encoder.
        targets = copy.copy(self.targets)
        if isinstance(targets, OnlineTargets):
            targets.encoder = None
        return self.__dict__ | {"targets": targets}

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        features = [dict(feature) for feature in features]
        online = isinstance(self.targets, OnlineTargets)
        if not online and not all("sample_id" in feature for feature in features):
            raise ValueError(
                "features have no 'sample_id', the index of the sample in the target store. With a Trainer, attach "
                "the model first or set remove_unused_columns=False, so that the column reaches the collator"
            )
        named = all("sample_id" in feature for feature in features)
        ids = [feature.pop("sample_id", None) for feature in features]
        ids = [NO_TARGETS if i is None else int(i) for i in ids] if named else None
        lengths = [len(feature["input_ids"]) for feature in features]
        batch = dict(self.collator(features))
        found = sfr_inputs(batch, ids, self.config, self.targets, lengths)
        if self.seed is not None:
            found["seed"] = torch.tensor([self.seed()], dtype=torch.int64)
        return batch | found


def sfr_inputs(
    batch: dict[str, Any],  # with "labels", and "attention_mask" or "position_ids" where samples are padded or packed
    sample_ids: list[int] | None,  # in order; −1: no targets. None, with OnlineTargets: they have no identity
    config: SFRConfig,
    targets: TargetStore | OnlineTargets | None,
    lengths: list[int] | None = None,  # tokens of each sample; needed where samples that are packed hold several
) -> dict[str, Any]:
    """`rows` and `targets` of a batch. ValueError if its labels are not those the targets were made of."""
    labels = batch["labels"]
    count = next((len(x) for x in (sample_ids, lengths) if x is not None), labels.shape[0])
    sample, position, first = _token_identity(batch, count, lengths)
    ids = None if sample_ids is None else torch.tensor(sample_ids, dtype=torch.int64, device=labels.device)
    if ids is not None:
        ids = ids.index_select(0, sample.reshape(-1)).view(sample.shape)
    packed = "position_ids" in batch or labels.shape[0] != count
    rows = SupervisedRows.from_labels(
        labels,
        config,
        segment_ids=first.reshape(-1).cumsum(0).view(labels.shape) if packed else None,
        noise_id=None if ids is None else (ids.clamp(min=0) << 32) + position,
        has_targets=(ids >= 0).int().expand(labels.shape) if NO_TARGETS in (sample_ids or ()) else None,
    )
    if config.loss == "mtp":
        return {"rows": rows, "targets": rows.labels}
    if isinstance(targets, OnlineTargets):
        return {"rows": rows, "targets": targets.texts(labels, rows, config)}
    if (wanted := targets.label_hashes(sample_ids)) is not None:
        found = hash_labels(labels.long(), position, sample, first, count, config).tolist()
        for i, a, b in zip(sample_ids, found, wanted, strict=True):
            if a != b and i != NO_TARGETS:
                raise ValueError(
                    f"the labels of sample {i} are not those its targets were made of: they were cut, masked or "
                    "tokenized differently, or sample_id is not the sample's index in the store"
                )
    embeddings = targets.lookup(sample_ids).to(labels.device)
    if embeddings.shape[0] != rows.num_anchors:
        raise ValueError(
            f"the batch has {rows.num_anchors} anchors, its samples {embeddings.shape[0]} in the store: labels were "
            "cut, reordered or masked differently after the targets were built, or the config's segments differ"
        )
    return {"rows": rows, "targets": embeddings}


def _token_identity(batch: dict[str, Any], count: int, lengths: list[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: its sample (B, L) or (B, 1), its position there, and whether it begins a sample or one packed
    into it."""
    labels, positions = batch["labels"], batch.get("position_ids")
    device = labels.device
    if labels.shape[0] == count:
        mask = batch.get("attention_mask")
        sample = torch.arange(count, device=device)[:, None]
        if mask is None or mask.dim() != 2:
            position = torch.arange(labels.shape[1], device=device).expand(labels.shape)
        else:
            position = (mask.long().cumsum(1) - 1).clamp_(min=0)
        first = position == 0
        return sample, position, first if positions is None else first | (positions == 0)
    if positions is None:
        raise ValueError(f"{count} samples in {labels.shape[0]} packed rows need position_ids that restart")
    restarts = (positions == 0).reshape(-1)
    if lengths is None or len(lengths) != count:
        sample = restarts.long().cumsum(0) - 1
        if int(sample[-1]) + 1 != count:
            raise ValueError(f"position_ids restart {int(sample[-1]) + 1} times for {count} samples")
        return sample.view(labels.shape), positions.long(), restarts.view(labels.shape)
    if sum(lengths) > labels.numel():
        raise ValueError(f"the samples have {sum(lengths)} tokens, the packed batch {labels.numel()}: some were cut")
    size = torch.tensor(lengths, device=device)
    size[-1] += labels.numel() - sum(lengths)  # padding at the end
    sample = torch.repeat_interleave(torch.arange(count, device=device), size, output_size=labels.numel())
    position = torch.arange(labels.numel(), device=device) - (size.cumsum(0) - size).index_select(0, sample)
    first = restarts | (position == 0)
    return sample.view(labels.shape), position.view(labels.shape), first.view(labels.shape)

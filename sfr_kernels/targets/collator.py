"""`SFRCollator`: wraps another collator, and adds what the SFR loss needs to its batches."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import SFRConfig
from ..rows import SupervisedRows
from .online import OnlineTargets
from .segments import hash_labels, packed_starts, rows_and_texts
from .store import NO_TARGETS, TargetStore


class SFRCollator:
    """Batches of the wrapped collator, plus `rows` (SupervisedRows), which carry their targets (A, d).

    Features need "sample_id", their index in the store; it also makes a row's noise independent of batching, padding,
    packing and ranks. A sample whose id is None or −1 trains on cross-entropy alone. The wrapped collator may pad
    (attention_mask) or pack (position_ids that restart), but must keep the samples in order and whole. A feature that
    is packed already needs "position_ids" that restart, or "seq_lengths". Evaluation data have targets in the same
    store, see `TargetStore.concat`.

    With OnlineTargets, `rows.targets` are the A texts, which the attached model embeds; without "sample_id" the noise
    of a sample then follows from its place in the batch. The attached model makes the seed from the step, which a
    collator in another process cannot know.
    """

    def __init__(
        self,
        config: SFRConfig,
        targets: TargetStore | OnlineTargets | None,  # None for losses without an encoder ("mtp")
        collator: Callable[[list[dict]], dict[str, Any]],
        *,
        seed: Callable[[], int] | None = None,  # for a loop of your own: called at each batch, added as (1,) int64
    ):
        if config.loss == "mtp":
            targets = None
        elif targets is None:
            mtp = "; objective='mtp' needs no SFRCollator" if config.loss == "flow" else ""
            raise ValueError(f"targets must be a TargetStore or OnlineTargets for loss={config.loss!r}{mtp}")
        else:
            targets.check(config)
        self.config, self.targets, self.collator, self.seed = config, targets, collator, seed

    def __getstate__(self) -> dict:
        # A dataloader's worker makes texts, and needs no encoder.
        state = dict(self.__dict__)
        if isinstance(self.targets, OnlineTargets):
            state["targets"] = copy.copy(self.targets)
            state["targets"].encoder = None
        return state

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        features = [dict(feature) for feature in features]
        named = all("sample_id" in feature for feature in features)
        if not named and any("sample_id" in feature for feature in features):
            raise ValueError("some features have a 'sample_id' and some have none: give one that has no targets None")
        if not named and not isinstance(self.targets, OnlineTargets):
            raise ValueError(
                "features have no 'sample_id', the index of the sample in the target store. With a Trainer, attach "
                "first or set remove_unused_columns=False, so that the column reaches the collator; where samples are "
                "packed, add it to the packs. If that is so, something has replaced model.forward, whose signature "
                "Trainer reads: the cross-entropy of use_liger_kernel, or TRL's SFTTrainer (use SFRTrainer)"
            )
        ids = [feature.pop("sample_id", None) for feature in features]
        ids = [NO_TARGETS if i is None else int(i) for i in ids] if named else None
        lengths = starts = None
        if all("input_ids" in feature for feature in features):  # else the wrapped collator tokenizes
            lengths = [len(feature["input_ids"]) for feature in features]
            starts = [packed_starts(feature, f"feature {i} of a batch") for i, feature in enumerate(features)]
        batch = dict(self.collator(features))
        found = sfr_inputs(batch, ids, self.config, self.targets, lengths=lengths, starts=starts)
        if self.seed is not None:
            found["seed"] = torch.tensor([self.seed()], dtype=torch.int64)
        return batch | found


def sfr_inputs(
    batch: dict[str, Any],  # with "labels", and "attention_mask" or "position_ids" where samples are padded or packed
    sample_ids: list[int] | None,  # in order; −1: no targets. None, without a store: noise by place in the batch
    config: SFRConfig,
    targets: TargetStore | OnlineTargets | None,
    *,
    lengths: list[int] | None = None,  # tokens of each sample; needed where the collator packs samples that are packs
    starts: list[list[int]] | None = None,  # of each sample, where the samples packed into it begin
) -> dict[str, Any]:
    """`rows` of a batch, with their targets. ValueError if its labels are not those the targets were made of."""
    labels = batch["labels"]
    count = next((len(x) for x in (sample_ids, lengths) if x is not None), labels.shape[0])
    sample, position, first, real = _token_identity(batch, count, lengths, starts)
    identity = {"segment_ids": first.reshape(-1).cumsum(0).view(labels.shape), "real": real}
    if sample_ids is not None:
        ids = torch.tensor(sample_ids, dtype=torch.int64, device=labels.device)
        ids = ids.index_select(0, sample.reshape(-1)).view(sample.shape)
        identity["noise_id"] = (ids.clamp(min=0) << 32) + position
        if NO_TARGETS in sample_ids:
            identity["has_targets"] = (ids >= 0).int().expand(labels.shape)
    if isinstance(targets, OnlineTargets) and config.loss != "mtp":
        identity = {name: None if x is None else x.cpu() for name, x in identity.items()}
        rows, texts = rows_and_texts(labels.cpu(), config, targets.tokenizer, **identity)
        return {"rows": rows.to(labels.device).replace(targets=texts)}
    if config.loss == "mtp" or targets is None:
        rows = SupervisedRows.from_labels(labels, config, **identity)
        return {"rows": rows.replace(targets=rows.labels) if config.loss == "mtp" else rows}
    if (wanted := targets.label_hashes(sample_ids)) is not None:
        found = hash_labels(labels.long(), position, sample, first, count, config).tolist()
        for i, a, b in zip(sample_ids, found, wanted, strict=True):
            if a != b and i != NO_TARGETS:
                raise ValueError(
                    f"the labels of sample {i} are not those its targets were made of: cut, masked or tokenized "
                    "differently, or sample_id is not its index in the store (for evaluation data: TargetStore.concat)"
                )
    embeddings, blank = targets.lookup(sample_ids).to(labels.device), targets.blank(sample_ids).to(labels.device)
    try:
        rows = SupervisedRows.from_labels(labels, config, **identity, blank=blank)
    except ValueError as error:
        raise ValueError(
            f"the batch has other anchors than its samples in the store ({error}): labels were cut, reordered or "
            "masked differently after the targets were built, or the config's segments differ"
        ) from error
    return {"rows": rows.replace(targets=embeddings)}


def _token_identity(
    batch: dict[str, Any], count: int, lengths: list[int] | None, starts: list[list[int]] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of each token: its sample (B, L) or (B, 1), its position there, whether it begins a sample or one packed into it,
    and, where there is a mask, 0 for padding and 1 for others."""
    labels, positions = batch["labels"], batch.get("position_ids")
    device = labels.device
    if positions is not None and positions.dim() == 3:
        positions = positions[0]  # a vision model has several axes: the first is that of the text
    real, padding = _real(batch.get("attention_mask"), labels, positions)
    if labels.shape[0] == count:
        sample = torch.arange(count, device=device)[:, None]
        position = torch.arange(labels.shape[1], device=device).expand(labels.shape)
        if padding is not None:
            position = (position - padding).clamp_(min=0)
        first = position == 0
        if positions is not None:
            first |= (positions == 0) if real is None else (positions == 0) & (real != 0)
    elif positions is None:
        raise ValueError(f"{count} samples in {labels.shape[0]} packed rows need position_ids that restart")
    else:
        restarts = positions.expand(labels.shape).reshape(-1) == 0
        if lengths is None or len(lengths) != count:
            sample = restarts.long().cumsum(0) - 1
            if int(sample[-1]) + 1 != count:
                raise ValueError(f"position_ids restart {int(sample[-1]) + 1} times for {count} samples")
            sample, position, first = sample.view(labels.shape), positions.long(), restarts.view(labels.shape)
        else:
            total = sum(lengths)
            if total > labels.numel():
                raise ValueError(f"the samples have {total} tokens, the packed batch {labels.numel()}: some were cut")
            if total < labels.numel() and labels.shape[0] > 1:
                raise ValueError(
                    f"the samples have {total} tokens, {labels.shape[0]} packed rows {labels.numel()}: each row is "
                    "padded, and by how much is unknown; pack a batch into one row"
                )
            size = torch.tensor(lengths, dtype=torch.int64, device=device)
            size[-1] += labels.numel() - total  # padding at the end
            index = torch.arange(count, device=device)
            sample = torch.repeat_interleave(index, size, output_size=labels.numel())
            position = torch.arange(labels.numel(), device=device) - (size.cumsum(0) - size).index_select(0, sample)
            first = restarts | (position == 0)
            sample, position, first = (x.view(labels.shape) for x in (sample, position, first))
    if starts is not None and positions is None and any(starts):  # the wrapped collator has dropped the position_ids
        where = [(i << 32) + at for i, places in enumerate(starts) for at in places]
        where = torch.tensor(where, dtype=torch.int64, device=device)
        first |= torch.isin((sample << 32) + position, where)
    return sample, position, first, real


def _real(mask, labels: Tensor, positions: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(B, L) 0 for padding, else 1, and (B, 1) how many tokens of padding are on the left; None without a mask. A
    masked token between others is no padding: some collators mask every end token, since they pad with it."""
    if mask is None or (positions is not None and getattr(mask, "shape", None) != labels.shape):
        return None, None
    length = labels.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < length:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        wanted = tuple(labels.shape)
        raise ValueError(f"attention_mask must be {wanted} like labels, or come with position_ids, got {got}")
    if (mask > 1).any():
        raise ValueError("attention_mask must be 0 or 1: where samples are packed, give position_ids that restart")
    mask = (mask[:, -length:] != 0).int()  # an adapter's prefix adds columns on the left
    before, after = mask.cumsum(1), mask.flip(1).cumsum(1).flip(1)
    return ((before > 0) & (after > 0)).int(), (before == 0).sum(1, keepdim=True)

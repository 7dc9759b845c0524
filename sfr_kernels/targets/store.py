"""`TargetStore`: the embeddings of a data set's segments, made once, looked up by sample.

On disk it is a folder of shards and `manifest.json`. Shards are mapped, so that dataloader workers and ranks share the
memory, and never changed.
"""

import itertools
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import SFRConfig
from .encoder import as_configured, describe_encoder
from .manifest import differences, read_manifest, segment_rules, tokenizer_hash
from .shards import Shard, is_whole

NO_TARGETS = -1  # the sample_id of a sample that trains on cross-entropy alone


class TargetStore:
    """Embeddings of the anchors of S samples, in sample order."""

    def __init__(
        self,
        embeddings: Tensor,  # (A, d) floating point, unit norm; zero: the text is blank, and the anchor is dropped
        cu_anchors: Tensor,  # (S + 1,) int64: sample i has rows cu_anchors[i] to cu_anchors[i + 1]
    ):
        """A store in memory, of embeddings made elsewhere. `build_targets` and `TargetStore.open` give one on disk."""
        if embeddings.dim() != 2 or not embeddings.is_floating_point():
            raise ValueError(f"embeddings must be (A, d) floating point, got {tuple(embeddings.shape)}")
        if not torch.isfinite(embeddings).all():
            raise ValueError("embeddings contain NaN or infinite values")
        if cu_anchors.dim() != 1 or cu_anchors.numel() < 1 or cu_anchors[0] != 0 or cu_anchors[-1] != len(embeddings):
            raise ValueError(f"cu_anchors must be (S + 1,), begin with 0 and end at A = {embeddings.shape[0]}")
        shard = Shard({"embeddings": embeddings, "cu_anchors": cu_anchors})
        self._set([shard], [cu_anchors.numel() - 1], embeddings.shape[1], {})

    def _set(self, shards: list[Shard], sizes: list[int], target_size: int, manifest: dict) -> "TargetStore":
        self.shards, self._cu_samples = shards, [0, *itertools.accumulate(sizes)]
        self.target_size, self.manifest = target_size, manifest
        return self

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        config: SFRConfig | None = None,
        *,
        tokenizer=None,
        encoder=None,
        data: dict[str, Any] | None = None,  # the fingerprint of the samples, as in the manifest
    ) -> "TargetStore":
        """The store in `folder`, compared with what it is to be used with, as far as that is given. StaleTargets, a
        ValueError naming every difference; FileNotFoundError if there is no whole store."""
        folder = Path(folder)
        read_manifest(folder)  # before the encoder is hashed, which takes long
        if encoder is not None and config is not None:
            encoder = as_configured(encoder, config)
        wanted = {
            **({} if config is None else {"segments": segment_rules(config)}),
            **({} if tokenizer is None else {"tokenizer": tokenizer_hash(tokenizer)}),
            **({} if encoder is None else {"encoder": describe_encoder(encoder)}),
            **({} if data is None else {"data": data}),
        }
        manifest = read_manifest(folder, wanted)
        size, dtype = manifest["encoder"]["target_size"], manifest["dtype"]
        shards = [Shard(None, folder / r["file"], r, dtype, size) for r in manifest["shards"]]
        return cls.__new__(cls)._set(shards, [r["samples"] for r in manifest["shards"]], size, manifest)

    @classmethod
    def concat(cls, stores: Sequence["TargetStore"]) -> "TargetStore":
        """One store of the samples of several, for a data set in parts or for training and evaluation data. Sample i of
        the second has `sample_id` len(first) + i, and so on. ValueError naming every difference between how the stores
        were made."""
        known = [{k: s.manifest[k] for k in ("encoder", "segments", "tokenizer")} for s in stores if s.manifest]
        for other in known[1:]:
            if found := differences(known[0], other):
                raise ValueError(f"stores were made differently: {'; '.join(found)}")
        if len(sizes := {store.target_size for store in stores}) != 1:
            raise ValueError(f"stores must be some of one target size, got sizes {sorted(sizes)}")
        samples = [end - begin for store in stores for begin, end in itertools.pairwise(store._cu_samples)]
        shards = [shard for store in stores for shard in store.shards]
        return cls.__new__(cls)._set(shards, samples, sizes.pop(), known[0] if known else {})

    def __len__(self) -> int:
        return self._cu_samples[-1]

    def check(self, config: SFRConfig) -> None:
        """ValueError naming every difference if the store was made by other segment rules than those of the config."""
        if self.manifest and (found := differences(self.manifest, {"segments": segment_rules(config)})):
            raise ValueError(f"targets were made differently: {'; '.join(found)}")

    def lookup(self, sample_ids: Sequence[int]) -> Tensor:
        """The embeddings (A', d) of the samples' anchors, sample after sample; float32, or float16 if stored as such or
        as int8. Samples whose id is −1 have none."""
        parts = [shard.embeddings(local) for shard, local in self._places(sample_ids)]
        return torch.cat(parts) if parts else torch.zeros(0, self.target_size, dtype=torch.float32)

    def blank(self, sample_ids: Sequence[int]) -> Tensor:
        """(A',) bool: the anchors of `lookup` whose text is blank, so that they have no target."""
        parts = [shard.blank(local) for shard, local in self._places(sample_ids)]
        return torch.cat([torch.zeros(0, dtype=torch.bool), *parts])

    def label_hashes(self, sample_ids: Sequence[int]) -> list[int] | None:
        """`hash_labels` of the samples when their targets were made; None for a store in memory."""
        if any("label_hash" not in shard.tensors() for shard, _ in self._places(sample_ids)):
            return None
        places = (None if i == NO_TARGETS else self._place(i) for i in sample_ids)
        return [0 if place is None else int(place[0].tensors()["label_hash"][place[1]]) for place in places]

    def positions(self, sample_id: int) -> Tensor:
        """(A', 2): where in the sample the labels of each anchor start and stop."""
        shard, local = self._place(sample_id)
        return shard.positions(local)

    def damaged(self) -> list[Path]:
        """The shards that are not, byte for byte, what the manifest says. Reads the whole store."""
        return [s.path for s in self.shards if s.path is not None and not is_whole(s.path, s.record)]

    def _places(self, sample_ids: Sequence[int]) -> list[tuple[Shard, int]]:
        """Of every sample that has targets, its shard and its index there."""
        return [self._place(i) for i in sample_ids if i != NO_TARGETS]

    def _place(self, sample_id: int) -> tuple[Shard, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample_id {sample_id} is outside the store's {len(self)} samples")
        index = bisect_right(self._cu_samples, sample_id) - 1
        return self.shards[index], sample_id - self._cu_samples[index]

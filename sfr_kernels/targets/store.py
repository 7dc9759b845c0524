"""`TargetStore`: the embeddings of a data set's segments, made once, looked up by sample.

On disk a folder of shards and `manifest.json`. Shards are mapped, not read, so opening takes no time and any number of
dataloader workers and ranks share the memory; nothing is written after the build.
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
from .manifest import StaleTargets, differences, read_manifest, segment_rules, tokenizer_hash
from .shards import Shard, is_whole

NO_TARGETS = -1  # the sample_id of a sample that trains on cross-entropy alone


class TargetStore:
    """Embeddings of the anchors of S samples, in sample order."""

    def __init__(
        self,
        embeddings: Tensor,  # (A, d) floating point, unit norm; zero: the anchor's text is blank, it is none
        cu_anchors: Tensor,  # (S + 1,) int64: sample i has rows cu_anchors[i] to cu_anchors[i + 1]
    ):
        """A store in memory, of embeddings that come from elsewhere. `TargetStore.open` and `build_targets` read and
        make one on disk."""
        if embeddings.dim() != 2 or not embeddings.is_floating_point():
            raise ValueError(f"embeddings must be (A, d) floating point, got {tuple(embeddings.shape)}")
        if not torch.isfinite(embeddings).all():
            raise ValueError("embeddings contain NaN or infinite values")
        if cu_anchors.dim() != 1 or cu_anchors.numel() < 1 or cu_anchors[-1] != embeddings.shape[0]:
            raise ValueError(f"cu_anchors must be (S + 1,) and end at A = {embeddings.shape[0]}")
        shard = Shard({"embeddings": embeddings, "cu_anchors": cu_anchors})
        self._set([shard], [0, cu_anchors.numel() - 1], embeddings.shape[1], {})

    def _set(self, shards: list[Shard], cu_samples: list[int], target_size: int, manifest: dict[str, Any]) -> None:
        self.shards, self._cu_samples = shards, cu_samples
        self.target_size, self.manifest = target_size, manifest

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        config: SFRConfig | None = None,
        *,
        tokenizer=None,
        encoder=None,
        data: dict[str, Any] | None = None,
    ) -> "TargetStore":
        """The store in `folder`, compared with whatever is given of what it is about to be used with.

        data  the fingerprint of the samples, as in the manifest.

        StaleTargets, a ValueError naming every difference; FileNotFoundError if there is no store, or no whole one yet.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if encoder is not None and config is not None:
            encoder = as_configured(encoder, config)
        wanted = {
            **({} if config is None else {"segments": segment_rules(config)}),
            **({} if tokenizer is None else {"tokenizer": tokenizer_hash(tokenizer)}),
            **({} if encoder is None else {"encoder": describe_encoder(encoder)}),
            **({} if data is None else {"data": data}),
        }
        if found := differences(manifest, wanted):
            raise StaleTargets(f"the targets in {folder} were made differently: {'; '.join(found)}")
        size, dtype = manifest["encoder"]["target_size"], manifest["dtype"]
        store = cls.__new__(cls)
        shards = [Shard(None, folder / r["file"], r, dtype, size) for r in manifest["shards"]]
        cu_samples = [0, *itertools.accumulate(r["samples"] for r in manifest["shards"])]
        store._set(shards, cu_samples, size, manifest)
        return store

    @classmethod
    def concat(cls, stores: Sequence["TargetStore"]) -> "TargetStore":
        """The samples of several stores under one count: those of the second follow on the first's, and so on.

        For a data set in parts, or one that is trained on and one that is evaluated on: their `sample_id`s are then
        i and len(first) + i. ValueError naming every difference between how the stores were made.
        """
        known = [{k: s.manifest[k] for k in ("encoder", "segments", "tokenizer")} for s in stores if s.manifest]
        for other in known[1:]:
            if found := differences(known[0], other):
                raise ValueError(f"stores were made differently: {'; '.join(found)}")
        if len(sizes := {store.target_size for store in stores}) != 1:
            raise ValueError(f"stores must be some of one target size, got sizes {sorted(sizes)}")
        joined = cls.__new__(cls)
        ends = [end - begin for store in stores for begin, end in itertools.pairwise(store._cu_samples)]
        shards = [shard for store in stores for shard in store.shards]
        joined._set(shards, [0, *itertools.accumulate(ends)], sizes.pop(), known[0] if known else {})
        return joined

    def __len__(self) -> int:
        return self._cu_samples[-1]

    def check(self, config: SFRConfig) -> None:
        """ValueError naming every difference if the store was made by other segment rules than the config's."""
        if self.manifest and (found := differences(self.manifest, {"segments": segment_rules(config)})):
            raise ValueError(f"targets were made differently: {'; '.join(found)}")

    def lookup(self, sample_ids: Sequence[int]) -> Tensor:
        """The embeddings (A', d) of the samples' anchors, sample after sample; float32, or float16 if kept as such or
        as int8. Samples whose id is −1 have none."""
        parts = []
        for i in sample_ids:
            if i != NO_TARGETS:
                shard, local = self._place(i)
                parts.append(shard.embeddings(local))
        if not parts:
            return torch.zeros(0, self.target_size, dtype=torch.float32)
        return torch.cat(parts)

    def blank(self, sample_ids: Sequence[int]) -> Tensor:
        """(A',) bool: the anchors of `lookup` whose text is blank, so that they are none."""
        parts = [torch.zeros(0, dtype=torch.bool)]
        for i in sample_ids:
            if i != NO_TARGETS:
                shard, local = self._place(i)
                parts.append(shard.blank(local))
        return torch.cat(parts)

    def label_hashes(self, sample_ids: Sequence[int]) -> list[int] | None:
        """What `hash_labels` gave for the samples when their targets were made; None if that is not known."""
        found = []
        for i in sample_ids:
            if i == NO_TARGETS:
                found.append(0)
                continue
            shard, local = self._place(i)
            if "label_hash" not in shard.tensors():
                return None
            found.append(int(shard.tensors()["label_hash"][local]))
        return found

    def positions(self, sample_id: int) -> Tensor:
        """(A', 2): where in the sample the labels behind each embedding start and stop."""
        shard, local = self._place(sample_id)
        start, stop = shard.span(local)
        return shard.tensors()["positions"][start:stop]

    def damaged(self) -> list[Path]:
        """The shards that are not, byte for byte, what the manifest says. Reads the whole store."""
        return [s.path for s in self.shards if s.path is not None and not is_whole(s.path, s.record)]

    def _place(self, sample_id: int) -> tuple[Shard, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample_id {sample_id} is outside the store's {len(self)} samples")
        index = bisect_right(self._cu_samples, sample_id) - 1
        return self.shards[index], sample_id - self._cu_samples[index]

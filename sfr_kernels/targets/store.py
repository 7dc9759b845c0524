"""`TargetStore`: the embeddings of a data set's segments, made once, looked up by sample.

On disk a folder of `targets.safetensors` (embeddings, cu_anchors) and `manifest.json`, which says what they were made
from; a folder whose manifest differs from what training is about to use is refused with every difference named.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import SFRConfig
from ..rows import SupervisedRows
from .encoder import encode, fingerprint
from .segments import segment_texts

FORMAT = 1


class TargetStore:
    """Embeddings of the anchors of S samples, in sample order."""

    def __init__(
        self,
        embeddings: Tensor,  # (A, d) float32, unit norm or zero
        cu_anchors: Tensor,  # (S + 1,) int64: sample i has rows cu_anchors[i] to cu_anchors[i + 1]
        manifest: dict[str, Any] | None = None,
    ):
        if embeddings.dim() != 2 or not embeddings.is_floating_point():
            raise ValueError(f"embeddings must be (A, d) floating point, got {tuple(embeddings.shape)}")
        if not torch.isfinite(embeddings).all():
            raise ValueError("embeddings contain NaN or infinite values")
        if cu_anchors.dim() != 1 or cu_anchors.numel() < 1 or cu_anchors[-1] != embeddings.shape[0]:
            raise ValueError(f"cu_anchors must be (S + 1,) and end at A = {embeddings.shape[0]}")
        self.embeddings, self.cu_anchors, self.manifest = embeddings, cu_anchors, manifest or {}
        self._cu = cu_anchors.tolist()

    @property
    def target_size(self) -> int:
        return self.embeddings.shape[1]

    def __len__(self) -> int:
        return len(self._cu) - 1

    def lookup(self, sample_ids: Sequence[int]) -> Tensor:
        """The embeddings (A', d) of the samples' anchors, sample after sample."""
        for i in sample_ids:
            if not 0 <= i < len(self):
                raise IndexError(f"sample_id {i} is outside the store's {len(self)} samples")
        if not sample_ids:
            return self.embeddings[:0]
        return torch.cat([self.embeddings[self._cu[i] : self._cu[i + 1]] for i in sample_ids])

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the store; a reader sees the whole of it or nothing."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            tensors = {"embeddings": self.embeddings.contiguous(), "cu_anchors": self.cu_anchors}
            save_file(tensors, partial / "targets.safetensors")
            (partial / "manifest.json").write_text(json.dumps(self.manifest, indent=2) + "\n")
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | os.PathLike, expected: dict[str, Any] | None = None) -> "TargetStore":
        """Reads a store. With `expected`, ValueError naming every field of the manifest that differs."""
        folder = Path(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        if expected is not None:
            differences = [
                f"{key}: stored {manifest.get(key)!r}, wanted {expected.get(key)!r}"
                for key in sorted(set(manifest) | set(expected))
                if manifest.get(key) != expected.get(key)
            ]
            if differences:
                raise ValueError(f"the targets in {folder} were made differently: {'; '.join(differences)}")
        tensors = load_file(folder / "targets.safetensors")
        return cls(tensors["embeddings"], tensors["cu_anchors"], manifest)


def manifest_of(samples: Sequence[dict], config: SFRConfig, encoder) -> dict[str, Any]:
    """What decides a store's content: the labels, how they are cut into segments, and the encoder."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample["labels"]).to_bytes(8, "little"))
        digest.update(torch.tensor(sample["labels"], dtype=torch.int64).numpy().tobytes())
    names = ("segment_tokens", "stride", "min_tokens", "row_rule", "anchor_rule")
    cut = {name: getattr(config, name) for name in names}
    return {
        "format": FORMAT,
        "encoder": fingerprint(encoder),
        "samples": len(samples),
        "labels": digest.hexdigest(),
        **cut,
    }


def build_targets(
    samples: Sequence[dict],  # each with "labels", a list of ints
    config: SFRConfig,
    tokenizer,
    encoder,  # SentenceTransformer
    *,
    folder: str | os.PathLike | None = None,
    replace: bool = False,
    progress: bool = True,
) -> TargetStore:
    """Embeds the segments of every sample; with `folder`, kept there and read back when nothing has changed.

    A folder whose targets were made differently is a ValueError, or made anew with `replace`.
    """
    manifest = manifest_of(samples, config, encoder)
    if folder is not None and (Path(folder) / "manifest.json").is_file():
        try:
            return TargetStore.load(folder, manifest)
        except ValueError:
            if not replace:
                raise
    texts, counts = [], []
    for sample in samples:
        labels = torch.tensor(sample["labels"], dtype=torch.int64).reshape(1, -1)
        found = segment_texts(labels, SupervisedRows.from_labels(labels, config), tokenizer)
        texts += found
        counts.append(len(found))
    cu_anchors = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)
    store = TargetStore(encode(encoder, texts, progress=progress), cu_anchors, manifest)
    if folder is not None:
        store.save(folder)
    return store

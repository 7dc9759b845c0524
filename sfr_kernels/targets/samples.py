"""A corpus: samples in shards, each of which can be read on its own."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..rows import IGNORE_INDEX

SHARD_TOKENS = 131072  # supervised tokens: 4096 anchors at the default stride, 8 MiB of float16 at d = 1024


class Corpus(Protocol):
    """Samples, shard by shard. It must be picklable, and read the same in every process."""

    cu_samples: list[int]  # shard i has samples cu_samples[i] to cu_samples[i + 1]; the last is their number
    fingerprint: dict[str, Any]  # hashes of all samples, JSON

    def read(self, shard: int) -> list[dict]:
        """The samples of a shard: "labels", and where a sample is packed what `packed_starts` reads."""


class SampleList:
    """The corpus of a list, or of a map-style data set."""

    def __init__(self, samples: Sequence[dict], shard_tokens: int = SHARD_TOKENS):
        if isinstance(samples, Mapping):
            raise TypeError(f"samples must be one data set, got {type(samples).__name__} of {', '.join(samples)}: "
                            "build the targets of each, each in a folder of its own")  # fmt: skip
        if isinstance(samples, str) or not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
            raise TypeError(
                f"samples must have a length and an index, got {type(samples).__name__}: a stream has no sample_id. "
                "Give a list or a map-style data set, or a file to `python -m sfr_kernels targets`, or "
                "use OnlineTargets"
            )
        self.samples, self.cu_samples = samples, [0]
        digest, tokens = hashlib.sha256(), 0
        for i in range(len(samples)):
            sample = samples[i]
            if sample.get("labels") is None:
                raise ValueError(
                    f"sample {i} has no 'labels', only {', '.join(sample)}: where the wrapped collator makes them (of "
                    "completion_mask, assistant_masks or messages), make them before, or train with OnlineTargets"
                )
            for name in ("labels", "position_ids", "seq_lengths"):
                if (values := sample.get(name)) is not None:
                    values = np.asarray(values, dtype=np.int64)
                    digest.update(f"{name} {values.size} ".encode() + values.tobytes())
            tokens += int((np.asarray(sample["labels"]) != IGNORE_INDEX).sum())
            if tokens >= shard_tokens or i + 1 == len(samples):
                self.cu_samples.append(i + 1)
                tokens = 0
        self.fingerprint = {"labels": digest.hexdigest()}

    def read(self, shard: int) -> list[dict]:
        return [self.samples[i] for i in range(*self.cu_samples[shard : shard + 2])]

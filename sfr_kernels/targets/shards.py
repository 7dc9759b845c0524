"""One shard of a store: the targets of consecutive samples, in one safetensors file that is never changed.

    embeddings  (A, d) float16, float32 or int8        scales  (A,) float32, with int8: embedding = int8 · scale
    cu_anchors  (S + 1,) int64                         positions  (A, 2) int32, as in `Segments`
    label_hash  (S,) int64, as in `Segments`           checksum  (S,) int64, CRC-32 of each sample's embeddings

A shard's record in the manifest has its size, its SHA-256, and the SHA-256 of all but the embeddings. The latter is
checked when a shard is first used, a sample's checksum when the sample is: damaged embeddings never become targets,
and opening a store does not read it.
"""

import hashlib
import itertools
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..atomic import write_atomically
from .segments import Segments

DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
_INDEX = {"cu_anchors": torch.int64, "positions": torch.int32, "label_hash": torch.int64, "checksum": torch.int64}
_REPAIR = "`python -m sfr_kernels targets` with its options makes it again"


class DamagedStore(ValueError):
    """A file of a store is missing, or differs from its manifest."""


def shard_of(segments: Segments, embeddings: np.ndarray, dtype: str) -> dict[str, Tensor]:
    """The tensors of a shard, from float32 embeddings (A, d)."""
    values = torch.from_numpy(embeddings)
    tensors = {}
    if dtype == "int8":
        scales = values.abs().amax(1) / 127
        values = (values / scales.clamp(min=1e-30)[:, None]).round()
        tensors["scales"] = scales
    values = values.to(DTYPES[dtype]).contiguous()
    cu = segments.cu_anchors.tolist()
    checksum = [_checksum(values[a:b]) for a, b in itertools.pairwise(cu)]
    return tensors | {
        "embeddings": values,
        "cu_anchors": segments.cu_anchors,
        "positions": segments.positions,
        "label_hash": segments.label_hash,
        "checksum": torch.tensor(checksum, dtype=torch.int64),
    }


def write_shard(path: Path, tensors: dict[str, Tensor]) -> dict:
    """Writes a shard, whole or not at all, and returns its record."""
    data = save(tensors)
    write_atomically(path, data)
    return {
        "file": path.name,
        "samples": tensors["label_hash"].shape[0],
        "anchors": tensors["embeddings"].shape[0],
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "index_sha256": _index_hash(tensors),
    }


def is_whole(path: Path, record: dict) -> bool:
    """Whether the file is, byte for byte, that of the record. Reads all of it."""
    if not path.is_file() or path.stat().st_size != record["bytes"]:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.numpy())


def _index_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(set(tensors) - {"embeddings"}):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy())
    return digest.hexdigest()


class Shard:
    """The targets of S samples: tensors in memory, or a file that is mapped at the first use."""

    def __init__(self, tensors: dict[str, Tensor] | None, path: Path | None = None, record: dict | None = None,
                 dtype: str = "float32", target_size: int = 0):  # fmt: skip
        self._tensors, self.path, self.record, self.dtype, self.target_size = tensors, path, record, dtype, target_size
        self._checked: np.ndarray | None = None

    def __getstate__(self):
        if self.path is None:
            return self.__dict__
        return self.__dict__ | {"_tensors": None, "_checked": None}  # another process maps the file itself

    def tensors(self) -> dict[str, Tensor]:
        if self._tensors is None:
            self._tensors = self._map()
        return self._tensors

    def span(self, sample: int) -> tuple[int, int]:
        """The first anchor of a sample, and the one after its last."""
        cu = self.tensors()["cu_anchors"]
        return int(cu[sample]), int(cu[sample + 1])

    def blank(self, sample: int) -> Tensor:
        """(A',) bool: anchors of one sample that have no text. In memory, where texts are unknown, a zero embedding."""
        if "positions" not in self.tensors():
            return ~self.embeddings(sample).any(1)
        begin, end = self.positions(sample).unbind(1)
        return begin == end

    def positions(self, sample: int) -> Tensor:
        """(A', 2): where in the sample the labels of each anchor start and stop."""
        start, stop = self.span(sample)
        return self.tensors()["positions"][start:stop]

    def embeddings(self, sample: int) -> Tensor:
        """(A', d) of one sample: float16 or float32. The caller must not change it."""
        tensors = self.tensors()
        start, stop = self.span(sample)
        values = tensors["embeddings"][start:stop]
        if self.path is not None:
            self._check(sample, values, tensors)
        if "scales" in tensors:  # float16's 11 bits hold 8 bits times a scale with three to spare
            values = values.float().mul_(tensors["scales"][start:stop, None]).half()
        return values

    def _check(self, sample: int, values: Tensor, tensors: dict[str, Tensor]) -> None:
        if self._checked is None:
            self._checked = np.zeros(self.record["samples"], bool)
        if not self._checked[sample]:
            if _checksum(values) != int(tensors["checksum"][sample]):
                raise DamagedStore(f"{self.path} is damaged: its sample {sample} changed on disk; {_REPAIR}")
            self._checked[sample] = True

    def _map(self) -> dict[str, Tensor]:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise DamagedStore(f"shard {self.path} is missing: {_REPAIR}") from None
        if size != self.record["bytes"]:
            raise DamagedStore(f"shard {self.path} has {size} bytes, not {self.record['bytes']}: {_REPAIR}")
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, ValueError, KeyError) as error:
            raise DamagedStore(f"shard {self.path} is damaged ({error}): {_REPAIR}") from error
        wanted = {"embeddings": DTYPES[self.dtype], **_INDEX}
        if self.dtype == "int8":
            wanted["scales"] = torch.float32
        shape = (self.record["anchors"], self.target_size)
        if (
            {name: tensor.dtype for name, tensor in tensors.items()} != wanted
            or tuple(tensors["embeddings"].shape) != shape
            or _index_hash(tensors) != self.record["index_sha256"]
        ):
            raise DamagedStore(f"shard {self.path} is damaged, its index changed on disk: {_REPAIR}")
        return tensors

"""Building a store: every shard is encoded on its own, and is on disk before the next one is begun.

What a shard holds follows from its samples alone, so whoever encodes it writes the same bytes, and no process has to
know of another: each takes its share of the shards, leaves a record beside each, and whoever finds all records there
writes the manifest. A build that was killed goes on at the first shard without a record.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..atomic import PARTIAL, write_atomically
from ..config import SFRConfig
from .encoder import as_configured, describe_encoder, encode
from .manifest import (
    FILE,
    Identity,
    StaleTargets,
    differences,
    read_manifest,
    segment_rules,
    tokenizer_hash,
    write_manifest,
)
from .samples import Corpus, SampleList
from .segments import Segments, segments_of
from .shards import DTYPES, is_whole, shard_of, write_shard
from .store import TargetStore

BATCH_SIZE = 64  # texts the encoder embeds at once


@dataclass(frozen=True)
class Plan:
    """A store that is to be in `folder`."""

    folder: Path
    identity: Identity

    @property
    def num_shards(self) -> int:
        return len(self.identity.cu_samples) - 1

    def shard(self, i: int) -> Path:
        return self.folder / f"targets-{self.identity.key}-{i:06}.safetensors"

    def embed(self, i: int, found: Segments, encoder, **options) -> np.ndarray:
        """The embeddings of a shard's segments. An error names the sample."""
        samples = np.repeat(np.arange(*self.identity.cu_samples[i : i + 2]), np.diff(found.cu_anchors))
        named = dict(name_of=lambda anchor: f"a text of sample {samples[anchor]}")
        return encode(encoder, found.texts, batch_size=self.identity.batch_size, **named, **options)

    @property
    def records(self) -> Path:
        return self.folder / f".building-{self.identity.key}"

    @property
    def replaced(self) -> Path:
        """The shards of the store this one takes the place of, to be removed once it has."""
        return self.records / "replaced.json"

    def record(self, i: int) -> dict | None:
        """The record of a finished shard. None if it is not finished, or not what its record says."""
        try:
            record = json.loads((self.records / f"{i:06}.json").read_text())
            return record if self.shard(i).stat().st_size == record["bytes"] else None
        except (OSError, ValueError, KeyError):
            return None

    def missing(self) -> list[int]:
        """The shards that are not finished; none of a store that is whole."""
        manifest = self.manifest()
        if manifest is not None and not differences(manifest, self.identity.fields()):
            return []
        return [i for i in range(self.num_shards) if self.record(i) is None]

    def manifest(self) -> dict | None:
        """The manifest that is in the folder, of this store or of another; None if there is none that can be read."""
        try:
            return read_manifest(self.folder)
        except (FileNotFoundError, ValueError):
            return None


def plan_targets(
    corpus: Corpus, config: SFRConfig, tokenizer, encoder, folder: Path, dtype: str, batch_size: int, replace: bool
) -> Plan:
    """What is to be built. StaleTargets naming every difference if the folder has another store, unless `replace`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rules, tokens = segment_rules(config), tokenizer_hash(tokenizer)
    identity = Identity(
        describe_encoder(encoder), tokens, rules, corpus.fingerprint, dtype, batch_size, corpus.cu_samples
    )
    if not replace:
        with contextlib.suppress(FileNotFoundError):
            if found := differences(read_manifest(folder), identity.fields()):
                raise StaleTargets(f"the targets in {folder} were made differently: {'; '.join(found)}")
    return Plan(folder, identity)


def repair(plan: Plan) -> list[int]:
    """Reads every shard of a whole store; one that is damaged is to be built again. Returns their indices.

    The others' records are put back, so that nothing but the damaged shards is encoded.
    """
    manifest = plan.manifest()
    if manifest is None or differences(manifest, plan.identity.fields()):
        return []
    names = [plan.shard(i).name for i in range(plan.num_shards)]
    if [record["file"] for record in manifest["shards"]] != names:
        return []
    damaged = [i for i, record in enumerate(manifest["shards"]) if not is_whole(plan.shard(i), record)]
    if damaged:
        for i, record in enumerate(manifest["shards"]):
            if i not in damaged:
                _write_record(plan, i, record)
        (plan.folder / FILE).unlink(missing_ok=True)  # another process may repair it too
    return damaged


def prepared(corpus: Corpus, config: SFRConfig, tokenizer, shards: list[int]) -> Iterator[tuple[int, Segments]]:
    """The segments of the shards, the next ones made by a thread while one is being encoded.

    Not by another process: after a fork every page the encoder writes to is copied first, which cost it 4% on a CPU.
    """

    def make(shard: int) -> Segments:
        return segments_of(corpus.read(shard), config, tokenizer)

    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(make, shard) for shard in shards[:1]]
        for i, shard in enumerate(shards):
            found = ahead.pop().result()
            ahead = [reader.submit(make, following) for following in shards[i + 1 : i + 2]]
            yield shard, found


def build_shards(
    plan: Plan, corpus: Corpus, config: SFRConfig, tokenizer, encoder, shards: list[int], *,
    pool: dict | None = None, progress: bool = True,
) -> None:  # fmt: skip
    """Encodes and writes the shards, with a bar of segments. One is written while the next is being encoded."""
    identity, last = plan.identity, None
    lengths = {i: identity.cu_samples[i + 1] - identity.cu_samples[i] for i in shards}
    segments = samples = 0
    bar = tqdm(desc="targets", unit="segment", disable=not progress or not shards, smoothing=0.1)
    with bar, ThreadPoolExecutor(1) as writer:  # which, whatever happens, finishes what it was given
        for shard, found in prepared(corpus, config, tokenizer, shards):
            segments, samples = segments + len(found.texts), samples + lengths[shard]
            bar.total = round(segments / samples * sum(lengths.values()))  # of the rest as many a sample as so far
            embeddings = plan.embed(shard, found, encoder, pool=pool, on_done=bar.update)
            if last is not None:
                last.result()
            last = writer.submit(write, plan, shard, found, embeddings)
        if last is not None:
            last.result()


def write(plan: Plan, shard: int, found: Segments, embeddings: np.ndarray) -> None:
    """Writes one shard, then its record."""
    try:
        _write_record(plan, shard, write_shard(plan.shard(shard), shard_of(found, embeddings, plan.identity.dtype)))
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; what is finished is kept, and the same command goes on from there"
        ) from error


def _write_record(plan: Plan, shard: int, record: dict) -> None:
    write_atomically(plan.records / f"{shard:06}.json", json.dumps(record).encode())


def finish(plan: Plan) -> bool:
    """Writes the manifest if every shard is there: the store takes the place of the one in the folder, if any, whose
    shards are then removed. False if some are still to come."""
    old = plan.manifest()
    identity = plan.identity.fields()
    if old is None or differences(old, identity):
        records = [plan.record(i) for i in range(plan.num_shards)]
        if None in records:
            return False
        kept = {record["file"] for record in records}
        replaced = [r["file"] for r in old["shards"] if r["file"] not in kept] if old else []
        try:
            write_atomically(plan.replaced, json.dumps(replaced).encode())
            write_manifest(plan.folder, identity | {"anchors": sum(r["anchors"] for r in records), "shards": records})
        except FileNotFoundError:  # another process was first, and has cleared up behind all of them
            if differences(plan.manifest() or {}, identity):
                raise
    with contextlib.suppress(FileNotFoundError):
        for name in json.loads(plan.replaced.read_text()):
            (plan.folder / name).unlink(missing_ok=True)
    shutil.rmtree(plan.records, ignore_errors=True)
    for name in (f"targets-{plan.identity.key}", FILE):
        for partial in plan.folder.glob(f"{PARTIAL}{name}-*"):
            partial.unlink(missing_ok=True)  # of processes that were killed
    return True


def share() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun and accelerate launch tell them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def build_targets(
    samples: Sequence[dict] | Corpus,  # each with "labels"; where it is packed, with "position_ids" or "seq_lengths"
    config: SFRConfig,
    tokenizer,
    encoder,  # SentenceTransformer; `config` may ask for another pooling and length than its own
    *,
    folder: str | os.PathLike,
    dtype: str = "float16",
    batch_size: int = BATCH_SIZE,
    replace: bool = False,
    verify: bool = False,
    pool: dict | None = None,
    progress: bool = True,
) -> TargetStore:
    """The store of the segments of every sample: built in `folder`, or opened there if nothing has changed.

    dtype    of the embeddings: float16, float32, or int8 with a scale for each.
    replace  builds anew where the folder has other targets, which stay until the new ones are whole; otherwise
             StaleTargets, a ValueError naming every difference.
    verify   reads all of a store that is there, and makes shards that are damaged again.
    pool     of `encoder.start_multi_process_pool(devices)`, to encode on several devices.

    Under torchrun or accelerate launch every process builds its share, and returns when all are done. A build that was
    stopped goes on where it was.
    """
    encoder = as_configured(encoder, config)
    corpus = samples if hasattr(samples, "cu_samples") else SampleList(samples)
    plan = plan_targets(corpus, config, tokenizer, encoder, Path(folder), dtype, batch_size, replace)
    if verify:
        repair(plan)
    rank, world = share()
    shards = [i for i in plan.missing() if i % world == rank]
    build_shards(plan, corpus, config, tokenizer, encoder, shards, pool=pool, progress=progress and rank == 0)
    while not finish(plan):
        time.sleep(0.2)  # for the other processes; torchrun ends this one if one of them fails
    return TargetStore.open(folder)

"""Building a store, shard by shard.

What a shard holds follows from its samples alone, so that every process would write the same bytes, and the processes
of a build need not communicate: each writes its share of the shards and a record beside each, and the one that finds
all records writes the manifest. A build that was killed goes on at the first shard without a record.
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
from .manifest import FILE, Identity, differences, read_manifest, segment_rules, tokenizer_hash, write_manifest
from .samples import Corpus, SampleList
from .segments import Segments, segments_of
from .shards import DTYPES, is_whole, shard_of, write_shard
from .store import TargetStore

BATCH_SIZE = 64  # texts the encoder embeds at once


@dataclass(frozen=True)
class Plan:
    """A store to be built in `folder`."""

    folder: Path
    identity: Identity

    @property
    def num_shards(self) -> int:
        return len(self.identity.cu_samples) - 1

    def shard(self, i: int) -> Path:
        return self.folder / f"targets-{self.identity.key}-{i:06}.safetensors"

    def embed(self, i: int, segments: Segments, encoder, **options) -> np.ndarray:
        """The embeddings of a shard's segments. An error names the sample."""
        samples = np.repeat(np.arange(*self.identity.cu_samples[i : i + 2]), np.diff(segments.cu_anchors))
        options |= dict(name_of=lambda anchor: f"a text of sample {samples[anchor]}")
        return encode(encoder, segments.texts, batch_size=self.identity.batch_size, **options)

    @property
    def records(self) -> Path:
        return self.folder / f".building-{self.identity.key}"

    def record(self, i: int) -> dict | None:
        """The record of a finished shard; None if it is unfinished, or of another size than its record says."""
        try:
            record = json.loads((self.records / f"{i:06}.json").read_text())
            return record if self.shard(i).stat().st_size == record["bytes"] else None
        except (OSError, ValueError, KeyError):
            return None

    def missing(self) -> list[int]:
        """The shards that are not finished."""
        if self.is_of(self.manifest()):
            return []
        return [i for i in range(self.num_shards) if self.record(i) is None]

    def manifest(self) -> dict | None:
        """The manifest in the folder, of this store or of another; None if there is none that can be read."""
        try:
            return read_manifest(self.folder)
        except (FileNotFoundError, ValueError):
            return None

    def is_of(self, manifest: dict | None) -> bool:
        """Whether a manifest is that of this store."""
        return manifest is not None and not differences(manifest, self.identity.fields())


def plan_targets(
    corpus: Corpus, config: SFRConfig, tokenizer, encoder, folder: Path, dtype: str, batch_size: int, replace: bool
) -> Plan:
    """StaleTargets naming every difference if the folder has another store, unless `replace`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    identity = Identity(
        encoder=describe_encoder(encoder), tokenizer=tokenizer_hash(tokenizer), segments=segment_rules(config),
        data=corpus.fingerprint, dtype=dtype, batch_size=batch_size, cu_samples=corpus.cu_samples,
    )  # fmt: skip
    if not replace:
        with contextlib.suppress(FileNotFoundError):
            read_manifest(folder, identity.fields())
    return Plan(folder, identity)


def repair(plan: Plan) -> None:
    """Reads every shard of a whole store. If some are damaged, the manifest goes, and the others get their records
    again, so that only the damaged ones are encoded."""
    manifest = plan.manifest()
    if not plan.is_of(manifest):
        return
    records = manifest["shards"]
    if [record["file"] for record in records] != [plan.shard(i).name for i in range(plan.num_shards)]:
        return
    whole = [i for i, record in enumerate(records) if is_whole(plan.shard(i), record)]
    if len(whole) < len(records):
        for i in whole:
            _write_record(plan, i, records[i])
        (plan.folder / FILE).unlink(missing_ok=True)  # another process may repair it too


def read_ahead(corpus: Corpus, config: SFRConfig, tokenizer, shards: list[int]) -> Iterator[tuple[int, Segments]]:
    """The segments of the shards; a thread makes those of the next while one is being encoded. A process in its place
    would be forked, and every page that the encoder then writes to copied: 4% slower on a CPU."""

    def make(shard: int) -> Segments:
        return segments_of(corpus.read(shard), config, tokenizer)

    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(make, shard) for shard in shards[:1]]
        for i, shard in enumerate(shards):
            segments = ahead.pop().result()
            ahead = [reader.submit(make, following) for following in shards[i + 1 : i + 2]]
            yield shard, segments


def build_shards(
    plan: Plan, corpus: Corpus, config: SFRConfig, tokenizer, encoder, shards: list[int], *,
    pool: dict | None = None, progress: bool = True,
) -> None:  # fmt: skip
    """Encodes and writes the shards, with a progress bar. One is written while the next is being encoded."""
    last, cu_samples = None, plan.identity.cu_samples
    lengths = {i: cu_samples[i + 1] - cu_samples[i] for i in shards}
    texts = samples = 0
    bar = tqdm(desc="targets", unit="segment", disable=not progress or not shards, smoothing=0.1)
    with bar, ThreadPoolExecutor(1) as writer:  # on an error, too, it finishes what was submitted
        for shard, segments in read_ahead(corpus, config, tokenizer, shards):
            texts, samples = texts + len(segments.texts), samples + lengths[shard]
            bar.total = round(texts / samples * sum(lengths.values()))  # estimated from the samples so far
            embeddings = plan.embed(shard, segments, encoder, pool=pool, on_done=bar.update)
            if last is not None:
                last.result()
            last = writer.submit(write, plan, shard, segments, embeddings)
        if last is not None:
            last.result()


def write(plan: Plan, shard: int, segments: Segments, embeddings: np.ndarray) -> None:
    """Writes one shard, then its record."""
    try:
        tensors = shard_of(segments, embeddings, plan.identity.dtype)
        _write_record(plan, shard, write_shard(plan.shard(shard), tensors))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; finished shards stay, and the same command goes on") from error


def _write_record(plan: Plan, shard: int, record: dict) -> None:
    write_atomically(plan.records / f"{shard:06}.json", json.dumps(record).encode())


def finish(plan: Plan) -> bool:
    """Writes the manifest, and removes the shards of the store it replaces, if any. False if a shard is missing."""
    old, to_remove = plan.manifest(), plan.records / "replaced.json"
    if not plan.is_of(old):
        records = [plan.record(i) for i in range(plan.num_shards)]
        if None in records:
            return False
        kept = {record["file"] for record in records}
        replaced = [r["file"] for r in old["shards"] if r["file"] not in kept] if old else []
        try:
            write_atomically(to_remove, json.dumps(replaced).encode())
            contents = {"anchors": sum(r["anchors"] for r in records), "shards": records}
            write_manifest(plan.folder, plan.identity.fields() | contents)
        except FileNotFoundError:  # another process was first, and has removed the records
            if not plan.is_of(plan.manifest()):
                raise
    with contextlib.suppress(FileNotFoundError):
        for name in json.loads(to_remove.read_text()):
            (plan.folder / name).unlink(missing_ok=True)
    shutil.rmtree(plan.records, ignore_errors=True)
    for name in (f"targets-{plan.identity.key}", FILE):
        for partial in plan.folder.glob(f"{PARTIAL}{name}-*"):
            partial.unlink(missing_ok=True)  # left by processes that were killed
    return True


def rank_and_world_size() -> tuple[int, int]:
    """As torchrun and accelerate launch set them; 0 and 1 without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def build_targets(
    samples: Sequence[dict] | Corpus,  # each with "labels"; a packed one also with "position_ids" or "seq_lengths"
    config: SFRConfig,
    tokenizer,
    encoder,  # SentenceTransformer; `config` may set another pooling and length than its own
    *,
    folder: str | os.PathLike,
    dtype: str = "float16",  # of the embeddings: or float32, or int8 with a scale for each
    batch_size: int = BATCH_SIZE,
    replace: bool = False,  # other targets in the folder, which are removed when the new ones are whole
    verify: bool = False,  # reads an existing store whole, and builds damaged shards again
    pool: dict | None = None,  # of encoder.start_multi_process_pool(devices), to encode on several devices
    progress: bool = True,
) -> TargetStore:
    """The store of the segments of every sample: built in `folder`, or opened there if nothing has changed.
    StaleTargets, a ValueError naming every difference, if the folder has other targets. Under torchrun or accelerate
    launch every process builds its share, and returns when all are done. A build that was stopped goes on."""
    encoder = as_configured(encoder, config)
    corpus = samples if hasattr(samples, "cu_samples") else SampleList(samples)
    plan = plan_targets(corpus, config, tokenizer, encoder, Path(folder), dtype, batch_size, replace)
    if verify:
        repair(plan)
    rank, world = rank_and_world_size()
    shards = [i for i in plan.missing() if i % world == rank]
    build_shards(plan, corpus, config, tokenizer, encoder, shards, pool=pool, progress=progress and rank == 0)
    while not finish(plan):
        time.sleep(0.2)  # for the other processes; torchrun ends this one if one of them fails
    return TargetStore.open(folder)

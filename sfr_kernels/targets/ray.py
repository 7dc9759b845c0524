"""Building a store with Ray Data: tasks turn shards into segments, actors turn segments into embeddings.

Every node must see the data and the store's folder under the same path.
"""

import dataclasses
import os
import pickle

from ..config import SFRConfig
from .build import Plan, write
from .encoder import as_configured, describe_encoder, load_encoder
from .samples import Corpus
from .segments import segments_of


class _Encode:
    """An actor: loads the encoder once, encodes and writes the shards it is handed."""

    def __init__(self, plan: Plan, config: SFRConfig, name: str, device: str, truncate_dim: int | None):
        self.plan, self.encoder = plan, as_configured(load_encoder(name, device, truncate_dim), config)
        if describe_encoder(self.encoder)["weights"] != plan.identity.encoder["weights"]:
            raise ValueError(f"encoder {name!r} is another one on this node than where the build was started")

    def __call__(self, row: dict) -> dict:
        shard, found = int(row["shard"]), pickle.loads(row["segments"])
        write(self.plan, shard, found, self.plan.embed(shard, found, self.encoder))
        return {"shard": row["shard"]}


def build_with_ray(
    plan: Plan,
    corpus: Corpus,
    config: SFRConfig,
    tokenizer,
    encoder: str,  # name or folder, which every worker loads
    device: str,  # "cpu", or "cuda": a GPU for each worker
    truncate_dim: int | None,
    workers: int,
) -> None:
    """Encodes and writes the missing shards on a Ray cluster: the one that is connected, or one on this machine.
    ModuleNotFoundError without the extra "ray"."""
    import ray

    shards = plan.missing()
    if not shards:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # Workers have other current folders.
    plan = dataclasses.replace(plan, folder=plan.folder.absolute())
    encoder = os.path.abspath(encoder) if os.path.isdir(encoder) else encoder
    source = ray.put((corpus, config, tokenizer))

    def segments(row: dict) -> dict:
        corpus, config, tokenizer = ray.get(source)
        found = segments_of(corpus.read(row["item"]), config, tokenizer)
        return {"shard": row["item"], "segments": pickle.dumps(found)}

    rows = ray.data.from_items(shards, override_num_blocks=len(shards)).map(segments)
    done = rows.map(
        _Encode,
        fn_constructor_args=(plan, config, encoder, device, truncate_dim),
        concurrency=workers,
        num_gpus=1 if device == "cuda" else 0,
    )
    for _ in done.iter_rows():
        pass

"""The `targets` command: the target store of a corpus, alone, in a group of processes, or on a Ray cluster."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from ..config import SFRConfig
from ..targets import TargetStore, build_targets, load_encoder
from ..targets.build import finish, plan_targets, repair, share
from ..targets.encoder import as_configured
from ..training.chat_file import ChatFile
from ..training.models import load_tokenizer


@dataclass(frozen=True)
class StoreOptions:
    """One run of the `targets` command."""

    data: Path
    out: Path
    model: str
    encoder: str
    config: SFRConfig
    max_length: int
    dtype: str
    truncate_dim: int | None
    batch_size: int
    devices: list[str] | None
    engine: str  # "local" or "ray"
    workers: int
    overwrite: bool

    def __post_init__(self):
        for name in ("max_length", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.config.loss == "mtp":
            raise ValueError("--config: loss='mtp' has no targets to build: they are tokens")
        if self.engine == "ray" and self.devices is not None:
            raise ValueError("--devices has no meaning with --engine ray, whose actors take a GPU each")


def build_store(options: StoreOptions) -> TargetStore:
    """Builds the store, or goes on building it, or checks that it is whole. Errors as of `build_targets`."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    tokenizer, longest = load_tokenizer(options.model)
    corpus = ChatFile(options.data, tokenizer, min(options.max_length, longest or options.max_length))
    devices = _devices(options)
    encoder = as_configured(load_encoder(options.encoder, devices[0], options.truncate_dim), options.config)
    if options.engine == "ray":
        from ..targets.ray import build_with_ray

        plan = plan_targets(
            corpus, options.config, tokenizer, encoder, options.out, options.dtype, options.batch_size,
            options.overwrite,
        )  # fmt: skip
        repair(plan)
        build_with_ray(
            plan, corpus, options.config, tokenizer, plan.missing(), encoder=options.encoder,
            device=devices[0].split(":")[0], truncate_dim=options.truncate_dim, workers=options.workers,
        )  # fmt: skip
        if not finish(plan):
            raise RuntimeError("some shards are missing after the Ray pipeline ended: the same command makes them")
        store = TargetStore.open(options.out)
    else:
        pool = encoder.start_multi_process_pool(devices) if len(devices) > 1 else None
        try:
            store = build_targets(
                corpus, options.config, tokenizer, encoder, folder=options.out, dtype=options.dtype,
                batch_size=options.batch_size, replace=options.overwrite, verify=True, pool=pool,
            )  # fmt: skip
        finally:
            if pool is not None:
                encoder.stop_multi_process_pool(pool)
    if report := corpus.counts.report():  # of what this process read
        print(report, file=sys.stderr)
    if share()[0] == 0:
        size = sum(record["bytes"] for record in store.manifest["shards"])
        print(
            f"{len(store)} samples, {store.manifest['anchors']} targets of {store.target_size} coordinates, "
            f"{size / 1e6:.1f} MB in {len(store.shards)} shards: {options.out}",
            file=sys.stderr,
        )
    return store


def _devices(options: StoreOptions) -> list[str]:
    """Where this process encodes."""
    if options.devices is not None:
        return options.devices
    count = torch.cuda.device_count()
    if count == 0:
        return ["cpu"]
    if share()[1] > 1:
        return [f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}"]
    return [f"cuda:{i}" for i in range(count)]

"""The `targets` command: the target store of a corpus, built by one process, by several, or on a Ray cluster."""

import os
import sys

import torch
from transformers.utils import logging as hf_logging

from ..targets import TargetStore, build_targets, load_encoder
from ..targets.build import finish, plan_targets, rank_and_world_size, repair
from ..targets.encoder import as_configured
from ..training.data import ChatFile
from ..training.models import load_tokenizer


def run(args) -> None:
    """Builds the store, or goes on building it, or checks that it is whole. Errors as of `build_targets`."""
    if args.config.loss == "mtp":
        raise ValueError("--config: loss='mtp' has no targets to build: they are tokens")
    if args.engine == "ray" and args.devices is not None:
        raise ValueError("--devices has no meaning with --engine ray, whose actors take a GPU each")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    tokenizer, longest = load_tokenizer(args.model)
    corpus = ChatFile(args.data, tokenizer, min(args.max_length, longest or args.max_length))
    devices = args.devices or _devices()
    encoder = as_configured(load_encoder(args.encoder, devices[0], args.truncate_dim), args.config)
    if args.engine == "ray":
        from ..targets.ray import build_with_ray

        plan = plan_targets(
            corpus, args.config, tokenizer, encoder, args.out, args.dtype, args.batch_size, args.overwrite
        )
        repair(plan)
        device = devices[0].split(":")[0]
        build_with_ray(plan, corpus, args.config, tokenizer, args.encoder, device, args.truncate_dim, args.workers)
        if not finish(plan):
            raise RuntimeError("some shards are missing after the Ray pipeline ended: the same command makes them")
        store = TargetStore.open(args.out)
    else:
        pool = encoder.start_multi_process_pool(devices) if len(devices) > 1 else None
        try:
            store = build_targets(
                corpus, args.config, tokenizer, encoder, folder=args.out, dtype=args.dtype,
                batch_size=args.batch_size, replace=args.overwrite, verify=True, pool=pool,
            )  # fmt: skip
        finally:
            if pool is not None:
                encoder.stop_multi_process_pool(pool)
    if report := corpus.counts.report():  # of the samples this process has read
        print(report, file=sys.stderr)
    if rank_and_world_size()[0] == 0:
        size = sum(record["bytes"] for record in store.manifest["shards"])
        print(
            f"{len(store)} samples, {store.manifest['anchors']} targets of {store.target_size} coordinates, "
            f"{size / 1e6:.1f} MB in {len(store.shards)} shards: {args.out}",
            file=sys.stderr,
        )


def _devices() -> list[str]:
    """Where this process encodes: on every GPU, or on its own of a group of processes; else on the CPU."""
    count = torch.cuda.device_count()
    if count == 0:
        return ["cpu"]
    if rank_and_world_size()[1] > 1:
        return [f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}"]
    return [f"cuda:{i}" for i in range(count)]

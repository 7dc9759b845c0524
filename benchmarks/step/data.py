"""The batches of the training-step benchmark, and the store of their targets.

Every run takes the next batch of a small data set and moves it to the device, so that no provider can keep anything of
the last one. All batches have the same sizes: a prompt without loss, then a response.
"""

import functools
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from sfr_kernels.rows import IGNORE_INDEX

from ..harness.stand_ins import RandomEncoder
from .encoder import SPECIAL
from .models import StepShape

BATCHES = 16


@dataclass(frozen=True)
class Batch:
    index: int
    sample_ids: list[int]
    host: dict[str, Tensor]  # input_ids, attention_mask and labels, (B, L), pinned where there is a GPU
    inputs: dict[str, Tensor]  # the same on the device


class Batches:
    """Of words that the encoder knows, drawn once."""

    def __init__(self, shape: StepShape, device: torch.device):
        self.shape, self.device, self.position = shape, device, 0
        size = BATCHES * shape.batch, shape.length
        most = min(shape.trunk.vocab, shape.encoder.vocab)
        ids = torch.randint(len(SPECIAL), most, size, generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, : shape.length - round(shape.supervised * shape.length)] = IGNORE_INDEX
        self.columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.hosts = []
        for i in range(BATCHES):
            part = slice(i * shape.batch, (i + 1) * shape.batch)
            host = {name: column[part].clone() for name, column in self.columns.items()}
            self.hosts.append({n: t.pin_memory() if device.type == "cuda" else t for n, t in host.items()})

    def next(self) -> Batch:
        index, b = self.position % BATCHES, self.shape.batch
        self.position += 1
        host = self.hosts[index]
        moved = {name: t.to(self.device, non_blocking=True) for name, t in host.items()}
        return Batch(index, list(range(index * b, (index + 1) * b)), host, moved)

    @functools.cached_property
    def store(self):
        """A store on disk of the data set's targets: random ones, which are as many bytes as any."""
        from sfr_kernels.targets import build_targets

        from .encoder import make_tokenizer

        self.folder = tempfile.TemporaryDirectory()  # goes with this object
        samples = [{"labels": row.tolist()} for row in self.columns["labels"]]
        encoder = RandomEncoder(self.shape.encoder.hidden_size)
        tokenizer = make_tokenizer(self.shape.encoder.vocab)
        return build_targets(
            samples, self.shape.config, tokenizer, encoder, folder=f"{self.folder.name}/store", progress=False
        )

"""SFR's targets as published, made within the training step: what they cost is what ours are compared with.

The labels of every response are cut into suffixes, one every `stride` tokens, of at most `segment_tokens`; each is
decoded and embedded in the step, and every supervised position is given the embedding of the nearest. A suffix shorter
than `min_tokens` has a zero target. There is a target and a weight, (m − i)/m for the i-th of m, for every position of
the batch, zero where there is no loss. The loss on them is `PublishedFlowLoss`.

The published code scans the labels and fills the positions one by one. `SuffixTargets` computes the same without a
loop over tokens, so that the pipeline can be told from the loops, and `LoopedSuffixTargets` with both loops: one
`.item()` for each label, one write of each position's target and one of its weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sfr_kernels import SFRConfig
from sfr_kernels.rows import IGNORE_INDEX

from ..step.parts import LOOPS, TARGETS, unmarked

BATCH_SIZE = 32  # of sentence-transformers' `encode`, unless it is told another


class SuffixTargets:
    """(x_1, weight) of labels on the device, without a loop over tokens."""

    def __init__(self, encoder, tokenizer, config: SFRConfig, dtype: torch.dtype):
        self.encoder, self.tokenizer, self.config, self.dtype = encoder, tokenizer, config, dtype

    def __call__(
        self,
        labels: Tensor,  # (B, L)
        mark: Callable[[str], None] = unmarked,  # told which part of the step ends
    ) -> tuple[Tensor, Tensor]:  # x_1 (B, L, d), weight (B, L) float32
        anchor, weight = self.places(labels)
        responses = self.responses(labels)
        embeddings = self.embed(self.texts(responses), labels.device)
        x_1 = embeddings[anchor.clamp(min=0)] * (anchor >= 0).unsqueeze(-1)
        mark(TARGETS)
        return x_1, weight

    def responses(self, labels: Tensor) -> list[list[int]]:
        """The supervised labels of each sequence."""
        own = labels != IGNORE_INDEX
        return [part.tolist() for part in labels[own].cpu().split(own.sum(dim=1).tolist())]

    def places(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The suffix of each position, −1 where there is no loss, and its weight: both (B, L)."""
        own = labels != IGNORE_INDEX
        i, m = own.cumsum(dim=1) - 1, own.sum(dim=1, keepdim=True)
        count = (m + self.config.stride - 1) // self.config.stride
        anchor = count.cumsum(dim=0) - count + torch.minimum(self._nearest(i), count - 1)
        return torch.where(own, anchor, -1), torch.where(own, (m - i) / m, 0.0)

    def _nearest(self, i):
        """The suffix that begins nearest to row i; of two, the earlier one."""
        return (i + (self.config.stride - 1) // 2) // self.config.stride

    def texts(self, responses: list[list[int]]) -> list[str | None]:
        """The text of every suffix of every response, None where it is too short."""
        c = self.config
        cuts = [tokens[start:] for tokens in responses for start in range(0, len(tokens), c.stride)]
        pieces = [cut[: c.segment_tokens] if len(cut) >= c.min_tokens else None for cut in cuts]
        found = iter(self.tokenizer.batch_decode([p for p in pieces if p is not None], skip_special_tokens=True))
        return [None if p is None else next(found) for p in pieces]

    def embed(self, texts: list[str | None], device: torch.device) -> Tensor:
        """x_1 (A, d) of every suffix, zero where it has no text."""
        kept = [text for text in texts if text is not None]
        encoded = self.encoder.encode(
            kept, batch_size=BATCH_SIZE, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )
        size = self.encoder.get_embedding_dimension()
        out = torch.zeros(len(texts), size, dtype=self.dtype, device=device)
        index = [i for i, text in enumerate(texts) if text is not None]
        scale = self.config.scale_for(size)
        out[torch.tensor(index, device=device)] = (scale * encoded).to(device, self.dtype)
        return out


class LoopedSuffixTargets(SuffixTargets):
    """The same, token by token."""

    def __call__(self, labels: Tensor, mark: Callable[[str], None] = unmarked) -> tuple[Tensor, Tensor]:
        batch, length = labels.shape
        positions, responses = [], []
        for b in range(batch):
            supervised = [(p, label) for p in range(length) if (label := labels[b, p].item()) != IGNORE_INDEX]
            positions.append([p for p, _ in supervised])
            responses.append([label for _, label in supervised])
        mark(LOOPS)
        embeddings = self.embed(self.texts(responses), labels.device)
        x_1 = embeddings.new_zeros(batch, length, embeddings.shape[1])
        weight = torch.zeros(batch, length, device=labels.device)
        mark(TARGETS)
        first = 0
        for b, places in enumerate(positions):
            m = len(places)
            count = -(-m // self.config.stride)
            for i, p in enumerate(places):
                x_1[b, p] = embeddings[first + min(self._nearest(i), count - 1)]
                weight[b, p] = (m - i) / m
            first += count
        mark(LOOPS)
        return x_1, weight

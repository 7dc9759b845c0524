"""SFR's targets as published, made within the training step: what they cost is what ours are compared with.

The supervised labels of a sequence are its response. An anchor stands at every `stride`-th of them; its text is the
supervised labels at the next `segment_tokens` positions, decoded. It is kept if they are `min_tokens` at least and the
text is not blank, and then embedded. Every supervised position is given the embedding of the nearest anchor kept, of
two the earlier one, and with a stride of 1 of its own alone; where there is none, zero. With `segment_tokens` 0 the
text of the whole response serves all its positions. There is a target and a weight, (m − i)/m for the i-th of m, for
every position of the batch, zero where there is no loss. The loss on them is `PublishedFlowLoss`.

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
        host = labels.cpu()
        texts = self.texts(host)
        place = self.places(host, texts).to(labels.device)
        embeddings = self.embed(texts, labels.device)
        nothing = embeddings.new_zeros(1, embeddings.shape[1])  # which is where the place -1 leads
        x_1 = torch.cat([embeddings, nothing])[place]
        weight = self.weights(labels)
        mark(TARGETS)
        return x_1, weight

    def weights(self, labels: Tensor) -> Tensor:  # (B, L)
        own = labels != IGNORE_INDEX
        i, m = own.cumsum(dim=1) - 1, own.sum(dim=1, keepdim=True)
        return torch.where(own, (m - i) / m, 0.0)

    def texts(self, labels: Tensor) -> list[str | None]:
        """The text of every anchor, None where it falls away."""
        member, sequence, anchor = self._anchors(labels)
        k, length = self.config.segment_tokens, labels.shape[1]
        end = (sequence[anchor] + 1) * length
        stop = torch.searchsorted(member, torch.minimum(member[anchor] + k + 1, end) if k else end)
        tokens = labels.flatten()[member].tolist()
        spans = zip((anchor + (k > 0)).tolist(), stop.tolist(), strict=True)
        return self.decode([tokens[start:stop] for start, stop in spans])

    def places(self, labels: Tensor, texts: list[str | None]) -> Tensor:
        """(B, L): the text of each position, −1 where it has none."""
        member, sequence, anchor = self._anchors(labels)
        kept = torch.tensor([text is not None for text in texts], dtype=torch.bool)
        out, left = torch.full((labels.numel(),), -1), kept.nonzero().squeeze(1)
        if len(left) == 0:
            return out.view_as(labels)
        if self._whole or self.config.stride == 1:
            index = sequence.unique_consecutive(return_inverse=True)[1] if self._whole else torch.arange(len(member))
            found = torch.where(kept[index], index, -1)
        else:
            # sequences laid so far apart that another one's anchor is further away than any of one's own
            key = member + 2 * labels.shape[1] * sequence
            at = key[anchor[left]]
            after = torch.searchsorted(at, key)
            before, after = (after - 1).clamp(min=0), after.clamp(max=len(at) - 1)
            back, ahead = (key - at[before]).abs(), (at[after] - key).abs()
            nearest = left[torch.where(back <= ahead, before, after)]
            found = torch.where(torch.minimum(back, ahead) < labels.shape[1], nearest, -1)
        out[member] = found
        return out.view_as(labels)

    @property
    def _whole(self) -> bool:
        """One text serves the whole response."""
        return self.config.segment_tokens == 0

    def _anchors(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The supervised positions of the flattened labels, the sequence of each, and which of them are anchors."""
        member = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
        sequence = member // labels.shape[1]
        i = torch.arange(len(member)) - torch.searchsorted(sequence, sequence)
        return member, sequence, (i == 0 if self._whole else i % self.config.stride == 0).nonzero().squeeze(1)

    def decode(self, pieces: list[list[int]]) -> list[str | None]:
        """The text of each piece, None where it is too short or blank."""
        least = 1 if self._whole else self.config.min_tokens
        long = [piece for piece in pieces if len(piece) >= least]
        found = iter(self.tokenizer.batch_decode(long, skip_special_tokens=True))
        texts = [next(found) if len(piece) >= least else None for piece in pieces]
        return [text if text and text.strip() else None for text in texts]

    def embed(self, texts: list[str | None], device: torch.device) -> Tensor:
        """x_1 (A, d) of every text, zero where there is none."""
        size = self.encoder.get_embedding_dimension()
        out = torch.zeros(len(texts), size, dtype=self.dtype, device=device)
        index = [i for i, text in enumerate(texts) if text is not None]
        if index:
            encoded = self.encoder.encode(
                [texts[i] for i in index],
                batch_size=BATCH_SIZE,
                normalize_embeddings=True,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
            out[torch.tensor(index, device=device)] = (self.config.scale_for(size) * encoded).to(device, self.dtype)
        return out


class LoopedSuffixTargets(SuffixTargets):
    """The same, token by token."""

    def __call__(self, labels: Tensor, mark: Callable[[str], None] = unmarked) -> tuple[Tensor, Tensor]:
        (batch, length), k, stride = labels.shape, self.config.segment_tokens, self.config.stride
        responses, anchors, pieces = [], [], []
        for b in range(batch):
            response = [(p, label) for p in range(length) if (label := labels[b, p].item()) != IGNORE_INDEX]
            responses.append([p for p, _ in response])
            for i in range(0, len(response), stride if k else length):
                p = response[i][0]
                anchors.append((b, p))
                ahead = response[i + 1 : i + 1 + k] if k else response
                pieces.append([label for q, label in ahead if not k or q <= p + k])
        mark(LOOPS)
        texts = self.decode(pieces)
        embeddings = self.embed(texts, labels.device)
        x_1 = embeddings.new_zeros(batch, length, embeddings.shape[1])
        weight = torch.zeros(batch, length, device=labels.device)
        mark(TARGETS)
        for b, response in enumerate(responses):
            kept = [(p, a) for a, (of, p) in enumerate(anchors) if of == b and texts[a] is not None]
            near = 0
            for i, p in enumerate(response):
                while near + 1 < len(kept) and abs(kept[near + 1][0] - p) < abs(kept[near][0] - p):
                    near += 1
                if kept and (stride > 1 or not k or kept[near][0] == p):
                    x_1[b, p] = embeddings[kept[near][1]]
                weight[b, p] = (len(response) - i) / len(response)
        mark(LOOPS)
        return x_1, weight

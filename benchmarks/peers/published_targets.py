"""SFR's targets as published, made within the training step: what they cost is what ours are compared with.

The supervised labels of a sequence are its response. An anchor stands at every `stride`-th of them; its text is the
supervised labels at the next `segment_tokens` positions, decoded. It is kept if they are `min_tokens` at least and the
text is not blank, and then embedded. Every supervised position is given the embedding of the nearest anchor kept, of
two the earlier one, and with a stride of 1 of its own alone; where there is none, zero. With `segment_tokens` 0 the
text of the whole response serves all its positions. There is a target and a weight, (m − i)/m for the i-th of m, for
every position of the batch, zero where there is no loss. The loss on them is `PublishedFlowLoss`.

The published code goes token by token: one `.item()` for each label, one write of each position's target and weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sfr_kernels import SFRConfig
from sfr_kernels.rows import IGNORE_INDEX

TARGETS, LOOPS = "targets", "per-token loops"  # parts of a step
Mark = Callable[[str], object]  # called with the name of a part when it ends


def unmarked(part: str) -> None:
    """The mark of a step that is not taken apart."""


class PublishedTargets:
    def __init__(self, encoder, tokenizer, config: SFRConfig, dtype: torch.dtype):
        self.encoder, self.tokenizer, self.config, self.dtype = encoder, tokenizer, config, dtype

    def __call__(self, labels: Tensor, mark: Mark = unmarked) -> tuple[Tensor, Tensor]:
        """x_1 (B, L, d) and weight (B, L) float32 of labels (B, L) on the device."""
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
        long = [i for i, piece in enumerate(pieces) if len(piece) >= (self.config.min_tokens if k else 1)]
        texts = dict(
            zip(long, self.tokenizer.batch_decode([pieces[i] for i in long], skip_special_tokens=True), strict=True)
        )
        texts = [text if (text := texts.get(i)) and text.strip() else None for i in range(len(pieces))]
        embeddings = self.embed(texts, labels.device)
        x_1 = embeddings.new_zeros(batch, length, embeddings.shape[1])
        weight = torch.zeros(batch, length, dtype=torch.float32, device=labels.device)
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

    def embed(self, texts: list[str | None], device: torch.device) -> Tensor:
        """x_1 (A, d) of every text, zero where there is none; in sentence-transformers' own batches."""
        size = self.encoder.get_embedding_dimension()
        out = torch.zeros(len(texts), size, dtype=self.dtype, device=device)
        if index := [i for i, text in enumerate(texts) if text is not None]:
            options = dict(normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)
            encoded = self.encoder.encode([texts[i] for i in index], **options)
            out[torch.tensor(index, device=device)] = (self.config.scale_for(size) * encoded).to(device, self.dtype)
        return out

"""SFR as published, in eager torch: what ours is compared with.

Targets, made within the step, token by token: one `.item()` for each label, one write of each position's target. An
anchor stands at every `stride`-th label of a response; its text is the labels at the next `segment_tokens` positions.
It is kept if they are `min_tokens` at least and not blank. Every position is given the embedding of the nearest anchor
kept, of two the earlier one (with a stride of 1 its own alone; with `segment_tokens` 0 the text of the whole
response), or zero, and the weight (m − i)/m, the i-th of m.

The loss works on all B·L positions and masks afterwards, copies [x_t, τ, h] into one tensor, and draws one time per
sequence (`SFRConfig.official`). Parameters have the names of `VelocityHead`: either loads the other's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        decoded = self.tokenizer.batch_decode([pieces[i] for i in long], skip_special_tokens=True)
        texts = {i: text for i, text in zip(long, decoded, strict=True) if text.strip()}
        texts = [texts.get(i) for i in range(len(pieces))]
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


class TimeEmbedding(nn.Module):
    """τ(t) (..., d) of t (...)."""

    def __init__(self, size: int, time_scale: float):
        super().__init__()
        self.size, self.time_scale = size, time_scale
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.SiLU(), nn.Linear(4 * size, size))

    def forward(self, t: Tensor) -> Tensor:
        half = self.size // 2
        omega = 10000.0 ** (-torch.arange(half, dtype=t.dtype, device=t.device) / max(half - 1, 1))
        angle = self.time_scale * t.unsqueeze(-1) * omega
        return self.mlp(F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, self.size % 2)))


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, a: Tensor) -> Tensor:
        return a + F.silu(self.norm(self.linear(a)))


class PublishedFlowLoss(nn.Module):
    """Velocity head and flow-matching loss over every position of a batch."""

    def __init__(self, hidden_size: int, target_size: int, width: int = 1024, num_layers: int = 3,
                 time_scale: float = 1.0, source_std: float = 1.0):  # fmt: skip
        super().__init__()
        self.source_std = source_std
        self.time_embed = TimeEmbedding(target_size, time_scale)
        self.input_proj = nn.Sequential(nn.Linear(2 * target_size + hidden_size, width), nn.LayerNorm(width), nn.SiLU())
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_layers - 2))
        self.output_proj = nn.Linear(width, target_size)

    def velocity(self, x_t: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """(B, L, d) of x_t (B, L, d), t (B,) and h (B, L, H)."""
        tau = self.time_embed(t).unsqueeze(1).expand_as(x_t)
        a = self.input_proj(torch.cat([x_t, tau, hidden], dim=-1))
        for block in self.res_blocks:
            a = block(a)
        return self.output_proj(a)

    def loss(self, hidden: Tensor, x_t: Tensor, u: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """Σ weight · mean (v − u)² / max(Σ weight, 1), of h (B, L, H), x_t and u (B, L, d), t (B,), weight (B, L)."""
        error = F.mse_loss(self.velocity(x_t, t, hidden), u, reduction="none").mean(dim=-1)
        return (error * weight).sum() / weight.sum().clamp(min=1.0)

    def forward(self, hidden: Tensor, x_1: Tensor, weight: Tensor) -> Tensor:
        """Of h (B, L, H), x_1 (B, L, d) and weight (B, L)."""
        x_0 = self.source_std * torch.randn_like(x_1)
        t = torch.rand(hidden.shape[0], dtype=hidden.dtype, device=hidden.device)
        s = t[:, None, None]
        return self.loss(hidden, (1 - s) * x_0 + s * x_1, x_1 - x_0, t, weight)

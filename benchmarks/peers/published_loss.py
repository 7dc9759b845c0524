"""The published way to compute the flow loss, in eager torch: what ours is compared with.

It works on all B·L positions and masks afterwards, copies [x_t, τ, h] into one tensor, and draws one time per sequence
(DESIGN section 1, `SFRConfig.official`). Parameters have the names of `VelocityHead`: either loads the other's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def __init__(
        self,
        hidden_size: int,  # H
        target_size: int,  # d
        width: int = 1024,  # D
        num_layers: int = 3,
        time_scale: float = 1.0,
        source_std: float = 1.0,
    ):
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

    def loss(
        self,
        hidden: Tensor,  # (B, L, H)
        x_t: Tensor,  # (B, L, d)
        u: Tensor,  # (B, L, d)
        t: Tensor,  # (B,)
        weight: Tensor,  # (B, L), 0 where there is no loss
    ) -> Tensor:
        """Σ weight · mean (v − u)² / max(Σ weight, 1)"""
        error = F.mse_loss(self.velocity(x_t, t, hidden), u, reduction="none").mean(dim=-1)
        return (error * weight).sum() / weight.sum().clamp(min=1.0)

    def forward(self, hidden: Tensor, x_1: Tensor, weight: Tensor) -> Tensor:
        """Of h (B, L, H), x_1 (B, L, d) and weight (B, L)."""
        x_0 = self.source_std * torch.randn_like(x_1)
        t = torch.rand(hidden.shape[0], dtype=hidden.dtype, device=hidden.device)
        s = t[:, None, None]
        return self.loss(hidden, (1 - s) * x_0 + s * x_1, x_1 - x_0, t, weight)

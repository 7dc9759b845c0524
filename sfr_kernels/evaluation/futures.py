"""Where the future is open: texts ahead, as embeddings, that a trained velocity head leads to from a hidden state.

The paper's diagnostics (arXiv 2605.27971) name the idea, Lock and Fork: at a lock the head carries all noises to one
future, at a fork to several. They are published without a formula; this one is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS = 4096  # that the head sees at once: of 1024 units, some 100 MB of activations


@torch.no_grad()
def sample_futures(
    head: nn.Module,  # VelocityHead
    hidden: Tensor,  # (n, H), what the lm_head is given
    *,
    noises: int,
    steps: int,
    target_scale: float,  # of the head's training, config.scale_for(d)
    source_std: float,
    seed: int,
) -> Tensor:  # (n, noises, d) float32
    """Embeddings x_1 / target_scale of the text ahead: dx/dt = v(x, t, h) from x_0 = source_std · ε at t = 0 to t = 1,
    by explicit Euler steps in float32.

    Every token is given the same ε ~ N(0, 1), drawn on the CPU from `seed`: samples of two tokens differ by their
    hidden states alone, and a token's do not depend on what it is sampled with. TypeError for other than real hidden
    states, ValueError naming the argument for sizes and numbers that do not fit.
    """
    shape = head.shape
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating-point, got {hidden.dtype}")
    if hidden.dim() != 2 or hidden.shape[1] != shape.hidden_size:
        raise ValueError(f"hidden must be (n, {shape.hidden_size}), got {tuple(hidden.shape)}")
    for name, count in dict(noises=noises, steps=steps).items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    for name, scale in dict(target_scale=target_scale, source_std=source_std).items():
        if not scale > 0:
            raise ValueError(f"{name} must be positive, got {scale}")
    generator = torch.Generator().manual_seed(seed)
    noise = source_std * torch.randn(noises, shape.target_size, generator=generator, dtype=torch.float32)
    noise, hidden = noise.to(hidden.device), hidden.float()
    ends = []
    for row in torch.arange(len(hidden) * noises, device=hidden.device).split(_ROWS):
        x, h = noise[row % noises], hidden[row // noises]
        for step in range(steps):
            x = x + head(x, step / steps, h) / steps
        ends.append(x / target_scale)
    return torch.cat([noise[:0], *ends]).reshape(len(hidden), noises, shape.target_size)


def spread(samples: Tensor) -> Tensor:  # (n, k, d) → (n,)
    """The mean cosine distance 1 − cos between two of a token's k samples: 0 where all agree, 1 where they have nothing
    in common. ValueError for fewer than two samples.

    Half the squared distance of unit vectors is their cosine distance, and its mean over pairs the trace of their
    unbiased covariance.
    """
    _check(samples)
    return F.normalize(samples, dim=2).var(dim=1).sum(dim=1)


def spread_together(samples: Tensor) -> Tensor:  # (n, k, d) → scalar
    """The mean cosine distance between samples of different noises, each of any of the n tokens: what the mean of
    `spread` is for a head that does not tell the tokens apart, and is below where it does. ValueError as there."""
    _check(samples)
    k = samples.shape[1]
    of_noise = F.normalize(samples, dim=2).mean(dim=0)  # (k, d)
    return 1 - (of_noise.sum(dim=0).square().sum() - of_noise.square().sum()) / (k * (k - 1))


def _check(samples: Tensor) -> None:
    if samples.dim() != 3 or samples.shape[1] < 2:
        raise ValueError(f"samples must be (n, k, d) with k of at least 2, got {tuple(samples.shape)}")

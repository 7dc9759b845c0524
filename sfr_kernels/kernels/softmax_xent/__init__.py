"""Cross-entropy of rows of logits x, and its gradient written over them:

    z = cap · tanh(s x / cap)      lse = log Σ_j exp z_j
    ℓ = lse − (1 − ε) z_y − ε mean(z) + λ_z lse²
    dz = p (1 + 2 λ_z lse) − (1 − ε) onehot(y) − ε / V      dx = w s (1 − (z / cap)²) dz

s logit_scale, cap softcap (None: z = s x), ε label_smoothing, λ_z z_loss, w row_weight.

Where each process of a group has some columns, the same in two halves, between which they exchange `RowPartials`:

    partials: top = max z      total = Σ exp(z − top)      and what else one part adds
    gradient: dx = w s (1 − (z / cap)²) (share · exp(z − top) − (1 − ε) onehot(y) − uniform)

with top, share = (1 + 2 λ_z lse) / total and uniform = ε / V of the whole vocabulary.
"""

from typing import NamedTuple

from torch import Tensor

from ..backend import dispatch


class RowStats(NamedTuple):
    """Per-row statistics of the logits, float64 for float64 logits."""

    lse: Tensor  # (n,) float32, log-sum-exp
    predicted: Tensor  # (n,) int64, argmax
    entropy: Tensor  # (n,) float32, nats
    correct: Tensor  # (n,) bool, predicted == label


class RowPartials(NamedTuple):
    """What one part of the vocabulary adds to each row's softmax, for labels that may lie in another part.

    All (n,) float32 (float64 for float64 logits); `rest` and `moment` may be zero where they were not asked for.
    """

    top: Tensor  # the largest logit z
    total: Tensor  # Σ exp(z − top)
    chosen: Tensor  # z of the label, 0 if it is not in this part
    owned: Tensor  # 1 if it is, else 0
    rest: Tensor  # Σ (z − top)
    moment: Tensor  # Σ exp(z − top) (z − top)
    best: Tensor  # where z is largest


@dispatch
def softmax_xent(
    logits: Tensor,  # (n, V); holds dlogits afterwards if need_grad
    labels: Tensor,  # (n,) int64 in [0, V)
    row_weight: Tensor | None = None,  # (n,) float32
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    need_grad: bool = True,
    need_stats: bool = False,
) -> tuple[Tensor, RowStats | None]:
    """row_weight · ℓ (n,) in float32 (float64 for float64 logits), and the statistics if asked for."""


@dispatch
def softmax_partials(
    logits: Tensor,  # (n, V), unchanged
    labels: Tensor,  # (n,) int64; outside [0, V): the class is in another part
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    need_rest: bool = False,
    need_stats: bool = False,
) -> RowPartials:
    """What these columns add to each row's softmax, in float32 (float64 for float64 logits)."""


@dispatch
def softmax_gradient(
    logits: Tensor,  # (n, V); holds dlogits afterwards
    labels: Tensor,  # (n,) int64; outside [0, V): the class is in another part
    row_weight: Tensor | None,  # (n,) float32
    top: Tensor,  # (n,) float32
    share: Tensor,  # (n,) float32
    uniform: Tensor,  # zero-dim float32
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> None:
    """Turns logits into the gradient of row_weight · ℓ, given what is known of their rows in the whole vocabulary."""

"""LayerNorm and SiLU, with the row bias before and the residual after:

    y ← y + row_bias[row_index]      x̂ = (y − μ) ρ      z = γ x̂ + β      out = SiLU(z) (+ residual)

Backward needs y, μ and ρ:

    dz = dout σ(z)(1 + z(1 − σ(z)))      q = γ dz      dy = ρ (q − mean(q) − x̂ mean(q x̂))
    dγ = Σ dz x̂      dβ = Σ dz      d row_bias[m] = Σ_{row_index = m} dy
"""

from torch import Tensor

from ..backend import dispatch

EPS = 1e-5  # of torch.nn.LayerNorm


@dispatch
def norm_act(
    y: Tensor,  # (n, D); replaced by y + row_bias[row_index] where there is one
    gamma: Tensor,  # (D,)
    beta: Tensor,  # (D,)
    *,
    row_bias: Tensor | None = None,  # (M, D)
    row_index: Tensor | None = None,  # (n,) int32
    residual: Tensor | None = None,  # (n, D)
) -> tuple[Tensor, Tensor, Tensor]:
    """out (n, D) in y's dtype; μ and ρ (n,) in float32."""


@dispatch
def norm_act_backward(
    dout: Tensor,  # (n, D)
    y: Tensor,  # (n, D), as norm_act left it
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,  # (n,)
    rstd: Tensor,  # (n,)
    *,
    row_index: Tensor | None = None,  # (n,) int32
    num_bias: int = 1,  # M
    dy: Tensor | None = None,  # (n, D), where to write dy; may be y or dout itself
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy (n, D) in y's dtype; dγ, dβ (D,) and d row_bias (M, D) in float32; Σ dy (1, D) where row_index is None."""

"""1 − linear CKA between per-response mean hidden states and their targets, by U-centred Gram matrices.

    Ã_ij = A_ij − Σ_j A_ij/(n−2) − Σ_i A_ij/(n−2) + Σ A/((n−1)(n−2)) off the diagonal, 0 on it
    HSIC(A, B) = Σ Ã B̃ / (n(n − 3))      CKA = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))

The unbiased estimator of Székely & Rizzo 2014; it needs four responses.
"""

import torch
from torch import Tensor


def response_cka(
    h: Tensor,  # (n, H), hidden states of the flow rows
    targets: Tensor,  # (A, d)
    anchor: Tensor,  # (n,), the response of each row
) -> Tensor:
    """CKA as a scalar tensor, differentiable in h. ValueError for fewer than four responses."""
    count = targets.shape[0]
    if count < 4:
        raise ValueError(
            f"loss='cka' needs at least 4 responses in a batch, got {count}: raise the batch size, drop the last batch"
        )
    wide = torch.promote_types(h.dtype, torch.float32)
    member = (torch.arange(count, device=h.device).unsqueeze(1) == anchor).to(wide)
    k, q = _centred(member @ h.to(wide) / member.sum(1, keepdim=True)), _centred(targets.to(wide))
    norms = (k.square().sum() * q.square().sum()).clamp(min=1e-24)
    return (k * q).sum() / norms.sqrt()


def _centred(x: Tensor) -> Tensor:
    n = x.shape[0]
    off = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    gram = (x @ x.T) * off
    sums = gram.sum(dim=1)
    return (gram - (sums[:, None] + sums[None, :]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))) * off

"""1 − linear CKA between per-response mean hidden states and their targets, by U-centred Gram matrices.

    Ã_ij = A_ij − Σ_j A_ij/(n−2) − Σ_i A_ij/(n−2) + Σ A/((n−1)(n−2)) off the diagonal, 0 on it
    HSIC(A, B) = Σ Ã B̃ / (n(n − 3))      CKA = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))

The unbiased estimator of Székely & Rizzo 2014; it needs four responses. As published, it is kept within [0, 1], and
fewer responses have no loss.
"""

import torch
from torch import Tensor

LEAST = 4  # responses


def cka_loss(
    h: Tensor,  # (n, H), hidden states of the flow rows
    targets: Tensor,  # (A, d)
    anchor: Tensor,  # (n,), the response of each row
    published: bool,
) -> Tensor:
    """1 − CKA as a float32 scalar (float64 for float64 h), differentiable in h; 0 without rows.

    Fewer than four responses: 0 as published, else ValueError. Those whose text was blank are not counted on a GPU,
    which would be a wait, nor under a compiler: where they are why, the loss is NaN.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    count = targets.shape[0]
    if h.shape[0] == 0 or (published and count < LEAST):
        return h.to(wide).sum() * 0
    member = (torch.arange(count, device=h.device).unsqueeze(1) == anchor).to(wide)
    rows = member.sum(1, keepdim=True)
    present = rows.squeeze(1) > 0  # the place of a response whose text was blank has no rows
    if not published:
        if h.device.type == "cpu" and not torch.compiler.is_compiling():
            count = int(present.sum())
        if count < LEAST:
            raise ValueError(
                f"loss='cka' needs at least {LEAST} responses in a batch, got {count}: "
                "raise the batch size, drop the last batch"
            )
    k, q = (_centred(x, present) for x in (member @ h.to(wide) / rows.clamp(min=1), targets.to(wide)))
    norms = (k.square().sum() * q.square().sum()).clamp(min=1e-24)
    cka = (k * q).sum() / norms.sqrt()
    loss = 1 - (cka.clamp(0, 1) if published else cka)
    return torch.where(present.sum() < LEAST, 0.0 if published else torch.nan, loss)


def _centred(x: Tensor, present: Tensor) -> Tensor:
    """The U-centred Gram matrix of the rows of x that are present, zero for the others."""
    n = present.sum().clamp(min=LEAST)  # of fewer nothing is made
    off = (present.unsqueeze(1) & present).to(x.dtype).fill_diagonal_(0)
    gram = (x @ x.T) * off
    sums = gram.sum(dim=1)
    return (gram - (sums[:, None] + sums[None, :]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))) * off

"""The SFR objective in plain torch: the oracle. Read this first, beside arXiv 2605.27971.

    L = L_CE + λ · L_flow

Everything runs on any device, in the dtype of `hidden` (float64 included), under autograd. Noise and times are float32
by definition and then cast. It shares no code with the implementations that it judges.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import HIDDEN_NORM_EPS, SFRConfig
from .rows import IGNORE_INDEX, SupervisedRows

# ---------------------------------------------------------------------------------------------------------------------
# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Words are int64 in [0, 2^32).

WORD = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a · b, by 16-bit halves of b, so that int64 holds every product."""
    b_low, b_high = b & 0xFFFF, b >> 16
    low, high = a * b_low, a * b_high
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four random words for a counter of four, which are broadcast."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _words(seed: int | Tensor, block: Tensor, identity: Tensor, stream: int) -> tuple[Tensor, ...]:
    """Philox under the 64-bit `seed` at counter (block, identity low, identity high, stream)."""
    seed = torch.as_tensor(seed, dtype=torch.int64, device=block.device)
    counter = (block, identity & WORD, (identity >> 32) & WORD, torch.full_like(block, stream))
    return philox(counter, (seed & WORD, (seed >> 32) & WORD))


def uniform(word: Tensor) -> Tensor:
    """u = (w + 1/2) · 2^-32 in float32, never 0."""
    return (word.float() + 0.5) * 2.0**-32


def gaussian_noise(seed: int | Tensor, noise_id: Tensor, size: int) -> Tensor:
    """ε (n, size) float32: Box–Muller on Philox words; a row depends on its `noise_id` alone."""
    block = torch.arange((size + 3) // 4, device=noise_id.device)[None, :]
    u = [uniform(w) for w in _words(seed, block, noise_id[:, None], 0)]
    lanes = []
    for a, b in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(a))
        lanes += [radius * torch.cos(2 * math.pi * b), radius * torch.sin(2 * math.pi * b)]
    return torch.stack(lanes, dim=2).flatten(1)[:, :size]


def draw_times(rows: SupervisedRows, seed: int | Tensor, config: SFRConfig) -> tuple[Tensor, Tensor]:
    """`times` (M,) float32 and `time_index` (n,) of a step.

    "stratified": t_m = ((m + u_m) / M)^p, u_m from stream 2; a row's index is the high word of M · w, w from stream 1.
    "sequence": t_b = u^p, u from stream 3 at the smallest noise_id of the sequence's rows. p = time_power. For Dirac
    losses t = 0.
    """
    n, device = len(rows), rows.device
    if config.is_dirac:
        index = torch.zeros(n, dtype=torch.int64, device=device)
        return torch.zeros(1, dtype=torch.float32, device=device), index
    if config.time_sampling == "sequence":
        identity = torch.zeros(rows.shape[0], dtype=torch.int64, device=device)
        identity.scatter_reduce_(0, rows.time_index.long(), rows.noise_id, "amin", include_self=False)
        u = uniform(_words(seed, torch.zeros_like(identity), identity, 3)[0])
        return u**config.time_power, rows.time_index.long()
    size = config.num_times
    block = torch.arange((size + 3) // 4, device=device)
    u = uniform(torch.stack(_words(seed, block, torch.zeros_like(block), 2), dim=1).flatten()[:size])
    word = _words(seed, torch.zeros_like(rows.noise_id), rows.noise_id, 1)[0]
    return ((torch.arange(size, device=device) + u) / size) ** config.time_power, (word * size) >> 32


# ---------------------------------------------------------------------------------------------------------------------
# The velocity head


def time_embedding(t: Tensor, size: int, time_scale: float) -> Tensor:
    """[sin(s t ω) ; cos(s t ω)] (M, size), ω_i = 10000^(−i/(size/2 − 1)); an odd size pads one zero."""
    half = size // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=t.dtype, device=t.device) / max(half - 1, 1))
    angle = time_scale * t[:, None] * omega
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, size % 2))


def velocity(
    params: dict[str, Tensor],  # the head's parameters under their checkpoint names
    x_t: Tensor,  # (n, d)
    t: Tensor,  # (n,)
    hidden: Tensor,  # (n, H)
    time_scale: float,
    hidden_scale: float = 1.0,
    hidden_norm: str = "none",
) -> Tensor:
    """v(x_t, t, h) (n, d): sinusoid and MLP of t, then input layer, residual blocks and output layer. For "mtp" the
    output layer is mtp_tokens · H wide. hidden_norm "rms" divides h by its root mean square."""

    def linear(name, x):
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm_act(name, x):
        return F.silu(F.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"]))

    tau = time_embedding(t, x_t.shape[1], time_scale)
    tau = linear("time_embed.mlp.2", F.silu(linear("time_embed.mlp.0", tau)))
    if hidden_norm == "rms":
        hidden = F.rms_norm(hidden, hidden.shape[-1:], eps=HIDDEN_NORM_EPS)
    a = norm_act("input_proj.1", linear("input_proj.0", torch.cat([x_t, tau, hidden_scale * hidden], dim=1)))
    block = 0
    while f"res_blocks.{block}.linear.weight" in params:
        a = a + norm_act(f"res_blocks.{block}.norm", linear(f"res_blocks.{block}.linear", a))
        block += 1
    return linear("output_proj", a)


# ---------------------------------------------------------------------------------------------------------------------
# The losses. Each is given all rows, and selects its own by a mask.


def linear_cross_entropy(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (n,), ignore_index = no loss
    *,
    bias: Tensor | None = None,
    lora: Sequence[tuple[Tensor, Tensor, float, float]] = (),  # A (r, H), B (V, r), scale s, dropout of each adapter
    ignore_index: int = IGNORE_INDEX,
    row_weight: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Per-row cross-entropy (n,) of logits = cap(s · (h Wᵀ + b)), 0 where ignored. Of a layer with adapters
    h Wᵀ + b + Σ s_i (drop(h) A_iᵀ) B_iᵀ.

    ℓ = lse − (1 − ε) z_y − ε mean(z) + z_loss · lse², times row_weight.
    """
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    for down, up, scale, dropout in lora:
        logits = logits + scale * (F.dropout(hidden, dropout) @ down.T @ up.T)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    used = labels != ignore_index
    lse = torch.logsumexp(logits, dim=1)
    chosen = logits.gather(1, torch.where(used, labels, 0)[:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * chosen + z_loss * lse**2
    if label_smoothing:  # 0 times the mean of logits of which one is −∞ would be NaN
        loss = loss - label_smoothing * logits.mean(dim=1)
    loss = loss if row_weight is None else loss * row_weight
    return torch.where(used, loss, 0.0)


def flow_matching_loss(
    hidden: Tensor,  # (..., H), B·L positions
    params: dict[str, Tensor],
    rows: SupervisedRows,
    targets: Tensor,  # (A, d)
    times: Tensor | None = None,  # (M,); None draws them from the seed
    *,
    seed: int | Tensor,
    config: SFRConfig,
    time_scale: float,
    hidden_scale: float = 1.0,
    hidden_norm: str = "none",
    normalizer: float | Tensor | None = None,
    weight: Tensor | None = None,  # (V, H), the decoder of "mtp"
    decoder_options: dict | None = None,
) -> Tensor:
    """L_flow = Σ_r weight[r] ℓ_r / normalizer, for every `config.loss`; "cka" has one ℓ for all rows and no weights."""
    dtype = hidden.dtype
    used = rows.anchor >= 0
    h = hidden.reshape(-1, hidden.shape[-1])[rows.rows[used]]
    anchor, w = rows.anchor[used].long(), rows.weight[used].to(dtype)
    norm = _normalizer(normalizer, rows)
    if config.flow_normalizer == "weights":
        norm = w.sum().clamp(min=1.0)
    if config.loss == "cka":
        published = config.target_rule == "published"
        if len(h) == 0 or (published and len(torch.unique(anchor)) < 4):
            return hidden.sum() * 0
        cka = _response_cka(h, targets.to(dtype), anchor)
        loss = 1 - (cka.clamp(0, 1) if published else cka)
        return loss if config.flow_normalizer == "weights" else loss * (rows.num_flow / norm)

    if times is None:
        times, time_index = draw_times(rows, seed, config)
    else:
        time_index = rows.time_index.long()
    t = times.to(dtype)[time_index[used]]
    size = params["time_embed.mlp.2.weight"].shape[0]
    std = 0.0 if config.is_dirac else config.source_std
    x_0 = std * gaussian_noise(seed, rows.noise_id[used], size).to(dtype)
    if config.loss == "mtp":
        # A slice of v for each offset j + 2, decoded against the label of the row that j + 1 links lead to.
        v = velocity(params, x_0, t, h, time_scale, hidden_scale, hidden_norm).unflatten(1, (config.mtp_tokens, -1))
        losses = []
        for j in range(config.mtp_tokens):
            there = anchor >= 0
            row_loss = linear_cross_entropy(v[there, j], weight, targets[anchor[there]], **(decoder_options or {}))
            losses.append((w[there] * row_loss).sum())
            anchor = torch.where(there, rows.anchor[anchor].long(), -1)
        return torch.stack(losses).mean() / norm
    x_1 = config.scale_for(size) * targets.to(dtype)[anchor]
    x_t = (1 - t)[:, None] * x_0 + t[:, None] * x_1
    v = velocity(params, x_t, t, h, time_scale, hidden_scale, hidden_norm)
    row_loss = 1 - F.cosine_similarity(v, x_1, dim=1) if config.loss == "cosine" else (v - (x_1 - x_0)).square().mean(1)
    return (w * row_loss).sum() / norm


def _response_cka(h: Tensor, targets: Tensor, anchor: Tensor) -> Tensor:
    """Linear CKA between the mean hidden state of each response and its target, with the unbiased HSIC
    (Song et al. 2012, equation 5; Kornblith et al. 2019)."""
    present = torch.unique(anchor)
    n = len(present)
    if n < 4:
        raise ValueError(f"loss='cka' needs at least 4 responses in a batch, got {n}")
    means = torch.stack([h[anchor == a].mean(dim=0) for a in present])

    def gram(x):
        k = x @ x.T
        return k - torch.diag(torch.diag(k))

    def hsic(k, q):
        total = (k * q).sum() + k.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ q).sum()
        return total / (n * (n - 3))

    k, q = gram(means), gram(targets[present])
    return hsic(k, q) / (hsic(k, k).clamp(min=1e-12).sqrt() * hsic(q, q).clamp(min=1e-12).sqrt())


def sfr_loss(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    params: dict[str, Tensor],
    rows: SupervisedRows,
    targets: Tensor,  # (A, d); for "mtp" the labels of the rows
    times: Tensor | None = None,
    *,
    seed: int | Tensor,
    config: SFRConfig,
    time_scale: float,
    hidden_scale: float = 1.0,
    hidden_norm: str = "none",
    flow_hidden: Tensor | None = None,  # of another layer; None: hidden
    bias: Tensor | None = None,
    lora: Sequence[tuple[Tensor, Tensor, float, float]] = (),
    flow_weight: float | Tensor | None = None,
    normalizer: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(L_CE + λ L_flow, L_CE, L_flow)."""
    decoder = dict(
        bias=bias, lora=lora, softcap=softcap, logit_scale=logit_scale, label_smoothing=label_smoothing, z_loss=z_loss
    )
    h = hidden.reshape(-1, hidden.shape[-1])[rows.rows]
    ce = linear_cross_entropy(h, weight, rows.labels, **decoder).sum() / _normalizer(normalizer, rows)
    flow = flow_matching_loss(
        hidden if flow_hidden is None else flow_hidden, params, rows, targets, times, seed=seed, config=config,
        time_scale=time_scale, hidden_scale=hidden_scale, hidden_norm=hidden_norm, normalizer=normalizer, weight=weight,
        decoder_options=decoder,
    )  # fmt: skip
    return ce + (config.first_weight if flow_weight is None else flow_weight) * flow, ce, flow


def _normalizer(normalizer, rows: SupervisedRows):
    return max(rows.num_ce, 1) if normalizer is None else normalizer

"""Cross-entropy of rows of logits, and its gradient written over them: csrc/softmax_xent.cu."""

import functools

import torch
from torch import Tensor

from ..cuda import DTYPES, address, library, stream_of
from . import RowPartials, RowStats

_CLUSTERS = (1, 2, 4, 8)
_POST_BYTES = 8192  # of shared memory, beside the two buffers of a block: at least `Post` of csrc/softmax_xent.cu


def cluster_for(logits: Tensor) -> int:
    """Blocks that hold a row on chip between them; 0 where none can, or the chip has no clusters."""
    size = logits.element_size()
    aligned = logits.stride(1) == 1 and logits.stride(0) * size % 16 == 0 and logits.data_ptr() % 16 == 0
    if not (aligned and logits.is_cuda):
        return 0
    vectors, most = -(-logits.shape[1] * size // 16), _slice_bytes(logits.device)
    return next((c for c in _CLUSTERS if -(-vectors // c) * 16 <= most), 0)


@functools.cache
def _slice_bytes(device: torch.device) -> int:
    """What a block may hold of a row, twice; 0 where the GPU has no clusters, or the library no code for them."""
    with torch.cuda.device(device):
        if torch.cuda.get_device_capability(device) < (9, 0) or library().cluster_code() < 90:
            return 0
    return (torch.cuda.get_device_properties(device).shared_memory_per_block_optin - _POST_BYTES) // 2


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
    cluster: int | None = None,  # of blocks a row; 0: two passes; None: `cluster_for`
) -> tuple[Tensor, RowStats | None]:
    """row_weight · ℓ (n,) in float32, and the statistics if asked for."""
    (n, vocab), labels = logits.shape, labels.long().contiguous()
    row_weight = None if row_weight is None else row_weight.float().contiguous()
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    stats = (torch.empty_like(loss), torch.empty_like(labels), torch.empty_like(loss)) if need_stats else (None,) * 3
    cluster = cluster_for(logits) if cluster is None else cluster
    pointers = (labels.data_ptr(), address(row_weight), loss.data_ptr(), *map(address, stats))
    options = (n, vocab, logit_scale, softcap or 0.0, label_smoothing, z_loss, need_grad)
    where = logits.data_ptr(), DTYPES[logits.dtype], logits.stride(0)
    if cluster:
        claimed = torch.empty(1, dtype=torch.int64, device=logits.device)
        library().softmax_xent_cluster(*where, *pointers, *options, cluster, claimed.data_ptr(), stream_of(logits))
    else:
        library().softmax_xent(*where, logits.stride(1), *pointers, *options, stream_of(logits))
    return loss, RowStats(*stats, stats[1] == labels) if need_stats else None


def softmax_partials(
    logits: Tensor,  # (n, V), unchanged
    labels: Tensor,  # (n,) int64; outside [0, V): the class is in another part
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    need_rest: bool = False,
    need_stats: bool = False,
) -> RowPartials:
    """What these columns add to each row's softmax, in float32, all of it whether asked for or not."""
    (n, vocab), labels = logits.shape, labels.long().contiguous()
    out = torch.empty(7, n, dtype=torch.float32, device=logits.device)
    library().softmax_partials(
        logits.data_ptr(), DTYPES[logits.dtype], *logits.stride(), labels.data_ptr(), out.data_ptr(), n, vocab,
        logit_scale, softcap or 0.0, stream_of(logits),
    )  # fmt: skip
    return RowPartials(*out)


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
    """Turns logits into the gradient of row_weight · ℓ, for what is known of their rows in the whole vocabulary."""
    (n, vocab), labels, top, share = logits.shape, labels.long().contiguous(), top.contiguous(), share.contiguous()
    row_weight = None if row_weight is None else row_weight.float().contiguous()
    library().softmax_gradient(
        logits.data_ptr(), DTYPES[logits.dtype], *logits.stride(), labels.data_ptr(), address(row_weight),
        top.data_ptr(), share.data_ptr(), uniform.data_ptr(), n, vocab, logit_scale, softcap or 0.0, label_smoothing,
        stream_of(logits),
    )  # fmt: skip

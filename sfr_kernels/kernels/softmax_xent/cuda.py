"""csrc/softmax_xent.cu: rows held on chip by clusters of blocks where they fit, else two passes."""

import functools

import torch
from torch import Tensor

from ..cuda import DTYPES, address, library, stream_of, structure
from . import RowPartials, RowStats

SoftmaxXentArguments = structure(
    "SoftmaxXentArguments",
    pointers="logits labels row_weight loss lse predicted entropy claimed",
    int64="logits_row logits_col n",
    int32="vocab need_grad cluster",
    float32="logit_scale softcap label_smoothing z_loss",
)
SoftmaxPartialsArguments = structure(
    "SoftmaxPartialsArguments",
    pointers="logits labels out",
    int64="logits_row logits_col n",
    int32="vocab",
    float32="logit_scale softcap",
)
SoftmaxGradientArguments = structure(
    "SoftmaxGradientArguments",
    pointers="logits labels row_weight top share uniform",
    int64="logits_row logits_col n",
    int32="vocab",
    float32="logit_scale softcap label_smoothing",
)
_CLUSTERS = (1, 2, 4, 8)
_MAILBOX_BYTES = 8192  # of shared memory, beside the two buffers of a block: MAILBOX_BYTES of csrc/softmax_xent.cu


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
    return (torch.cuda.get_device_properties(device).shared_memory_per_block_optin - _MAILBOX_BYTES) // 2


def softmax_xent(
    logits: Tensor, labels: Tensor, row_weight: Tensor | None = None, *,
    logit_scale: float = 1.0, softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
    need_grad: bool = True, need_stats: bool = False,
    cluster: int | None = None,  # of blocks a row; 0: two passes; None: `cluster_for`
) -> tuple[Tensor, RowStats | None]:  # fmt: skip
    (n, vocab), labels = logits.shape, labels.long().contiguous()
    row_weight = None if row_weight is None else row_weight.float().contiguous()
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    arguments = SoftmaxXentArguments(
        logits=logits.data_ptr(), logits_row=logits.stride(0), logits_col=logits.stride(1), labels=labels.data_ptr(),
        row_weight=address(row_weight), loss=loss.data_ptr(), n=n, vocab=vocab, need_grad=need_grad,
        logit_scale=logit_scale, softcap=softcap or 0.0, label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip
    if need_stats:
        lse, predicted, entropy = torch.empty_like(loss), torch.empty_like(labels), torch.empty_like(loss)
        arguments.lse, arguments.predicted, arguments.entropy = lse.data_ptr(), predicted.data_ptr(), entropy.data_ptr()
    cluster = cluster_for(logits) if cluster is None else cluster
    if cluster:
        claimed = torch.empty(1, dtype=torch.int64, device=logits.device)
        arguments.cluster, arguments.claimed = cluster, claimed.data_ptr()
    library().softmax_xent(arguments, DTYPES[logits.dtype], stream_of(logits))
    return loss, RowStats(lse, predicted, entropy, predicted == labels) if need_stats else None


def softmax_partials(
    logits: Tensor, labels: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None, need_rest: bool = False, need_stats: bool = False,
) -> RowPartials:  # fmt: skip
    (n, vocab), labels = logits.shape, labels.long().contiguous()
    out = torch.empty(7, n, dtype=torch.float32, device=logits.device)
    arguments = SoftmaxPartialsArguments(
        logits=logits.data_ptr(), logits_row=logits.stride(0), logits_col=logits.stride(1), labels=labels.data_ptr(),
        out=out.data_ptr(), n=n, vocab=vocab, logit_scale=logit_scale, softcap=softcap or 0.0,
    )  # fmt: skip
    library().softmax_partials(arguments, DTYPES[logits.dtype], stream_of(logits))
    return RowPartials(*out)


def softmax_gradient(
    logits: Tensor, labels: Tensor, row_weight: Tensor | None, top: Tensor, share: Tensor, uniform: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None, label_smoothing: float = 0.0,
) -> None:  # fmt: skip
    (n, vocab), labels, top, share = logits.shape, labels.long().contiguous(), top.contiguous(), share.contiguous()
    row_weight = None if row_weight is None else row_weight.float().contiguous()
    arguments = SoftmaxGradientArguments(
        logits=logits.data_ptr(), logits_row=logits.stride(0), logits_col=logits.stride(1), labels=labels.data_ptr(),
        row_weight=address(row_weight), top=top.data_ptr(), share=share.data_ptr(), uniform=uniform.data_ptr(),
        n=n, vocab=vocab, logit_scale=logit_scale, softcap=softcap or 0.0, label_smoothing=label_smoothing,
    )  # fmt: skip
    library().softmax_gradient(arguments, DTYPES[logits.dtype], stream_of(logits))

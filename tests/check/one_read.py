"""An experiment: cross-entropy of rows of logits that reads each logit once.

    ℓ = lse − z_y      dz = p − onehot(y), over z

`softmax_xent` reads a row twice, the second time from L2. Here a program holds a whole row in registers, and while it
works on one row the next is on its way into shared memory (`num_stages=2`: asynchronous copies; a program a
multiprocessor takes rows in turn). It serves rows of up to 32768 numbers in 16 bit, of which two fit a multiprocessor:
with 50304 it spills 240 bytes a thread, and 128256 would need a cluster of blocks, which Triton does not offer.

Expected to win by a tenth at V = 32000, where the second read has least to hide behind; the package reads twice until a
measurement says otherwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfr_kernels.kernels.elementary import exp
from sfr_kernels.kernels.triton import launch

WIDEST = 32768


@triton.jit
def _one_read_kernel(x_ptr, x_row, label_ptr, loss_ptr, n, V, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < V
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0), num_stages=STAGES):
        at = x_ptr + row * x_row.to(tl.int64)
        z = tl.load(at + offs, mask=mask, other=float("-inf")).to(tl.float32)
        label = tl.load(label_ptr + row)
        z_label = tl.load(at + label).to(tl.float32)
        top = tl.max(z, axis=0)
        e = exp(z - top)
        total = tl.sum(e, axis=0)
        tl.store(loss_ptr + row, tl.log(total) - (z_label - top))
        dz = e * (1.0 / total)
        dz = tl.where(offs == label.to(tl.int32), dz - 1.0, dz)
        tl.store(at + offs, dz.to(x_ptr.dtype.element_ty), mask=mask)


def one_read(
    logits: Tensor,  # (n, V), rows contiguous, V at most WIDEST; holds dlogits afterwards
    labels: Tensor,  # (n,) int64
    warps: int = 16,
    stages: int = 2,
) -> Tensor:
    """ℓ (n,) in float32."""
    n, vocab = logits.shape
    if vocab > WIDEST:
        raise ValueError(f"logits must have at most {WIDEST} columns, got {vocab}")
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    programs = n
    if logits.is_cuda:  # a program fills a multiprocessor
        programs = min(n, torch.cuda.get_device_properties(logits.device).multi_processor_count)
    block = max(16, triton.next_power_of_2(vocab))
    meta = dict(BLOCK=block, STAGES=stages, num_warps=warps)
    launch(_one_read_kernel, (programs,), logits, logits.stride(0), labels, loss, n, vocab, **meta)
    return loss

"""An experiment: cross-entropy of rows of logits that reads each logit once.

    ℓ = lse − z_y      dz = p − onehot(y), over z

`softmax_xent` reads a row twice, the second time from L2. Here a program holds a whole row in registers, and while it
works on one row the next is on its way into shared memory (`num_stages=2`: asynchronous copies; a program a
multiprocessor takes rows in turn). Without that overlap one read was no faster than two on an H100. It serves rows of
up to 32768 numbers in 16 bit, of which two fit a multiprocessor: with 50304 it spills 240 bytes a thread, and
128256 would need a cluster of blocks, which Triton does not offer.

Expected to win by a tenth at V = 32000, where the second read has least to hide behind; the package reads twice until a
measurement says otherwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfr_kernels.leaves import triton as leaves
from sfr_kernels.leaves.triton.launch import launch

from ..harness.errors import message
from ..harness.timing import Candidate, compare

TWICE = "softmax_xent"
COPY = "floor"
WIDEST = 32768
WARPS = (16, 32)  # candidates to be timed
SHAPES = ((4096, 32000), (4096, 128256), (1024, 256000))  # rows, classes


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
        e = tl.exp2(1.4426950408889634 * (z - top))
        total = tl.sum(e, axis=0)
        tl.store(loss_ptr + row, tl.log(total) - (z_label - top))
        dz = e * (1.0 / total)
        dz = tl.where(offs == label.to(tl.int32), dz - 1.0, dz)
        tl.store(at + offs, dz.to(x_ptr.dtype.element_ty), mask=mask)


def one_read(
    logits: Tensor,  # (n, V), rows contiguous, V at most WIDEST; holds dlogits afterwards
    labels: Tensor,  # (n,) int64
    warps: int = WARPS[0],
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


def measure(
    device: torch.device,
    seconds: float = 1.0,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict]:
    """Rows of a result file: the leaf at every shape, one read where a row fits, beside a copy of the logits, which
    moves the same bytes as one read and one write."""
    rows = []
    for n, vocab in shapes:
        g = torch.Generator(device).manual_seed(0)
        source = torch.empty(n, vocab, dtype=dtype, device=device).normal_(generator=g)
        labels = torch.randint(vocab, (n,), device=device, generator=g)
        logits, other = source.clone(), torch.empty_like(source)
        runs = {TWICE: lambda x=logits, y=labels: leaves.softmax_xent(x, y)[0]}
        if vocab <= WIDEST:
            for warps in WARPS:
                runs[f"one read, {warps} warps"] = lambda x=logits, y=labels, w=warps: one_read(x, y, w)
        common = dict(op="softmax_xent", label=f"n{n} V{vocab}", dtype=str(dtype)[6:], bytes=2 * source.nbytes)
        found, wanted = {}, (runs[TWICE]().clone(), logits.clone())
        for name, run in list(runs.items()):
            logits.copy_(source)
            try:
                pairs = zip((run(), logits), wanted, strict=True)
                wrong = max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)
                found[name] = common if wrong <= 2.0**-8 else common | dict(failure=f"differs by {wrong:.1e}")
            except Exception as error:  # one that does not compile must not hide the others
                found[name] = common | dict(failure=message(error))
                del runs[name]
        candidates = {name: Candidate(run, lambda x=logits, y=source: x.copy_(y)) for name, run in runs.items()}
        candidates[COPY] = Candidate(lambda x=other, y=source: x.copy_(y))
        times = compare(candidates, device, seconds)
        for name in runs:
            time, floor = times[name], times[COPY]
            values = dict(ms=time.ms, spread_ms=time.spread_ms, issue_ms=time.issue_ms, floor_ms=floor.ms)
            found[name] = found[name] | {key: round(ms, 5) for key, ms in values.items()}
            found[name]["terabytes_per_second"] = round(common["bytes"] / time.ms / 1e9, 3)
        rows += [
            dict(failure=None) | row | dict(candidate=name, ok="failure" not in row) for name, row in found.items()
        ]
    return rows

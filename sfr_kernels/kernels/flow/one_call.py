"""The flow loss of each row and its gradients as one call of the cuda backend: what `ops/velocity_head.py` composes of
the other kernels, with nothing of Python between the launches (csrc/flow_loss.cu, products by the cuBLAS that torch has
loaded). Everything that the call writes is allocated here, its workspace as one tensor.

ℓ = mean_j (v − u)²      v = head(x_t, t, h)      dv = (2 / d) · coefficient · (v − u), and backward from there

Gradients of matrices are rounded to their dtype. Those of vectors stay float32, in the order of the parameters, but
Σ dy, dγ and dβ of each layer: b_1, b_2, then (b, γ, β) of each layer, b_out.
"""

import ctypes
import functools
from itertools import accumulate, islice

import torch
from torch import Tensor

from .. import ACCESS_BYTES, empty_rows
from ..cuda import DTYPES, address, library, stream_of, structure, threads_for
from ..norm_act import EPS
from ..sums.cuda import MOST_GROUPS, blocks_for, rank_and_counts
from . import FlowPath
from .cuda import path_tensors

_ALIGNMENT = 256  # bytes

FlowLossLayer = structure("FlowLossLayer", pointers="weight bias gamma beta y a mean rstd d_weight")
FlowLossArguments = structure(
    "FlowLossArguments",
    pointers="gemm handle h coefficient targets times noise_id anchor time_index seed w_1 b_1 w_2 b_2 w_out b_out "
    "layers d_w_1 d_w_2 d_w_out vectors dh loss x_t v u sinusoid gate silu tau table partial moments wide "
    "order bounds rank_and_counts split",
    int64="n hidden target_row h_row dh_row d_row width_row",
    int32="d inner width num_times num_layers vector_dtype targets_dtype add_to_dh "
    "mse_threads mse_blocks mse_rows act_threads back_threads back_blocks back_rows",
    float32="time_scale hidden_scale target_scale source_std eps",
)


@functools.cache
def _gemm() -> int | None:
    """The address of cublasGemmEx, or None."""
    if library().emulated:
        return library().emulated_gemm
    try:
        name = f"libcublas.so.{torch.version.cuda.split('.')[0]}"
        return ctypes.cast(ctypes.CDLL(name).cublasGemmEx, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def serves_flow_loss(h: Tensor, params: list[Tensor], targets: Tensor, num_times: int) -> bool:
    """Whether `flow_loss` takes them: rows in bfloat16 or float32, parameters that need no cast and no copy, sizes of
    which every row starts on 16 bytes, and times few enough to sort by."""
    if h.dtype not in (torch.bfloat16, torch.float32) or h.stride(1) != 1 or h.shape[0] == 0:
        return False
    if num_times > MOST_GROUPS or targets.dtype not in DTYPES:
        return False
    if not all(p.dtype == h.dtype and p.is_contiguous() for p in params):
        return False
    sizes = h.shape[1], *params[2].shape, params[4].shape[0]
    return not any(size * h.element_size() % ACCESS_BYTES for size in sizes) and _gemm() is not None


def flow_loss(
    h: Tensor,  # (n, H)
    params: list[Tensor],  # of the head, in order
    path: FlowPath,
    coefficient: Tensor,  # (n,) float32, scale of each row's gradient
    time_scale: float,
    hidden_scale: float,
    *,
    matrices: list[Tensor],  # where the gradients of the matrices among params go; empty: not needed
    vectors: Tensor | None,  # and those of the vectors, side by side
    dh: Tensor | None,  # (n, H), where the gradient of h goes, may be h itself
    add_to_dh: bool,
) -> Tensor:
    """ℓ (n,) in float32."""
    targets, times, noise_id, anchor, time_index = path_tensors(path)
    coefficient, dtype = coefficient.float().contiguous(), h.dtype
    w_1, b_1, w_2, b_2, *of_layers, w_out, b_out = params
    (n, hidden), (d, inner), width, num_layers = h.shape, w_2.shape, of_layers[0].shape[0], len(of_layers) // 4
    assert len(w_out) == d, "a head whose output is no velocity"  # check_head_shape has refused it
    d_w_1, d_w_2, *d_weights, d_w_out = map(Tensor.data_ptr, matrices) if matrices else [None] * (num_layers + 3)
    num_times, size = times.shape[0], dtype.itemsize
    mse_threads, back_threads = threads_for(d, dtype, 256), threads_for(width, dtype, 256)
    (mse_blocks, mse_rows), (back_blocks, back_rows) = blocks_for(n, mse_threads), blocks_for(n, back_threads)
    col_blocks = -(-d * size // (16 * mse_threads))
    d_row, width_row = (empty_rows(0, w, dtype, h.device).stride(0) for w in (d, width))
    twice = 2 if size == 2 else 1
    sizes = dict(  # bytes, by the names of csrc/launchers.h
        x_t=n * d_row * size,
        v=n * d_row * size,
        u=n * d_row * size,
        sinusoid=twice * num_times * d * size,
        gate=num_times * inner * size,
        silu=twice * num_times * inner * size,
        tau=twice * num_times * d * size,
        table=4 * num_times * (width + 3),
        partial=4 * max(mse_blocks * (d + 3), 3 * back_blocks * (width + 3)),
        moments=8 * n if width * size > 16 * back_threads else 0,
        wide=4 * twice * num_times * max(d, inner),
        order=4 * n,
        bounds=4 * (num_times + 1),
        rank_and_counts=4 * rank_and_counts(n, num_times),
        split=twice * num_times * max(inner, width) * size,
    )
    layer_sizes = dict(y=n * width_row * size, a=n * width_row * size, mean=4 * n, rstd=4 * n)
    padded = [-(-b // _ALIGNMENT) * _ALIGNMENT for b in (*sizes.values(), *[*layer_sizes.values()] * num_layers)]
    room = torch.empty(sum(padded), dtype=torch.uint8, device=h.device)
    starts = accumulate(padded, initial=room.data_ptr())
    buffers = dict(zip(sizes, starts, strict=False))
    layers = (FlowLossLayer * num_layers)()
    for k, layer in enumerate(layers):
        weight, bias, gamma, beta = of_layers[4 * k : 4 * k + 4]
        layer.weight, layer.bias, layer.d_weight = weight.data_ptr(), bias.data_ptr(), d_weights[k]
        layer.gamma, layer.beta = gamma.data_ptr(), beta.data_ptr()
        layer.y, layer.a, layer.mean, layer.rstd = islice(starts, 4)
    loss = torch.empty(n, col_blocks, dtype=torch.float32, device=h.device)
    arguments = FlowLossArguments(
        gemm=_gemm(), handle=torch.cuda.current_blas_handle() if h.is_cuda else None,
        h=h.data_ptr(), h_row=h.stride(0), dh=address(dh), dh_row=0 if dh is None else dh.stride(0),
        add_to_dh=add_to_dh, coefficient=coefficient.data_ptr(), loss=loss.data_ptr(),
        targets=targets.data_ptr(), target_row=targets.stride(0), targets_dtype=DTYPES[targets.dtype],
        times=times.data_ptr(), time_index=time_index.data_ptr(), anchor=anchor.data_ptr(),
        noise_id=noise_id.data_ptr(), seed=path.seed.data_ptr(),
        target_scale=path.target_scale, source_std=path.source_std,
        w_1=w_1.data_ptr(), b_1=b_1.data_ptr(), w_2=w_2.data_ptr(), b_2=b_2.data_ptr(),
        w_out=w_out.data_ptr(), b_out=b_out.data_ptr(), layers=ctypes.addressof(layers),
        d_w_1=d_w_1, d_w_2=d_w_2, d_w_out=d_w_out, vectors=address(vectors), vector_dtype=DTYPES[of_layers[2].dtype],
        n=n, hidden=hidden, d=d, d_row=d_row, inner=inner, width=width, width_row=width_row,
        num_times=num_times, num_layers=num_layers, time_scale=time_scale, hidden_scale=hidden_scale, eps=EPS,
        mse_threads=mse_threads, mse_blocks=mse_blocks, mse_rows=mse_rows, act_threads=threads_for(width, dtype, 512),
        back_threads=back_threads, back_blocks=back_blocks, back_rows=back_rows, **buffers,
    )  # fmt: skip
    library().flow_loss(arguments, DTYPES[dtype], stream_of(h))
    return loss.view(n) if col_blocks == 1 else loss.sum(1)

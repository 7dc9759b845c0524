"""The flow loss and its gradients in one call: csrc/flow_loss.cu, with products by the cuBLAS that torch has loaded.

Everything it writes is allocated here, the room it works in as one tensor; the call itself launches and returns.
"""

import ctypes
import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import ACCESS_BYTES, empty_rows
from ..cuda import DTYPES, library, stream_of, threads_for
from ..flow import FlowPath
from ..flow.cuda import path_arguments
from ..norm_act import EPS
from ..sums.cuda import MOST_GROUPS, parts_for, room_to_group

_ALIGNMENT = 256  # bytes
_TENSORS = "h coefficient targets times noise_id anchor time_index seed"
_POINTERS = f"gemm handle stream {_TENSORS} params matrices work vectors dh loss"
_SIZES = "n hidden target_row h_row dh_row d_row width_row"
_NUMBERS = (
    "d inner width num_times layers gain_dtype targets_dtype add_to_dh "
    "mse_threads mse_parts mse_rows act_threads back_threads back_parts back_rows"
)
_SCALES = "time_scale hidden_scale target_scale source_std eps"


class Arguments(ctypes.Structure):
    """`FlowLoss` of csrc/launchers.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS.split()]
        + [(name, ctypes.c_int64) for name in _SIZES.split()]
        + [(name, ctypes.c_int) for name in _NUMBERS.split()]
        + [(name, ctypes.c_float) for name in _SCALES.split()]
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


def _addresses(values: Iterable[int]) -> ctypes.Array:
    values = list(values)
    return (ctypes.c_void_p * len(values))(*values)


def _room(bytes_of: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """One tensor for buffers of so many bytes, and where each begins in it."""
    starts, end = [], 0
    for count in bytes_of:
        starts.append(end)
        end += -(-count // _ALIGNMENT) * _ALIGNMENT
    return torch.empty(end, dtype=torch.uint8, device=device), starts


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
    coefficient = coefficient.float().contiguous()
    (n, hidden), (d, inner), width, dtype = h.shape, params[2].shape, params[4].shape[0], h.dtype
    (targets, noise_id, anchor), layers = path_arguments(path), (len(params) - 6) // 4
    times, time_index = path.times.float().contiguous(), path.time_index.int().contiguous()
    num_times, size = times.shape[0], dtype.itemsize
    mse_threads, back_threads = threads_for(d, dtype, 256), threads_for(width, dtype, 256)
    mse_parts, back_parts = parts_for(n, mse_threads), parts_for(n, back_threads)
    twice = 2 if size == 2 else 1
    columns = -(-d * size // (16 * mse_threads))
    d_row, width_row = (empty_rows(0, w, dtype, h.device).stride(0) for w in (d, width))
    bytes_of = [
        *[n * d_row * size] * 3,  # x_t; v, then dv; u
        twice * num_times * d * size,  # sinusoid
        num_times * inner * size,  # its layer before the activation
        twice * num_times * inner * size,  # and after
        twice * num_times * d * size,  # τ
        4 * num_times * (width + 3),  # the table of row biases, then its gradient
        4 * max(mse_parts[0] * (d + 3), 3 * back_parts[0] * (width + 3)),  # partial sums
        8 * n if width * size > 16 * back_threads else 0,  # moments of rows wider than a block
        4 * twice * num_times * max(d, inner),  # products of so many rows, not yet rounded
        4 * (n + num_times + 1 + room_to_group(n, num_times)),  # rows by time
        twice * num_times * max(inner, width) * size,  # their parts
        *[n * width_row * size, n * width_row * size, 4 * n, 4 * n] * layers,
    ]
    room, starts = _room(bytes_of, h.device)
    loss = torch.empty(n, columns, dtype=torch.float32, device=h.device)
    on_host = [
        _addresses(p.data_ptr() for p in params),
        _addresses(m.data_ptr() for m in matrices),
        _addresses(room.data_ptr() + start for start in starts),
    ]
    arguments = Arguments(
        _gemm(),
        torch.cuda.current_blas_handle() if h.is_cuda else None,
        stream_of(h),
        *(t.data_ptr() for t in (h, coefficient, targets, times, noise_id, anchor, time_index, path.seed)),
        *map(ctypes.addressof, on_host),
        None if vectors is None else vectors.data_ptr(),
        None if dh is None else dh.data_ptr(),
        loss.data_ptr(),
        *(n, hidden, targets.stride(0), h.stride(0), 0 if dh is None else dh.stride(0), d_row, width_row),
        *(d, inner, width, num_times, layers, DTYPES[params[6].dtype], DTYPES[targets.dtype], add_to_dh),
        *(mse_threads, *mse_parts, threads_for(width, dtype, 512), back_threads, *back_parts),
        *(time_scale, hidden_scale, path.target_scale, path.source_std, EPS),
    )
    library().flow_loss(ctypes.byref(arguments), DTYPES[dtype])
    return loss.view(n) if columns == 1 else loss.sum(1)

"""The gradients that a forward pass kernels behind, and the one thing backward does with them: scale them.

Forward keeps gradients of the loss itself (in float16, of the loss times its normalizer). The head's many parameters
share two buffers, one for matrices in the dtype of the products and one for vectors in float32, so that backward scales
all of them in two launches. Where the graph is freed by this backward, what is kept in its final dtype is scaled in
place, and not even read where the factor is 1: no second lm_head gradient, and in the usual case no time.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.backend import kernels_of
from .numerics import as_written, wide_dtype

_ALIGNMENT = 64  # elements: every matrix starts where a GEMM likes to write


def _matrix_sizes(shapes: Sequence[torch.Size]) -> list[int]:
    """Elements of the matrices among `shapes`, rounded up to the alignment."""
    return [-(-math.prod(s) // _ALIGNMENT) * _ALIGNMENT for s in shapes if len(s) == 2]


def matrix_views(buffer: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The matrices among `shapes` as views of one buffer."""
    matrices, sizes = [s for s in shapes if len(s) == 2], _matrix_sizes(shapes)
    exact = [math.prod(s) for s in matrices]
    parts = zip(buffer.split(sizes), sizes, exact, matrices, strict=True)
    return [(part if size == count else part[:count]).view(shape) for part, size, count, shape in parts]


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the head's matrix gradients until they are scaled: wide in float16, where a sum over all rows, not yet divided
    by the normalizer, goes past 65504."""
    return wide_dtype(dtype) if dtype == torch.float16 else dtype


def new_matrices(shapes: Sequence[torch.Size], like: Tensor) -> Tensor:
    """The buffer of the matrices. A gap between two of them holds zeros: it is scaled along with them."""
    exact = sum(math.prod(s) for s in shapes if len(s) == 2)
    total, dtype = sum(_matrix_sizes(shapes)), product_dtype(like.dtype)
    return like.new_empty(total, dtype=dtype) if total == exact else like.new_zeros(total, dtype=dtype)


def new_vectors(shapes: Sequence[torch.Size], like: Tensor) -> Tensor:
    """The buffer of the vectors, which are sums over rows."""
    return like.new_empty(sum(s[0] for s in shapes if len(s) == 1), dtype=wide_dtype(like.dtype))


def parameter_grads(
    matrices: Tensor, vectors: Tensor, params: Sequence[tuple[torch.Size, torch.dtype]], need: Sequence[bool]
) -> list[Tensor | None]:
    """Each parameter's gradient from the two scaled buffers; None where it is not needed."""
    if not any(need):
        return [None] * len(params)
    shapes = [shape for shape, _ in params]
    matrix = iter(matrix_views(matrices, shapes))
    vector = iter(vectors.split([s[0] for s in shapes if len(s) == 1]))
    grads = [next(matrix) if len(shape) == 2 else next(vector) for shape in shapes]
    return [g.to(dtype) if n else None for g, (_, dtype), n in zip(grads, params, need, strict=True)]


def fake_parameter_grads(like: Tensor, params: Sequence[Tensor], need: bool) -> tuple[Tensor, Tensor]:
    """Tensors of the shape and dtype of the two buffers."""
    shapes = [p.shape for p in params] if need else []
    return like.new_empty(sum(_matrix_sizes(shapes)), dtype=product_dtype(like.dtype)), new_vectors(shapes, like)


@torch.library.custom_op("sfr_kernels::scale_gradients", mutates_args=())
def scale_gradients(
    upstream: Tensor,  # zero-dim
    normalizer: Tensor | None,  # zero-dim; None is 1
    dh: Tensor,  # (n, H)
    token_row: Tensor,  # (N,) int32, the row of dh of each token; empty: dh has one for every token, in order
    decoder: Sequence[Tensor],
    head: Sequence[Tensor],
    dtype: torch.dtype,  # of dhidden and the decoder's gradients
    head_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """[dhidden (N, H), *decoder, *head], each times upstream / normalizer in float32, all of them new."""
    with as_written(dh):
        kernels, factor = kernels_of(backend), _factor(upstream, normalizer, dh)
        if token_row.numel():
            dhidden = kernels.scatter_rows(dh, factor, token_row, dtype)
        else:
            dhidden = kernels.scale(dh, factor, dtype)
        rest = [(x, dtype) for x in decoder] + [(x, head_dtype) for x in head]
        return [dhidden, *(kernels.scale(x, factor, t) for x, t in rest)]


@scale_gradients.register_fake
def _(upstream, normalizer, dh, token_row, decoder, head, dtype, head_dtype, backend):
    tokens = token_row.shape[0] or dh.shape[0]
    rest = [(x, dtype) for x in decoder] + [(x, head_dtype) for x in head]
    return [dh.new_empty(tokens, dh.shape[1], dtype=dtype), *(torch.empty_like(x, dtype=t) for x, t in rest)]


def _factor(upstream: Tensor, normalizer: Tensor | None, dh: Tensor) -> Tensor:
    factor = upstream.to(wide_dtype(dh.dtype))
    return factor if normalizer is None else factor / normalizer


def finish_gradients(upstream, normalizer, dh, token_row, decoder, head, dtype, head_dtype, backend) -> list[Tensor]:
    """`scale_gradients` in a backward; in place where nobody will look at the saved tensors again."""
    if type(dh) is not Tensor or _graph_is_kept():  # traced, or there may be another backward
        return scale_gradients(upstream, normalizer, dh, token_row, decoder, head, dtype, head_dtype, backend)
    with as_written(dh):
        factor = _factor(upstream, normalizer, dh)
        return scale_in_place(kernels_of(backend), factor, dh, token_row, decoder, head, dtype, head_dtype)


def scale_in_place(kernels, factor, dh, token_row, decoder, head, dtype, head_dtype) -> list[Tensor]:
    """As `scale_gradients`, but what has its final dtype and place is written over."""

    def scaled(x, wanted):
        return kernels.scale_(x, factor) if x.dtype == wanted else kernels.scale(x, factor, wanted)

    scattered = token_row.numel() > 0
    dhidden = kernels.scatter_rows(dh, factor, token_row, dtype) if scattered else scaled(dh, dtype)
    return [dhidden, *(scaled(x, dtype) for x in decoder), *(scaled(x, head_dtype) for x in head)]


def _graph_is_kept() -> bool:
    """Whether the running backward kernels the graph for another one; if torch cannot say, it may."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def head_dtype_of(params: Sequence[Tensor], hidden_dtype: torch.dtype) -> torch.dtype:
    """One dtype in which every parameter's gradient can be kept until it is cast to its own."""
    dtypes = {p.dtype for p in params}
    return dtypes.pop() if len(dtypes) == 1 else wide_dtype(hidden_dtype)

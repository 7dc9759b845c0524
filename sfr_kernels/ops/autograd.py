"""Operators, and the backward of the losses, which scales the gradients that forward left.

An operator is one function of `Inputs` and a frozen description of the call, a NamedTuple. Where something traces or
intercepts the call it goes through torch.library, where all operators have one schema and the description lies packed
in lists; else straight through autograd, which saves what torch.library does in Python at every call. Both ways run the
same function and the same backward.

The losses leave gradients behind in forward, of the loss itself (in float16, of the loss times its normalizer). The
velocity head's parameters share two buffers, one for matrices in the dtype of the products and one for vectors in
float32, so that backward scales all of them in two launches. Where this backward frees the graph, a gradient kept in
its final dtype is scaled in place, and not even read where the factor is 1: that saves a second lm_head gradient, and
in the usual case all of the time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from ..kernels.scale import scale, scale_, scatter_rows
from .numerics import split_normalizer, wide_dtype, without_autocast

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ALIGNMENT = 64  # elements: every matrix starts where a GEMM likes to write


class Inputs(NamedTuple):
    """What an operator is differentiable in. All but the parameters share one dtype."""

    hidden: Tensor  # (N, H)
    weight: Tensor = None  # type: ignore[assignment]  # (V, H); None: the operator has no decoder
    bias: Tensor | None = None  # (V,)
    low: Tensor | None = None  # (N, r) and
    up: Tensor | None = None  # (V, r): what lora.py adds to the logits, low · upᵀ
    params: Sequence[Tensor] = ()  # of the velocity head


_INPUTS = len(Inputs._fields)


class Need(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    low: bool = False
    up: bool = False
    params: Any = False  # forward: bool, any of them; backward: list of bool, each


def pack(call: tuple) -> tuple[list[Tensor], list[float], list[int], str]:
    """A description as an operator's schema takes it: tensors, floats, integers, and text, whose first line has a
    letter for the kind of each field."""
    kinds, tensors, floats, integers, texts = "", [], [], [], []
    for value in _flat(call):
        if value is None:
            kinds += "n"
        elif isinstance(value, Tensor):
            kinds += "t"
            tensors.append(value)
        elif isinstance(value, str):
            kinds += "s"
            texts.append(value)
        elif isinstance(value, float):
            kinds += "f"
            floats.append(value)
        elif isinstance(value, torch.dtype):
            kinds += "d"
            integers.append(_DTYPES.index(value))
        else:
            kinds += "b" if isinstance(value, bool) else "i"
            integers.append(int(value))
    return tensors, floats, integers, "\n".join([kinds, *texts])


def unpack(kind: type, tensors, floats, integers, text):
    """The description of type `kind` that `pack` took apart."""
    kinds, *texts = text.split("\n")
    tensors, floats, integers, texts = iter(tensors), iter(floats), iter(integers), iter(texts)
    take = {
        "n": lambda: None,
        "t": lambda: next(tensors),
        "s": lambda: next(texts),
        "f": lambda: next(floats),
        "i": lambda: next(integers),
        "b": lambda: bool(next(integers)),
        "d": lambda: _DTYPES[next(integers)],
    }
    return _nested(kind, (take[k]() for k in kinds))


def _flat(call: Sequence) -> list:
    values = []
    for value in call:
        values += _flat(value) if isinstance(value, tuple | list) else [value]
    return values


def _nested(kind: type, values: Iterator):
    fields = kind.__annotations__.values()
    return kind(*[_nested(f, values) if isinstance(f, type) and issubclass(f, tuple) else next(values) for f in fields])


class Operator:
    """`operator(inputs, call)`: a list of tensors, of which the first is differentiable in the inputs."""

    def __init__(
        self,
        name: str,
        call_type: type,  # the NamedTuple that describes a call; its fields may be NamedTuples
        forward: Callable,  # (inputs, call, need) → list of tensors
        fake: Callable,  # the same, of tensors without data
        save: Callable,  # (ctx, inputs, call, output): keeps what backward needs
        backward: Callable,  # (ctx, upstream, need) → gradients as `Inputs`
    ):
        self.call_type, self.forward, self.save, self.backward = call_type, forward, save, backward

        def function(
            hidden: Tensor, weight: Tensor | None, bias: Tensor | None, low: Tensor | None, up: Tensor | None,
            params: Sequence[Tensor], tensors: Sequence[Tensor], floats: Sequence[float], integers: Sequence[int],
            text: str, need: Sequence[bool],
        ) -> list[Tensor]:  # fmt: skip
            call = unpack(call_type, tensors, floats, integers, text)
            return forward(Inputs(hidden, weight, bias, low, up, params), call, Need(*need))

        def fake_function(hidden, weight, bias, low, up, params, tensors, floats, integers, text, need):
            call = unpack(call_type, tensors, floats, integers, text)
            return fake(Inputs(hidden, weight, bias, low, up, params), call, Need(*need))

        self.op = torch.library.custom_op(f"sfr_kernels::{name}", function, mutates_args=())
        self.op.register_fake(fake_function)
        self.op.register_autograd(self._backward_of_op, setup_context=self._setup_context)

    def __call__(self, x: Inputs, call: tuple) -> Sequence[Tensor]:
        grad = torch.is_grad_enabled()
        flags = [grad and t is not None and t.requires_grad for t in x[:-1]]
        need = Need(*flags, grad and any(p.requires_grad for p in x.params))
        tensors = [t for t in (*x[:-1], *x.params) if t is not None]  # `call` has constants, which were checked
        if has_tangent(tensors):
            raise NotImplementedError(
                "the losses have no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad, and what is "
                "built on them), only a gradient: backend='reference' has both"
            )
        if _needs_dispatcher(tensors):
            return self.through_dispatcher(x, call, need)
        if not grad:
            return self.forward(x, call, need)
        return _Plain.apply(self, call, need, *x[:-1], *x.params)

    def through_dispatcher(self, x: Inputs, call: tuple, need: Need) -> list[Tensor]:
        return self.op(*x[:-1], list(x.params), *pack(call), list(need))

    def _setup_context(self, ctx, inputs, output):
        x, rest = Inputs(*inputs[:_INPUTS]), inputs[_INPUTS:]
        call = unpack(self.call_type, *rest[:4])
        # torch expects [None, …] for a list of tensors, an empty one included, and None for any other list
        lists = [isinstance(v, list | tuple) and all(isinstance(t, Tensor) for t in v) for v in rest]
        ctx.rest = [[None] * len(v) if flag else None for v, flag in zip(rest, lists, strict=True)]
        self._keep(ctx, x, call, output)

    def _keep(self, ctx, x: Inputs, call: tuple, output: Sequence[Tensor]) -> None:
        self.save(ctx, x, call, output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def _backward_of_op(self, ctx, grads):
        return *self._gradients(ctx, grads[0], Need(*ctx.needs_input_grad[:_INPUTS])), *ctx.rest

    def _gradients(self, ctx, upstream: Tensor | None, need: Need) -> Inputs:
        """A gradient for each input, None where it is not needed."""
        if upstream is None:
            return Inputs(None, params=[None] * len(need.params))
        *found, params = self.backward(ctx, upstream, need)
        return Inputs(*(g if flag else None for g, flag in zip(found, need[:-1], strict=True)), params)


class _Plain(torch.autograd.Function):
    """An operator called straight through autograd."""

    @staticmethod
    def forward(ctx, operator: Operator, call: tuple, need: Need, *inputs):
        ctx.operator, x = operator, Inputs(*inputs[: _INPUTS - 1], inputs[_INPUTS - 1 :])
        output = operator.forward(x, call, need)
        operator._keep(ctx, x, call, output)
        return tuple(output)

    @staticmethod
    def backward(ctx, upstream, *_):
        flags = ctx.needs_input_grad[3:]
        need = Need(*flags[: _INPUTS - 1], flags[_INPUTS - 1 :])
        with torch.no_grad():
            *found, params = ctx.operator._gradients(ctx, upstream, need)
        found += params
        if torch.is_grad_enabled():  # create_graph: a gradient without a history would be taken for a constant
            refuse = torch._C._functions.DelayedError(b"the losses have first derivatives only", 1)
            found = [None if g is None else refuse(g.detach().requires_grad_()) for g in found]
        return None, None, None, *found


def _needs_dispatcher(tensors: Sequence[Tensor]) -> bool:
    """Whether a compiler, a mode, a transform or a subclass of Tensor must see the operator."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(type(t) is not Tensor and type(t) is not nn.Parameter for t in tensors)


def has_tangent(values: Iterable) -> bool:
    """Whether forward-mode differentiation follows one of the tensors, in any of the transforms that are going on."""
    return forward_ad._current_level >= 0 and any(_has_tangent(x) for x in values if isinstance(x, Tensor))


def _has_tangent(x: Tensor) -> bool:
    transform = torch._C._functorch.peek_interpreter_stack()  # the innermost, which alone can be asked
    if transform is None or transform.key() == torch._C._functorch.TransformType.Jvp:
        if forward_ad.unpack_dual(x, level=0).tangent is not None:
            return True
        if transform is None:
            return False
    if torch._C._functorch.maybe_get_level(x) == transform.level():
        x = torch._C._functorch.get_unwrapped(x)
    with temporarily_pop_interpreter_stack():
        return _has_tangent(x)


# ---------------------------------------------------------------------------------------------------------------------
# The gradients that a loss leaves: its outputs end with dh (n, H); dW and db if it has a decoder, and dlow (n, r) and
# dup if that has adapters; the two buffers of the head's parameters if it has some. Each is empty where not needed.

OF_ROWS = 0, 3  # where dh and dlow are, which have a row for each of the supervised ones


class SavedGradients(NamedTuple):
    """What a loss's forward left for `finish`, beside the tensors normalizer, token_row, and the gradients."""

    num_decoder: int
    params: list[tuple[torch.Size, torch.dtype]]
    dtype: torch.dtype  # of hidden
    backend: str


def saved_gradients(x: Inputs, call, output: Sequence[Tensor]) -> tuple[list[Tensor | None], SavedGradients]:
    """Of a `call` that has normalizer, backend and token_row (None: it is the output before the gradients)."""
    params = [(p.shape, p.dtype) for p in x.params]
    num_decoder = 0 if x.weight is None else 2 if x.up is None else 4
    saved = SavedGradients(num_decoder, params, x.hidden.dtype, call.backend)
    first = len(output) - 1 - saved.num_decoder - (2 if saved.params else 0)
    token_row = output[first - 1] if call.token_row is None else call.token_row
    return [split_normalizer(call.normalizer, saved.dtype)[1], token_row, *output[first:]], saved


def keep_gradients(ctx, x: Inputs, call, output: Sequence[Tensor]) -> None:
    """`save` of a loss."""
    tensors, ctx.saved = saved_gradients(x, call, output)
    ctx.save_for_backward(*tensors)


def finish_gradients(ctx, upstream: Tensor, need: Need) -> Inputs:
    """`backward` of a loss."""
    return finish(ctx.saved_tensors, ctx.saved, upstream, need)


def finish(
    tensors: Sequence[Tensor | None], saved: SavedGradients, upstream: Tensor, need: Need, fresh: bool = False
) -> Inputs:
    """The gradients that forward left, each times upstream / normalizer, in its place and dtype."""
    normalizer, token_row, *grads = tensors
    factor = upstream.to(wide_dtype(saved.dtype))
    factor = factor if normalizer is None else factor / normalizer
    dtypes = {dtype for _, dtype in saved.params}
    head_dtype = dtypes.pop() if len(dtypes) == 1 else factor.dtype  # in which all can be kept until they are cast
    grads, head = grads[: 1 + saved.num_decoder], grads[1 + saved.num_decoder :]
    arguments = factor, token_row, grads, head, saved.dtype, head_dtype, saved.backend
    # traced, or there may be another backward that reads them; never if they were made by this one (`fresh`)
    if type(grads[0]) is not Tensor or (not fresh and _graph_is_kept()):
        found = scale_gradients_op(*arguments)
    else:
        found = scale_gradients(*arguments, in_place=True)
    params = parameter_grads(found[len(grads) :], saved.params, need.params)
    return Inputs(*found[: len(grads)], params=params)


def scale_gradients(
    factor: Tensor,  # zero-dim
    token_row: Tensor,  # (N,) int32, the row of each token; empty: there is one for every token, in order
    grads: Sequence[Tensor],  # dh (n, H), then the decoder's gradients
    head: Sequence[Tensor],
    dtype: torch.dtype,  # of dhidden and the decoder's gradients
    head_dtype: torch.dtype,
    backend: str,
    in_place: bool = False,  # write over what has its final dtype and place
) -> list[Tensor]:
    """[dhidden (N, H), …], each times the factor in float32; all of them new unless `in_place`."""

    def scaled(x: Tensor, wanted: torch.dtype) -> Tensor:
        return scale_(backend, x, factor) if in_place and x.dtype == wanted else scale(backend, x, factor, wanted)

    with without_autocast(factor):
        found = [
            scatter_rows(backend, x, factor, token_row, dtype)
            if i in OF_ROWS and token_row.numel()
            else scaled(x, dtype)
            for i, x in enumerate(grads)
        ]
        return found + [scaled(x, head_dtype) for x in head]


@torch.library.custom_op("sfr_kernels::scale_gradients", mutates_args=())
def scale_gradients_op(
    factor: Tensor, token_row: Tensor, grads: Sequence[Tensor], head: Sequence[Tensor],
    dtype: torch.dtype, head_dtype: torch.dtype, backend: str,
) -> list[Tensor]:  # fmt: skip
    return scale_gradients(factor, token_row, grads, head, dtype, head_dtype, backend)


@scale_gradients_op.register_fake
def _(factor, token_row, grads, head, dtype, head_dtype, backend):
    found = [
        x.new_empty((token_row.shape[0] or x.shape[0], x.shape[1]) if i in OF_ROWS else x.shape, dtype=dtype)
        for i, x in enumerate(grads)
    ]
    return [*found, *(torch.empty_like(x, dtype=head_dtype) for x in head)]


def _graph_is_kept() -> bool:
    """Whether the running backward leaves the graph for another one; if torch cannot say, it may."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


# ---------------------------------------------------------------------------------------------------------------------
# The two buffers of the velocity head's gradients.


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
    by the normalizer, exceeds 65504."""
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
    buffers: Sequence[Tensor], params: Sequence[tuple[torch.Size, torch.dtype]], need: Sequence[bool]
) -> list[Tensor | None]:
    """Each parameter's gradient from the matrices' and the vectors' buffer, scaled; None where it is not needed."""
    if not any(need):
        return [None] * len(params)
    (matrices, vectors), shapes = buffers, [shape for shape, _ in params]
    matrix = iter(matrix_views(matrices, shapes))
    vector = iter(vectors.split([s[0] for s in shapes if len(s) == 1]))
    grads = [next(matrix) if len(shape) == 2 else next(vector) for shape in shapes]
    return [g.to(dtype) if n else None for g, (_, dtype), n in zip(grads, params, need, strict=True)]


def fake_parameter_grads(like: Tensor, params: Sequence[Tensor], need: bool) -> tuple[Tensor, Tensor]:
    """Tensors of the shape and dtype of the two buffers."""
    shapes = [p.shape for p in params] if need else []
    return like.new_empty(sum(_matrix_sizes(shapes)), dtype=product_dtype(like.dtype)), new_vectors(shapes, like)

"""Calling an operator: through torch.library where something traces or intercepts it, else straight through autograd.

What torch.library does in Python around a custom op with autograd is a cost of every call, which a plain one need not
pay. Both ways run the same function, and the same backward.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad


class _Context:
    """What a backward sees of autograd's own context: the gradients needed, in the shape of the operator's inputs."""

    def __init__(self, ctx, needs_input_grad: tuple):
        self._ctx, self.needs_input_grad = ctx, needs_input_grad

    def __getattr__(self, name):
        return getattr(self._ctx, name)


class _Plain(torch.autograd.Function):
    """An operator whose inputs lie flat: before the others come the `Call` and how many the list has."""

    @staticmethod
    def forward(ctx, call: "Call", count: int, *flat):
        ctx.call, ctx.count = call, count
        inputs = call.nested(flat, count)
        output = call.function(*inputs)
        call.setup_context(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    def backward(ctx, *grads):
        call, count = ctx.call, ctx.count
        seen = _Context(ctx, call.nested(ctx.needs_input_grad[2:], count))
        with torch.no_grad():
            found = call.flat(call.backward(seen, grads) if call.returns_list else call.backward(seen, *grads))
        if torch.is_grad_enabled():  # create_graph: a gradient without a history would be taken for a constant
            refuse = torch._C._functions.DelayedError(b"the losses have first derivatives only", 1)
            found = [None if g is None else refuse(g.detach().requires_grad_()) for g in found]
        return None, None, *found


class Call:
    """A custom op with its backward registered, called as the op is."""

    def __init__(
        self,
        op: torch.library.CustomOpDef,
        function: Callable,  # what the op runs
        setup_context: Callable,  # as register_autograd takes it
        backward: Callable,
        *,
        list_at: int | None = None,  # which of the inputs is a list of tensors
        returns_list: bool = False,  # rather than a tuple of known length
    ):
        op.register_autograd(backward, setup_context=setup_context)
        self.op, self.function, self.setup_context, self.backward = op, function, setup_context, backward
        self.list_at, self.returns_list = list_at, returns_list

    def __call__(self, *inputs) -> Sequence[Tensor]:
        flat = self.flat(inputs)
        if has_tangent(flat):
            raise NotImplementedError(
                "the losses have no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad, and what is "
                "made of them), only a gradient: backend='reference' has both"
            )
        if _is_watched(flat):
            return self.op(*inputs)
        if not torch.is_grad_enabled():
            return self.function(*inputs)
        return _Plain.apply(self, 0 if self.list_at is None else len(inputs[self.list_at]), *flat)

    def flat(self, inputs: Sequence) -> tuple:
        k = self.list_at
        return tuple(inputs) if k is None else (*inputs[:k], *inputs[k], *inputs[k + 1 :])

    def nested(self, flat: Sequence, count: int) -> tuple:
        k = self.list_at
        return tuple(flat) if k is None else (*flat[:k], list(flat[k : k + count]), *flat[k + count :])


def _is_watched(inputs: Sequence) -> bool:
    """Whether a compiler, a mode, a transform or a subclass of Tensor wants to see the operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(x, Tensor) and type(x) not in (Tensor, nn.Parameter) for x in inputs)
    )


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

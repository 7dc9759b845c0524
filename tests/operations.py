"""What is really computed: a mode that sees every operation, inside the library's own ops too."""

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "mm.out": 0, "addmm.out": 1}  # where the first factor is


class Operations(TorchDispatchMode):
    """Counts multiplications, and the shapes of the tensors that operations made (not: views of others, or tensors
    written into); and whether the rows of every matrix of a product start on 16 bytes."""

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.shapes = []
        self.offsets = []  # in bytes, of the rows and the first number of each matrix

    def made(self, shape) -> int:
        return sum(s == tuple(shape) for s in self.shapes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "sfr_kernels":
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        out = function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        if name in PRODUCTS:
            a, b = args[PRODUCTS[name] :][:2]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            for x in (a, b, out):
                self.offsets.append((max(x.stride()) * x.element_size() % 16, x.data_ptr() % 16))
        given = [t.untyped_storage()._cdata for t in [*args, *kwargs.values()] if isinstance(t, Tensor)]
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                self.shapes.append(tuple(t.shape))
        return out

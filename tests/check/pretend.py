"""A GPU that is none: `python -m check.pretend MODULE ARGUMENT …` runs a module with tensors that say they are on
cuda:0, and lie on the CPU. What mixes tensors of both devices raises, as does what waits for the device where
`torch.cuda.set_sync_debug_mode("error")` forbids it.

So what is written for a GPU can be run without one: tests that need one, a training by Trainer, the demo.

    export PYTHONPATH=.:tests
    python -c "import emulation, pathlib; print(emulation.compile_emulation(pathlib.Path('/tmp')))"
    export SFR_KERNELS_CUDA_LIBRARY=/tmp/libemulated.so TRITON_INTERPRET=1
    python -m check.pretend pytest -m gpu tests/test_gpu.py -k "not compiled"
    SFR_KERNELS_BACKEND=torch python -m check.pretend sfr_kernels train --out runs/pretended --steps 4

Kernels run in Triton's interpreter, or emulated, or as those of torch. It sees no races, no memory and no time; nothing
in other threads and processes, where gpu_check and bench work; no copy that autograd makes back to the other device;
not CUDA's autocast; and it does not compile. bfloat16 is wrong in Triton's interpreter.
"""

import functools
import runpy
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BASE = torch._C.TensorBase
KINDS = ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
FACTORIES = (*KINDS, *(f"{kind}_like" for kind in KINDS), "arange", "tensor", "as_tensor", "eye", "linspace",
             "randperm")  # fmt: skip
OF_TENSORS = ("to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
MIXING = ("copy_", "_to_copy", "set_", "_foreach_copy_")  # operations that take tensors of both devices
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # which take indices of the CPU
WAITING = ("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select",
           "_unique2", "unique_consecutive", "bincount")  # fmt: skip

_on_gpu: dict[int, StorageWeakRef] = {}  # the storages that are there; a reference keeps the address from another
_sync = SimpleNamespace(mode="default")
given = BASE.device.__get__


class MixedDevicesError(RuntimeError):
    """An operation or a kernel was given tensors of both devices."""


class WaitError(RuntimeError):
    """The CPU would wait for the device."""


def is_there(x: Tensor) -> bool:
    return given(x).type == "cpu" and BASE.untyped_storage(x)._cdata in _on_gpu


def put(x: Tensor, there: bool = True) -> Tensor:
    storage = BASE.untyped_storage(x)
    if there:
        _on_gpu[storage._cdata] = StorageWeakRef(storage)
    else:
        _on_gpu.pop(storage._cdata, None)
    return x


def _is_device(x: object) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.split(":")[0] in ("cpu", "cuda", "meta"))


def _tensors(x: object) -> list[Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, Tensor) and given(t).type == "cpu"]


class Devices(TorchDispatchMode):
    """What is made of tensors on the GPU is on the GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.partition("::")[2]
        there = {id(t): is_there(t) for t in _tensors((args, kwargs))}
        if any(there.values()):
            self.check(function, name, args, kwargs, there)
        if function.namespace == "sfr_kernels":
            with self:
                out = OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        else:
            out = function(*args, **kwargs)
        if any(there.values()) and name != "copy_":
            here = {BASE.untyped_storage(t)._cdata for t in _tensors((args, kwargs)) if not there[id(t)]}
            for t in _tensors(out):
                if BASE.untyped_storage(t)._cdata in here:
                    raise MixedDevicesError(f"{function} mixes devices: what it writes into is on the CPU")
                put(t)
        return out

    def check(self, function, name: str, args: tuple, kwargs: dict, there: dict[int, bool]) -> None:
        tensors = _tensors((args, kwargs))
        apart = [t for t in tensors if (t.dim() or name in ("cat", "stack")) and not there[id(t)]]
        if apart and name not in MIXING and not (name in INDEXING and there[id(args[0])]):
            where = ", ".join(f"{tuple(t.shape)} on {'cuda' if there[id(t)] else 'cpu'}" for t in tensors)
            raise MixedDevicesError(f"{function} mixes devices: {where}")
        indices = _tensors(args[1]) if name in INDEXING else []
        filled = name.startswith("index_put") and args[2].numel() == 1  # a mask, and one number for all that it chooses
        mask = any((t.dtype in (torch.bool, torch.uint8) and not filled) or not there[id(t)] for t in indices)
        moves = name == "copy_" and there[id(args[0])] != there[id(args[1])]
        blocks = moves and not (kwargs.get("non_blocking") or True in args[2:])
        counts = name == "repeat_interleave" and kwargs.get("output_size") is None
        if _sync.mode == "error" and (mask or blocks or counts or name in WAITING):
            raise WaitError(f"{function} waits for the device")


def _placed(function, moves: bool = False):
    """A factory that takes cuda for a device; moves: `Tensor.to`, or what gives a tensor a device like it."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        asked = [x for x in (*args[int(moves) :], kwargs.get("device")) if _is_device(x)]
        if type(kwargs.get("device")) is int:
            asked = [GPU]
        if moves and not asked:
            asked = [x.device for x in args[1:] if isinstance(x, Tensor)]
        there = torch.device(asked[-1]).type == "cuda" if asked else None
        if _sync.mode == "error" and there is not None:
            moved = moves and is_there(args[0]) != there and not (kwargs.get("non_blocking") or True in args[1:])
            if moved or (there and function.__name__ in ("tensor", "as_tensor", "new_tensor")):
                raise WaitError(f"{function.__name__} to {asked[-1]} waits for the device")
        args = [CPU if _is_device(x) and torch.device(x).type == "cuda" else x for x in args]
        kwargs.pop("pin_memory", None)
        if there:
            kwargs |= dict(device=CPU) if "device" in kwargs else {}
        out = function(*args, **kwargs)
        if there is None or given(out).type != "cpu" or is_there(out) == there:
            return out
        return put(BASE.clone(out) if moves else out, there)

    return wrapper


def _in_context(self, function, types, args=(), kwargs=None, original=DeviceContext.__torch_function__):
    """`with torch.device("cuda")`"""
    made = function in _device_constructors() and (kwargs or {}).get("device") is None  # before it is put in there
    out = original(self, function, types, args, kwargs)
    return put(out) if made and self.asked.type == "cuda" and isinstance(out, Tensor) else out


def _enter_context(self, device, original=DeviceContext.__init__):
    self.asked = torch.device(device)
    original(self, CPU if self.asked.type == "cuda" else self.asked)


def _pinned(self, *_) -> Tensor:
    self.pinned = True
    return self


def _on_cpu(function):
    def wrapper(self, *args, **kwargs):
        if is_there(self):
            raise TypeError("a tensor on the GPU is no array: copy it to the CPU first")
        return function(self, *args, **kwargs)

    return wrapper


def _address(self, original=BASE.data_ptr) -> int:
    file = sys._getframe(1).f_code.co_filename
    if "sfr_kernels/kernels/" in file and file.endswith(("cuda.py", "one_call.py")) and not is_there(self):
        raise MixedDevicesError(f"a kernel mixes devices: it is given {tuple(self.shape)} on the CPU")
    return original(self)


# What torch has for CUDA alone: products of 16 bit into 32, and the gradient of the norm of h.
def _mm(a, b, out_dtype, *, out):
    return out.copy_(a.to(out_dtype) @ b.to(out_dtype))


def _addmm(x, a, b, out_dtype, *, beta=1, alpha=1, out):
    return out.copy_(torch.addmm(x, a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha))


def _rms_norm_backward(grad, h, shape, rstd, weight, mask):
    g, normed = grad.float(), h.float() * rstd
    return (rstd * (g - normed * (g * normed).mean(-1, keepdim=True))).to(h.dtype), None


ON_CPU = {"mm.dtype_out": _mm, "addmm.dtype_out": _addmm, "_fused_rms_norm_backward": _rms_norm_backward}
LIBRARY = torch.library.Library("aten", "IMPL")  # what it has goes with it


class Stream:
    """A stream or an event: all work is done when its call returns."""

    cuda_stream, device = 0, GPU

    def __init__(self, *args, **kwargs):
        self.at = 0.0

    def elapsed_time(self, end: "Stream") -> float:
        return max(1e-3, 1e3 * (end.at - self.at))

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def record_event(self, event: "Stream | None" = None) -> "Stream":
        event = event or Stream()
        event.record()
        return event

    def is_capturing(self) -> bool:
        return False

    def nothing(self, *args, **kwargs) -> None:
        pass

    wait_stream = wait_event = synchronize = wait = nothing


class Graph:
    """In the place of `benchmarks.timing.Graph`: a replay calls again."""

    def __init__(self, run):
        self.run, self.outputs = run, list(run())

    def replay(self) -> None:
        for old, new in zip(self.outputs, self.run(), strict=True):
            old.detach().copy_(new.detach())


class Generator(torch._C.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


PROPERTIES = SimpleNamespace(
    name="a pretended GPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, L2_cache_size=2**18,
    shared_memory_per_block_optin=232448, warp_size=32,
)  # fmt: skip
RANDOM = dict(
    get_rng_state=lambda *_: torch.get_rng_state(), set_rng_state=lambda state, *_: torch.set_rng_state(state),
    get_rng_state_all=lambda: [torch.get_rng_state()], set_rng_state_all=lambda states: None,
)  # fmt: skip


def _constant(value):
    return lambda *args, **kwargs: value


def install() -> None:
    current, nothing = Stream(), _constant(None)
    _device_constructors()  # remembers the functions that are replaced next
    for name in FACTORIES:
        setattr(torch, name, _placed(getattr(torch, name)))
    for name in OF_TENSORS:
        setattr(Tensor, name, _placed(getattr(BASE, name), moves=name == "to"))
    Tensor.device = property(lambda x: GPU if is_there(x) else given(x))
    Tensor.is_cuda, Tensor.is_cpu = property(is_there), property(lambda x: given(x).type == "cpu" and not is_there(x))
    Tensor.get_device, Tensor.record_stream = lambda x: 0 if is_there(x) else -1, nothing
    Tensor.cuda, Tensor.cpu = (lambda x, *_, where=where, **__: x.to(where) for where in ("cuda", "cpu"))
    Tensor.pin_memory, Tensor.is_pinned = _pinned, lambda x, *_: getattr(x, "pinned", False)
    Tensor.tolist = lambda x: BASE.tolist(x.to("cpu"))
    Tensor.numpy, Tensor.__array__ = (_on_cpu(getattr(Tensor, name)) for name in ("numpy", "__array__"))
    Tensor.data_ptr, torch.Generator = _address, Generator
    for name, function in ON_CPU.items():
        LIBRARY.impl(name, function, "CPU")
    DeviceContext.__init__, DeviceContext.__torch_function__ = _enter_context, _in_context
    constants = dict(
        is_available=True, is_initialized=True, device_count=1, current_device=0, get_device_capability=(9, 0),
        get_device_properties=PROPERTIES, get_device_name=PROPERTIES.name, mem_get_info=(78 * 2**30, 80 * 2**30),
        memory_allocated=0, max_memory_allocated=0, current_blas_handle=0, is_bf16_supported=True,
        current_stream=current, default_stream=current, is_current_stream_capturing=False, synchronize=None,
        empty_cache=None, reset_peak_memory_stats=None, manual_seed=None, manual_seed_all=None, set_device=None,
        init=None, _lazy_init=None, device=nullcontext(), stream=nullcontext(),
    )  # fmt: skip
    functions = {name: _constant(value) for name, value in constants.items()} | RANDOM
    functions |= dict(Stream=Stream, Event=Stream, set_sync_debug_mode=lambda mode: setattr(_sync, "mode", mode),
                      _sleep=lambda cycles: time.sleep(cycles / 1.8e9))  # fmt: skip
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    for name, function in RANDOM.items():
        setattr(torch.cuda.random, name, function)
    torch.cuda.tunable.is_enabled = _constant(False)
    of_accelerator = dict(is_available=True, current_accelerator=torch.device("cuda"), device_count=1, synchronize=None,
                          current_device_index=0, current_stream=current, set_device_index=None)  # fmt: skip
    for name, value in of_accelerator.items():
        setattr(torch.accelerator, name, _constant(value))
    for name in ("_cuda_getCurrentRawStream", "_cuda_getDevice", "_cuda_setDevice", "_accelerator_setDeviceIndex"):
        setattr(torch._C, name, _constant(0))
    Devices().__enter__()
    _of_this_project()


def _of_this_project() -> None:
    from benchmarks import timing
    from sfr_kernels.kernels import triton

    def launch(function, grid, *args, launch=triton.launch, **meta) -> None:
        if len({is_there(x) for x in args if isinstance(x, Tensor)}) > 1:
            raise MixedDevicesError(f"{function.__name__} mixes devices")
        with _disable_current_modes():
            launch(function, grid, *args, **meta)

    timing.Graph, triton.launch = Graph, launch


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    if sys.argv[1] == "check.gpu_check" or sys.argv[1:3] == ["sfr_kernels", "bench"]:
        sys.exit("check.pretend: gpu_check and bench work in processes of their own, where no GPU is pretended")
    sys.argv = sys.argv[1:]
    install()
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

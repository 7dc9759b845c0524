"""The kernels between the products, bounded by the bytes they must read and write at the rate of a copy.

One of ours may err 1.5 times as much as the torch kernel does in the same dtype, against float64, in every result. A
peer need only compute the same thing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from sfr_kernels import reference
from sfr_kernels.kernels.backend import kernels_of, size_of, unavailable
from sfr_kernels.kernels.flow import FlowPath

from .case import LIMIT, MAIN, MORE, OURS, Case, Run, Suite, Work
from .oracle import FACTOR, Oracle
from .peers.cross_entropy import COMPILED, EAGER, absent, compiled

OPS = SOFTMAX, PATH, MSE, NORM, NORM_BACKWARD = "softmax_xent", "flow_path", "flow_mse", "norm_act", "norm_act_backward"
LIBRARIES = {"Liger": (SOFTMAX, NORM, NORM_BACKWARD), "quack": (SOFTMAX,)}  # the ops that each has
EPS = 1e-5


def cases(device: torch.device) -> list[Case]:
    """Rows of the head, many and so few that a launch is what they cost, and rows of logits; on a CPU those of
    SmolLM2-135M with half of 512 or 2048 tokens supervised. One in CUDA must be 5% faster than Triton's to stay."""
    rows, fp32, of_copy = [PATH, MSE, NORM, NORM_BACKWARD], torch.float32, {"of limit": 1.25}  # 80% of its bandwidth
    if device.type != "cuda":
        found = [_case(SOFTMAX, 256, 49152, fp32, MAIN), _case(SOFTMAX, 1024, 49152, fp32)]
        for op in rows:
            width = 1024 if op in (NORM, NORM_BACKWARD) else 384
            found += [_case(op, 1024, width, fp32, MAIN), _case(op, 256, width, fp32)]
        return found
    found = [_case(SOFTMAX, 4096, 128256, worth=MAIN, ms=0.85)]
    found += [_case(op, 8192, 1024, worth=MAIN, **of_copy) for op in rows]
    found += [_case(SOFTMAX, n, vocab, **of_copy) for n, vocab in ((4096, 32000), (1024, 256000))]
    found += [_case(SOFTMAX, 64, 32000), *(_case(op, 512, 1024) for op in rows)]
    sizes = [*((op, 8192, 1024) for op in rows), (SOFTMAX, 4096, 32000)]
    return found + [_case(*size, dtype) for size in sizes for dtype in (torch.float16, fp32)]


def _case(op: str, n: int, width: int, dtype: torch.dtype = torch.bfloat16, worth: int = MORE, **goals: float) -> Case:
    sizes, goals = dict(model=None, rows=n, width=width), dict(triton=goals, cuda={"of triton": 0.95} | goals)
    names = (*OURS, EAGER, COMPILED, *(name for name, ops in LIBRARIES.items() if op in ops))
    options = dict(seconds=0.5, providers=names, goals=goals)
    return Case(op, f"{n} rows, width {width}", sizes, dtype, (n, width), worth, **options)


def providers(device: torch.device) -> dict[str, str | None]:
    found = {name: unavailable(name, device) for name in OURS} | {EAGER: None}
    return found | {name: absent(name, device) for name in (COMPILED, *LIBRARIES)}


class Inputs:
    """The same numbers for every dtype, rounded to `rounded` first."""

    def __init__(self, n: int, width: int, device: torch.device, rounded: torch.dtype, dtype: torch.dtype):
        self.n, self.width, self.device, self.rounded, self.dtype = n, width, device, rounded, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=self.rounded, device=self.device).normal_(generator=self.generator)
        return drawn.to(self.dtype)

    def integers(self, most: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(most, (self.n,), dtype=dtype, device=self.device, generator=self.generator)


@dataclass
class Call:
    """A call of a kernel on tensors of its own, and what people would write in its place on the same tensors."""

    run: Callable[[object], list[Tensor]]  # of the kernels of a backend; its results
    names: tuple[str, ...]  # of the results
    bytes: int  # that must be read or written
    first: object  # the argument that says in which class of size it is
    peer: Callable[[str], Run]  # of a provider
    restore: Callable[[], object] = lambda: None  # puts back what the call writes over
    judged: Run | None = None  # of peers that draw noise of their own: the same with ours


def make(case: Case, device: torch.device, kernels: Callable | None = None, factor: float = FACTOR) -> Work:
    """kernels: those of a provider by name, None of a peer; they may err `factor` times as much as torch's do."""
    kernels = kernels or (lambda name: kernels_of(name) if name in OURS else None)
    dtypes = case.dtype, torch.float64, case.dtype
    call, exact, eager = (CALLS[case.op](Inputs(*case.shape, device, case.dtype, dtype)) for dtype in dtypes)
    oracle = Oracle(call.names, exact.run(kernels_of("torch")), eager.run(kernels_of("torch")))

    def judge(provider: str, run: Run) -> dict:
        call.restore()
        return oracle.verdict(run(), factor) if kernels(provider) else oracle.peer_verdict((call.judged or run)())

    return Work(
        run=lambda name: partial(call.run, kernels(name)) if kernels(name) else call.peer(name), judge=judge,
        judged=oracle.exact.clear, bytes=call.bytes, prepare=call.restore, fields=dict(size=size_of(call.first)),
    )  # fmt: skip


def softmax_xent(x: Inputs) -> Call:
    """Cross-entropy of rows of logits, and its gradient written over them."""
    source, labels = x.normal(x.n, x.width), x.integers(x.width, torch.int64)
    logits = source.clone()

    def eager(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.float(), y, reduction="sum")

    def peer(name: str) -> Run:
        function = compiled(name, eager)
        if name == "Liger":
            from liger_kernel.transformers.functional import liger_cross_entropy

            function = partial(liger_cross_entropy, reduction="sum")
        elif name == "quack":
            from quack.cross_entropy import cross_entropy

            function = partial(cross_entropy, reduction="sum", inplace_backward=True)  # as ours

        def run() -> list[Tensor]:
            given = logits.detach().requires_grad_()  # the same memory: Liger writes over it
            loss = function(given, labels)
            return [loss, *torch.autograd.grad(loss, given)]

        return run

    return Call(lambda k: [k.softmax_xent(logits, labels)[0], logits], ("loss", "dlogits"), 2 * logits.nbytes, logits,
                peer, restore=lambda: logits.copy_(source))  # fmt: skip


def flow_path(x: Inputs) -> Call:
    """Noise from a counter, x_t between it and the target, and the velocity; eager torch's with its own generator."""
    anchors = max(1, x.n // 32)
    targets = x.normal(anchors, x.width) / x.width**0.5
    anchor, index = (x.integers(k, torch.int32) for k in (anchors, 256))
    times = torch.arange(0.5, 256, device=x.device, dtype=x.wide) / 256
    identity, seed = torch.arange(x.n, device=x.device), torch.ones(1, dtype=torch.int64, device=x.device)
    path = FlowPath(targets, times, identity, anchor, index, seed, x.width**0.5, 1.0)

    def eager(noise: Tensor | None = None) -> list[Tensor]:
        x_1 = path.target_scale * targets[anchor].float()
        x_0 = torch.randn_like(x_1) if noise is None else noise
        t = times[index].unsqueeze(1)
        return [((1 - t) * x_0 + t * x_1).to(x.dtype), (x_1 - x_0).to(x.dtype)]

    size = (2 * x.n + anchors) * x.width * x.dtype.itemsize
    return Call(lambda k: [*k.flow_path(path, x.dtype)], ("x_t", "u"), size, path, lambda name: compiled(name, eager),
                judged=lambda: eager(reference.gaussian_noise(seed, identity, x.width).float()))  # fmt: skip


def flow_mse(x: Inputs) -> Call:
    """The matching loss of every row and its gradient, in one read of the prediction and the velocity."""
    u, source, coefficient = x.normal(x.n, x.width), x.normal(x.n, x.width), x.normal(x.n).to(x.wide)
    v = source.clone()

    def eager(v: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.mse_loss(v, u, reduction="none").float().mean(dim=1)
        return loss, (loss * coefficient).sum()

    def peer(name: str) -> Run:
        given, function = source.detach().clone().requires_grad_(), compiled(name, eager)

        def run() -> list[Tensor]:
            loss, total = function(given)
            (dv,) = torch.autograd.grad(total, given)
            return [loss, dv.sum(0, dtype=torch.float32), dv]

        return run

    return Call(lambda k: [*k.flow_mse(v, u, coefficient), v], ("loss", "db", "dv"), 3 * v.nbytes, v, peer,
                restore=lambda: v.copy_(source))  # fmt: skip


def norm_act(x: Inputs, backward: bool = False) -> Call:
    """LayerNorm, SiLU and the residual sum, forward; or backward, with the sums over rows for γ, β and the bias. Peers
    keep their statistics to themselves."""
    y, other, gamma, beta = x.normal(x.n, x.width), x.normal(x.n, x.width), x.normal(x.width), x.normal(x.width)
    mean, rstd = y.to(x.wide).mean(1), y.to(x.wide).var(1, correction=0).add(EPS).rsqrt()
    dy = torch.empty_like(y)

    def eager(y: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
        return F.silu(F.layer_norm(y, y.shape[1:], gamma, beta, EPS)) + residual

    def peer(name: str) -> Run:
        function = compiled(name, eager)
        if name == "Liger":
            from liger_kernel.transformers.functional import liger_layer_norm

            def function(y: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
                return F.silu(liger_layer_norm(y, gamma, beta, EPS)) + residual

        if not backward:
            return torch.no_grad()(lambda: [function(y, gamma, beta, other), mean, rstd])
        inputs = [t.detach().clone().requires_grad_() for t in (y, gamma, beta)]

        def run() -> list[Tensor]:
            grads = torch.autograd.grad(out, inputs, other, retain_graph=True)
            return [*grads, grads[0].sum(0, keepdim=True, dtype=torch.float32)]

        # a graph that is gone through many times must keep its buffers; the first time compiles
        with torch._functorch.config.patch(donated_buffer=False):
            out = function(*inputs, torch.zeros_like(y))
            run()
        return run

    if backward:
        return Call(lambda k: list(k.norm_act_backward(other, y, gamma, beta, mean, rstd, dy=dy)),
                    ("dy", "dgamma", "dbeta", "dbias"), 3 * y.nbytes, other, peer)  # fmt: skip
    return Call(lambda k: list(k.norm_act(y, gamma, beta, residual=other)), ("out", "mean", "rstd"), 3 * y.nbytes, y,
                peer)  # fmt: skip


CALLS = {SOFTMAX: softmax_xent, PATH: flow_path, MSE: flow_mse, NORM: norm_act,
         NORM_BACKWARD: partial(norm_act, backward=True)}  # fmt: skip
SUITE = Suite(cases, make, providers, bounds=(LIMIT,))

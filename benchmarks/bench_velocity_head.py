"""The velocity head alone, forward and backward, at one time per sequence; the gradient of v is given."""

from functools import partial

import torch
from torch import Tensor

from sfr_kernels import reference
from sfr_kernels.ops.velocity_head import velocity_head

from .harness.composites import backends
from .harness.errors import Oracle, peer_verdict, verdict
from .harness.floor import flow_gemms
from .harness.limit import head_bytes
from .harness.problems import TIMES, Shape, make_head
from .harness.shapes import FP16, FP32, case_of, fit, shape_of
from .harness.work import LIMIT, OURS, PRODUCTS, Case, Run, Suite, Work
from .peers.cross_entropy import COMPILED, EAGER, absent
from .peers.published_loss import PublishedFlowLoss

OP = "velocity_head"


def cases(device: torch.device) -> list[Case]:
    found = [case_of(OP, None, shape_of((4096, 0), 8192, 1.0), quick=True)]
    found += [case_of(OP, None, shape_of((h, 0), 8192, 1.0)) for h in (1024, 5120)]
    found += [case_of(OP, None, shape_of((4096, 0), 2048, 1.0, length=512), dtype) for dtype in (FP16, FP32)]
    return fit(found, device)


def providers(device: torch.device) -> dict[str, str | None]:
    return backends(device) | {EAGER: None, COMPILED: absent(COMPILED, device)}


class Inputs:
    """x_t, hidden and dv of n = B·L rows, and a head."""

    def __init__(self, shape: Shape, rounded: torch.dtype, dtype: torch.dtype, device: torch.device):
        """The same numbers for every dtype, rounded to `rounded` first."""
        s, g = shape, torch.Generator(device).manual_seed(0)
        n = s.batch * s.length
        self.shape = shape

        def normal(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=rounded, device=device).normal_(generator=g).to(dtype)

        self.hidden = normal(n, s.hidden_size).requires_grad_()
        self.x_t, self.dv = normal(n, s.target_size), normal(n, s.target_size)
        self.head = make_head(s, s.config(hidden_scale=1.0)).to(device, rounded).to(dtype)
        self.times = torch.tensor(TIMES, device=device)[torch.arange(s.batch, device=device) % len(TIMES)]
        self.index = torch.arange(n, dtype=torch.int32, device=device) // s.length

    def with_gradients(self, v: Tensor, parameters) -> list[Tensor]:
        return [v, *torch.autograd.grad(v, [self.hidden, *parameters], self.dv)]

    def run(self, backend: str) -> list[Tensor]:
        v = velocity_head(backend, self.head, self.hidden, self.x_t, self.times, self.index)
        return self.with_gradients(v, self.head.parameters())

    def reference(self) -> list[Tensor]:
        head, t = self.head, self.times.to(self.x_t.dtype)[self.index]
        v = reference.velocity(dict(head.named_parameters()), self.x_t, t, self.hidden, head.shape.time_scale)
        return self.with_gradients(v, head.parameters())

    def published(self, *, compiled: bool) -> Run:
        s = self.shape
        module = PublishedFlowLoss(s.hidden_size, s.target_size, s.width, s.num_layers)
        module.load_state_dict(self.head.state_dict())
        module.to(self.hidden.device, self.hidden.dtype)
        x_t, t = self.x_t.view(s.batch, s.length, -1), self.times.to(self.x_t.dtype)
        velocity = torch.compile(module.velocity, dynamic=False) if compiled else module.velocity

        def run() -> list[Tensor]:
            v = velocity(x_t, t, self.hidden.view(s.batch, s.length, -1)).flatten(0, 1)
            return self.with_gradients(v, module.parameters())

        return run


def make(case: Case, device: torch.device) -> Work:
    x, oracle = Inputs(case.shape, case.dtype, case.dtype, device), []
    n, s = case.sizes["tokens"], case.shape

    def judge(provider: str, run: Run) -> dict:
        if not oracle:
            exact = Inputs(s, case.dtype, torch.float64, device).reference()
            names = ["v", "hidden", *dict(x.head.named_parameters())]
            oracle.append(Oracle(names, exact, x.reference()))
        return verdict(oracle[0].errors(run())) if provider in OURS else peer_verdict(oracle[0].distance(run()))

    return Work(
        run=lambda name: partial(x.run, name) if name in OURS else x.published(compiled=name == COMPILED),
        judge=judge,
        judged=oracle.clear,
        gemms=flow_gemms(n, s.hidden_size, s.target_size, s.width, s.num_layers),
        bytes=head_bytes(n, s.width, s.num_layers, case.dtype.itemsize),
    )


SUITE = Suite(OP, cases, make, providers, bounds=(PRODUCTS, LIMIT))


def test_velocity_head(race):
    race()

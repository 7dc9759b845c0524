"""The published way to the flow loss on a `Problem`'s batch, eager and compiled; its targets, one for every position,
are given for free.

It draws noise and times of its own. To be judged, it is given those of the problem, whose config must be
`published`: one time per sequence, hidden states unscaled. What is compiled is judged before it is compiled.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr_kernels import reference

from ..harness.errors import UPSTREAM
from ..harness.problems import TIMES, Problem
from ..harness.work import Run
from .cross_entropy import COMPILED, EAGER, eager, loss_of
from .published_loss import PublishedFlowLoss

WITH_HEAD = " + published head"  # after the name of a way to the cross-entropy


class Published:
    """The published loss with the problem's parameters, and the tensors it takes."""

    def __init__(self, problem: Problem):
        s, rows = problem.shape, problem.rows
        self.problem, self.config = problem, problem.config
        self.module = PublishedFlowLoss(
            s.hidden_size, s.target_size, s.width, s.num_layers, source_std=self.config.source_std
        )
        self.module.load_state_dict(problem.head.state_dict())
        self.module.to(problem.device, problem.dtype)
        self.index = rows.rows[: rows.num_flow]
        scale = self.config.scale_for(s.target_size)
        self.x_1 = self.everywhere(scale * problem.targets[rows.anchor[: rows.num_flow].long()]).to(problem.dtype)
        self.weight = self.everywhere(rows.weight[: rows.num_flow, None]).squeeze(2)

    def everywhere(self, values: Tensor) -> Tensor:
        """(B, L, …): what flow rows have, and zero at every other position."""
        s = self.problem.shape
        whole = values.new_zeros(s.batch * s.length, values.shape[1])
        whole[self.index] = values
        return whole.view(s.batch, s.length, -1)

    def judged(self) -> Tensor:
        """The loss with the problem's noise, at TIMES, under its normalizer."""
        p, n = self.problem, len(self.index)
        noise = reference.gaussian_noise(p.seed, p.rows.noise_id[:n], p.shape.target_size)
        x_0 = self.config.source_std * self.everywhere(noise.to(p.dtype))
        t = torch.tensor(TIMES, dtype=p.dtype, device=p.device)
        t = t[torch.arange(p.shape.batch, device=p.device) % len(TIMES)]
        s = t[:, None, None]
        loss = self.module.loss(p.hidden, (1 - s) * x_0 + s * self.x_1, self.x_1 - x_0, t, self.weight)
        return loss * self.weight.sum().clamp(min=1.0) / p.normalizer

    def leaves(self) -> list[Tensor]:
        """What gets a gradient, in the order of the problem's."""
        p = self.problem
        return [p.hidden, *([p.weight] if "weight" in p.leaves else []), *self.module.parameters()]


def run_of(loss: Callable[[], Tensor], leaves: list[Tensor], upstream: float = 1.0) -> Run:
    """The loss, and `upstream` times every gradient."""

    def run() -> list[Tensor]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, upstream))]

    return run


def flow_peers(problem: Problem) -> tuple[dict[str, Run], dict[str, Run]]:
    """Each way's run, and its run to be judged, whose gradients are UPSTREAM times as large."""
    own = Published(problem)
    compiled = torch.compile(own.module, dynamic=False)
    runs = {
        EAGER: run_of(lambda: own.module(problem.hidden, own.x_1, own.weight), own.leaves()),
        COMPILED: run_of(lambda: compiled(problem.hidden, own.x_1, own.weight), own.leaves()),
    }
    return runs, dict.fromkeys(runs, run_of(own.judged, own.leaves(), UPSTREAM))


def joint_peers(problem: Problem, names: list[str]) -> tuple[dict[str, Run], dict[str, Run]]:
    """Each way to the cross-entropy and the published head: eager torch's, both compiled as one, and those of others
    beside the head, which is compiled where that is tried at all."""
    own, λ = Published(problem), problem.config.flow_weight
    labels = F.pad(problem.labels[:, 1:], (0, 1), value=-100).flatten()
    compiled = torch.compile(own.module, dynamic=False) if COMPILED in names else own.module

    def cross_entropy(function) -> Tensor:
        return function(problem.hidden.flatten(0, 1), problem.weight, labels)

    def both(function, head) -> Tensor:
        return cross_entropy(function) + λ * head(problem.hidden, own.x_1, own.weight)

    whole = torch.compile(lambda: both(eager, own.module), dynamic=False)
    runs, judged = {EAGER: lambda: both(eager, own.module), COMPILED: whole}, dict.fromkeys((EAGER, COMPILED), eager)
    for name in [n for n in names if n.endswith(WITH_HEAD)]:
        judged[name] = loss_of(name.removesuffix(WITH_HEAD))
        runs[name] = partial(both, judged[name], compiled)
    leaves = own.leaves()
    judges = {n: run_of(lambda f=f: cross_entropy(f) + λ * own.judged(), leaves, UPSTREAM) for n, f in judged.items()}
    return {n: run_of(f, leaves) for n, f in runs.items()}, judges

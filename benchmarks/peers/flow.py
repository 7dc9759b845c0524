"""The published way to the flow loss on a `Problem`'s batch, eager and compiled; its targets, one for every position,
are given for free. Beside it, for the joint loss, each way to the cross-entropy.

It draws noise and times of its own. To be judged, it is given those of the problem, which must be `published`: one time
per sequence, hidden states unscaled. What is compiled is judged before it is compiled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr_kernels import reference

from ..case import Run
from ..problem import TIMES, UPSTREAM, Problem
from .cross_entropy import COMPILED, EAGER, compiled, eager, loss_of
from .published import PublishedFlowLoss

WITH_HEAD = " + published head"  # after the name of a way to the cross-entropy


class Published:
    """The published loss with the problem's parameters, and the tensors it takes."""

    def __init__(self, problem: Problem):
        s, rows, config = problem.shape, problem.rows, problem.config
        self.problem, self.config = problem, config
        sizes = s.hidden_size, s.target_size, s.width, s.num_layers
        self.module = PublishedFlowLoss(*sizes, source_std=config.source_std)
        self.module.load_state_dict(problem.head.state_dict())
        self.module.to(problem.device, problem.dtype)
        self.index = rows.rows[: rows.num_flow]
        x_1 = config.scale_for(s.target_size) * problem.targets[rows.anchor[: rows.num_flow].long()]
        self.x_1 = self.everywhere(x_1).to(problem.dtype)
        self.weight = self.everywhere(rows.weight[: rows.num_flow, None]).squeeze(2)
        weights = [problem.weight] if "weight" in problem.leaves else []
        self.leaves = [problem.hidden, *weights, *self.module.parameters()]  # in the order of the problem's

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


def run_of(problem: Problem, name: str, judged: bool = False) -> Run:
    """Eager torch's, both losses compiled as one, and ways of others beside the head, compiled on a GPU. judged: with
    the problem's noise and times, and gradients UPSTREAM times as large; the head as it is."""
    own, ce, factor = Published(problem), lambda: 0.0, 1.0
    head = compiled(COMPILED if name.endswith(WITH_HEAD) and problem.device.type == "cuda" else EAGER, own.module)
    if problem.op == "sfr_loss":
        labels = F.pad(problem.labels[:, 1:], (0, 1), value=-100).flatten()
        function = eager if name in (EAGER, COMPILED) else loss_of(name.removesuffix(WITH_HEAD))
        ce, factor = lambda: function(problem.hidden.flatten(0, 1), problem.weight, labels), problem.config.first_weight

    def loss() -> Tensor:
        flow = own.judged() if judged else head(problem.hidden, own.x_1, own.weight)
        return ce() + factor * flow

    whole = loss if judged else compiled(name, loss)

    def run() -> list[Tensor]:
        value = whole()
        upstream = torch.full_like(value, UPSTREAM if judged else 1.0)
        return [value.detach(), *torch.autograd.grad(value, own.leaves, upstream)]

    return run

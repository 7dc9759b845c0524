"""The flow path of every row: noise from a counter, x_t between it and the target, and the velocity."""

from functools import partial

import torch
from torch import Tensor

from sfr_kernels import reference

from .harness.leaf_work import Leaf, Numbers, leaf_work, row_cases, suite
from .peers.cross_entropy import COMPILED, EAGER

OP = "flow_path"


def eager(targets, times, anchor, index, scale: float, dtype: torch.dtype, noise: Tensor | None = None) -> list[Tensor]:
    """As one would write it, with torch's generator unless there is noise."""
    x_1 = scale * targets[anchor].float()
    x_0 = torch.randn_like(x_1) if noise is None else noise
    t = times[index].unsqueeze(1)
    return [((1 - t) * x_0 + t * x_1).to(dtype), (x_1 - x_0).to(dtype)]


def leaf(x: Numbers) -> Leaf:
    p = x.path()
    arguments = (p.targets, p.times, p.anchor, p.time_index, p.target_scale, x.dtype)

    def given() -> list[Tensor]:
        return eager(*arguments, noise=reference.gaussian_noise(p.seed, p.noise_id, x.width).float())

    return Leaf(
        lambda k: [*k.flow_path(p, x.dtype)],
        ("x_t", "u"),
        (2 * x.n + len(p.targets)) * x.width * x.dtype.itemsize,
        p,
        peers={
            EAGER: lambda: partial(eager, *arguments),
            COMPILED: lambda: partial(torch.compile(eager, dynamic=False), *arguments),
        },
        judged={EAGER: given, COMPILED: given},
    )


SUITE = suite(OP, row_cases(OP), partial(leaf_work, leaf))


def test_flow_path(race):
    race()

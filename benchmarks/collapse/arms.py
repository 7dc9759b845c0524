"""The objectives that are compared, and the loss of each on hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfr_kernels import SFRConfig, SupervisedRows, VelocityHead, flow_matching_loss, linear_cross_entropy, sfr_loss
from sfr_kernels.reference import draw_times


@dataclass(frozen=True)
class Arm:
    """One objective. A config with head_steps has its head fitted first."""

    name: str
    config: SFRConfig | None = None  # None: cross-entropy alone
    latest: float = 1.0  # times are drawn below this
    share: float | None = None  # λ is set so that the flow's gradient at h is this share of cross-entropy's
    shuffled: bool = False  # the control: the targets of a batch are dealt out at random


CE, TRUTH = Arm("CE"), Arm("CE that knows the held-out answers")
AGAIN, THIRD = Arm("CE, another order"), Arm("CE, a third order")
SFR = "SFR: norm, head first, early times"
SHUFFLED = f"{SFR}; targets shuffled"
SHARE = f"{SFR}, share 0.3"
FORMER = "SFR, former default"
SHARE_SHUFFLED = f"{SHARE}; targets shuffled"


def arms(sizes: dict, head_steps: int) -> list[Arm]:
    """All of an experiment whose data suit the fields `sizes` of a config, and that fits heads by `head_steps`."""
    # what was the default
    before = dict(hidden_norm="none", hidden_scale=1 / 16, time_power=1.0, head_steps=0, flow_weight=1.0)
    norm, early = dict(hidden_norm="rms", hidden_scale=1.0), dict(time_power=3.0)
    first = dict(head_steps=head_steps)
    mtp = dict(loss="mtp", flow_weight=0.3)

    def arm(name: str, *changes: dict, **options) -> Arm:
        fields = sizes | before
        for change in changes:
            fields = fields | change
        return Arm(name, SFRConfig(**fields), **options)

    return [
        CE,
        arm(SFR, norm, first, early),
        arm(SHUFFLED, norm, first, early, shuffled=True),
        arm("MTP", mtp),
        arm(FORMER),
        Arm("SFR official", SFRConfig.official(**sizes)),
        arm("mse", dict(loss="mse")),
        arm("MTP, 3 tokens: norm, head first", mtp, dict(mtp_tokens=3), norm, first),
        arm("mse: norm, head first", dict(loss="mse"), norm, first),
        arm("SFR: norm", norm),
        arm("SFR: head first", first),
        arm("SFR: norm, head first", norm, first),
        arm("SFR: norm, head first, t < 0.6", norm, first, latest=0.6),
        arm("MTP, 3 tokens", mtp, dict(mtp_tokens=3)),
        arm("SFR: norm, head first, early times, target_scale 1", norm, first, early, dict(target_scale=1.0)),
        arm(SHARE, norm, first, early, share=0.3),
        arm(SHARE_SHUFFLED, norm, first, early, share=0.3, shuffled=True),
        arm(f"{SFR}, share 0.8", norm, first, early, share=0.8),
        AGAIN,
        THIRD,
        TRUTH,
    ]


def named(names: Sequence[str] | None, known: list[Arm]) -> list[str]:
    """The names, all if None. ValueError for one that no arm has."""
    every = [arm.name for arm in known]
    if unknown := [name for name in names or [] if name not in every]:
        raise ValueError(f"there is no arm {unknown[0]!r}; there are: {'; '.join(every)}")
    return list(names or every)


class Objective:
    """An arm in use on one model: the head, λ and the loss of a step."""

    def __init__(self, arm: Arm, weight: Tensor, target_size: int, seed: int):
        self.arm, self.weight, self.head, self.config = arm, weight, None, arm.config
        self.flow_weight, self.share, self.seed = 0.0, None, seed
        if self.config is not None:
            torch.manual_seed(seed)
            size = None if self.config.loss == "mtp" else target_size
            self.flow_weight = self.config.first_weight
            self.head = VelocityHead.from_config(self.config, weight.shape[1], size).to(weight.device)
        self.shuffle = torch.Generator().manual_seed(seed)

    def parameters(self) -> list[Tensor]:
        return [] if self.head is None else [*self.head.parameters()]

    def loss(self, hidden: Tensor, rows: SupervisedRows, targets: Tensor, step: int, measure: bool) -> Tensor:
        """L_CE + λ L_flow; `measure` brings `share` up to date, and λ where the arm has a share of its own."""
        ce = linear_cross_entropy(hidden, self.weight, rows)
        if self.config is None:
            return ce
        flow = self.flow(hidden, rows, targets, step)
        if measure:
            at_h = [torch.autograd.grad(x, hidden, retain_graph=True)[0].norm().item() for x in (ce, flow)]
            if self.arm.share is not None and at_h[1] > 0:
                self.flow_weight = self.arm.share * at_h[0] / at_h[1]
            self.share = self.flow_weight * at_h[1] / at_h[0]
        return ce + self.flow_weight * flow

    def flow(self, hidden: Tensor, rows: SupervisedRows, targets: Tensor, step: int) -> Tensor:
        arm, times, seed = self.arm, None, 10_000 * self.seed + step
        if self.config.loss == "mtp":
            both = sfr_loss(
                hidden, self.weight, self.head, rows, rows.labels, seed=seed, config=self.config, flow_weight=1.0
            )
            return both.loss - linear_cross_entropy(hidden, self.weight, rows)
        if arm.shuffled:
            targets = targets[torch.randperm(len(targets), generator=self.shuffle)]
        if arm.latest != 1:
            times, index = draw_times(rows, seed, self.config)
            times, rows = arm.latest * times, rows.replace(time_index=index.int())
        return flow_matching_loss(hidden, self.head, rows, targets, times, seed=seed, config=self.config)

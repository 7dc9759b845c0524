"""The objectives that are compared, and the loss of each on hidden states."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfr_kernels import SFRConfig, SupervisedRows, VelocityHead, flow_matching_loss, linear_cross_entropy, sfr_loss
from sfr_kernels.reference import draw_times


def generator(*key: object) -> torch.Generator:
    """Of draws that depend on the key, and on nothing that another key draws."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


@dataclass(frozen=True)
class Arm:
    """One objective. A config with head_steps has its head fitted first."""

    name: str
    config: SFRConfig | None = None  # None: cross-entropy alone
    latest: float = 1.0  # times are drawn below this
    share: float | None = None  # λ is set so that the flow's gradient at h is this share of cross-entropy's
    shuffled: bool = False  # the control: the targets of a batch are dealt out at random
    order: int = 0  # of the data; arms with the same one share it


CE, TRUTH = Arm("CE"), Arm("CE that knows the held-out answers")
AGAIN, THIRD = Arm("CE, another order", order=1), Arm("CE, a third order", order=2)
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
        arm("MTP: norm, head first", mtp, norm, first),
        arm("MTP, 3 tokens: norm, head first", mtp, dict(mtp_tokens=3), norm, first),
        arm("mse: norm, head first", dict(loss="mse"), norm, first),
        arm("SFR: norm", norm),
        arm("SFR: head first", first),
        arm("SFR: norm, head first", norm, first),
        arm("SFR: norm, head first, t < 0.6", norm, first, latest=0.6),
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
        self.shuffle = generator("shuffle", seed)

    def parameters(self) -> list[Tensor]:
        return [] if self.head is None else [*self.head.parameters()]

    def fit_head(self, batches: Iterable[tuple[Tensor, SupervisedRows, Tensor]], rate: float) -> None:
        """Trains the head alone, a step for each batch of hidden states, rows and targets."""
        optimizer = torch.optim.AdamW(self.parameters(), rate, weight_decay=0.0, fused=True)
        for i, (hidden, *batch) in enumerate(batches, 1):
            rows, targets, drawn = self._drawn(*batch, -i)
            if self.config.loss == "mtp":
                options = dict(config=self.config, flow_weight=1.0, **drawn)
                loss = sfr_loss(hidden, self.weight.detach(), self.head, rows, targets, **options).loss
            else:
                loss = flow_matching_loss(hidden, self.head, rows, targets, config=self.config, **drawn)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def loss(self, hidden: Tensor, rows: SupervisedRows, targets: Tensor, step: int, measure: bool) -> Tensor:
        """L_CE + λ L_flow. `measure` brings `share` up to date and, for the next step, λ where the arm has a share of
        its own."""
        if self.config is None:
            return linear_cross_entropy(hidden, self.weight, rows)
        rows, targets, drawn = self._drawn(rows, targets, step)
        options = dict(config=self.config, flow_weight=self.flow_weight, return_norms=measure, **drawn)
        out = sfr_loss(hidden, self.weight, self.head, rows, targets, **options)
        if measure:
            ce, flow = out.norms.sqrt().tolist()
            self.share = flow / ce
            if self.arm.share is not None and flow > 0:
                self.flow_weight *= self.arm.share / self.share
        return out.loss

    def _drawn(self, rows: SupervisedRows, targets: Tensor, step: int) -> tuple[SupervisedRows, Tensor, dict]:
        """What the loss of a step is given of rows and targets, with its seed and times."""
        arm, seed, times = self.arm, 10_000 * self.seed + step, None
        if self.config.loss == "mtp":
            targets = rows.labels
        elif arm.shuffled:
            targets = targets[torch.randperm(len(targets), generator=self.shuffle)]
        if arm.latest != 1:
            times, index = draw_times(rows, seed, self.config)
            times, rows = arm.latest * times, rows.replace(time_index=index.int())
        return rows, targets, dict(seed=seed, times=times)

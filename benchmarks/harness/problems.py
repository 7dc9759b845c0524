"""One call of a public op, with everything it takes, and its oracle.

The batch is synthetic: each sequence is a prompt, which carries no loss, and then a response. The head is as in
mid-training, its output layer not zero.
"""

from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr_kernels import (
    SFRConfig,
    SupervisedRows,
    VelocityHead,
    flow_matching_loss,
    linear_cross_entropy,
    sfr_loss,
)

OPS = ("flow_matching_loss", "linear_cross_entropy", "sfr_loss")
# Times that 16 bit holds exactly. With those of a training step, and its time scale, eager torch errs by more than half
# in the sinusoid, and to be no worse than that proves nothing.
TIMES = (0.125, 0.375, 0.625, 0.875)
ORACLE_LOGITS = 2**26  # how many the oracle makes at a time


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; `vocab` matters to the ops with a decoder, the head's sizes to those with a head."""

    batch: int
    length: int
    hidden_size: int
    supervised: float = 1.0  # share of the tokens
    vocab: int = 0
    frozen: bool = False  # the decoder's weight takes no gradient
    target_size: int = 1024
    width: int = 1024
    num_layers: int = 3

    def label(self, op: str) -> str:
        parts = [f"B{self.batch} L{self.length} H{self.hidden_size}"]
        if op != "linear_cross_entropy":
            parts.append(f"d{self.target_size} D{self.width}")
        if op != "flow_matching_loss":
            parts.append(f"V{self.vocab}{' frozen' if self.frozen else ''}")
        return " ".join([*parts, f"{self.supervised:.0%}"])

    def config(self, **options) -> SFRConfig:
        short = {} if self.length >= 256 else dict(stride=8, min_tokens=4, segment_tokens=16)
        return SFRConfig(width=self.width, num_layers=self.num_layers, time_scale=1.0, **short, **options)


class Problem:
    """Inputs of `op` in `dtype` on `device`. `run` is forward and backward through the public function."""

    def __init__(
        self,
        op: str,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        small: bool = False,  # the setting of the least memory
        published: bool = False,  # what the published head can be compared with: a time per sequence, h unscaled
    ):
        self.op, self.shape, self.dtype, self.device = op, shape, dtype, device
        # what keeps memory least: small chunks, and dW accumulated in its own dtype
        self.memory = dict(chunk_rows=shape.hidden_size // 8, accum_dtype=dtype) if small else {}
        self.config = shape.config(**dict(hidden_scale=1.0) if published else {})
        self.labels = self._labels()
        rows = SupervisedRows.from_labels(self.labels, self.config)
        self.labels = self.labels.to(device)
        index = rows.rows // shape.length if published else torch.arange(len(rows))
        index = (index % len(TIMES)).int()
        self.rows, self.timed_rows = rows.to(device), rows.replace(time_index=index).to(device)
        self.times = torch.tensor(TIMES, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        supervised = int((self.labels != -100).sum()) if op == "linear_cross_entropy" else rows.num_ce
        self.normalizer = torch.tensor(float(supervised), device=device)
        self.num_ce, self.num_flow = supervised, rows.num_flow

        g = torch.Generator(device).manual_seed(1)
        self.hidden = torch.empty(shape.batch, shape.length, shape.hidden_size, dtype=dtype, device=device)
        self.redraw(0)
        self.hidden.requires_grad_()
        self.weight = self.head = self.targets = None
        if op != "flow_matching_loss":
            self.weight = torch.empty(shape.vocab, shape.hidden_size, dtype=dtype, device=device)
            self.weight.normal_(std=shape.hidden_size**-0.5, generator=g).requires_grad_(not shape.frozen)
        if op != "linear_cross_entropy":
            self.head = make_head(shape, self.config).to(device, dtype)
            targets = torch.empty(rows.num_anchors, shape.target_size, device=device).normal_(generator=g)
            self.targets = F.normalize(targets, dim=1)

    def _labels(self) -> Tensor:
        """(B, L) on the CPU."""
        s = self.shape
        labels = torch.randint(s.vocab or 2, (s.batch, s.length), generator=torch.Generator().manual_seed(0))
        labels[:, : s.length - round(s.supervised * s.length)] = -100
        return labels

    def redraw(self, draw: int) -> None:
        """Hidden states and noise of their own for each number."""
        self.hidden.detach().normal_(generator=torch.Generator(self.device).manual_seed(100 + draw))
        self.seed.fill_(draw)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that gets a gradient."""
        named = {"hidden": self.hidden, "weight": self.weight}
        if self.head is not None:
            named |= dict(self.head.named_parameters())
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def in_float64(self) -> "Problem":
        """The same values, as rounded as they are, as new leaves."""
        twin = copy(self)
        twin.dtype = torch.float64
        twin.hidden = self.hidden.detach().double().requires_grad_()
        if self.weight is not None:
            twin.weight = self.weight.detach().double().requires_grad_(self.weight.requires_grad)
        twin.head = None if self.head is None else deepcopy(self.head).double()
        return twin

    def loss(self, backend: str, *, judged: bool = False) -> Tensor:
        """The op's value; judged: at TIMES instead of times drawn from the seed."""
        if self.op == "linear_cross_entropy":
            return self._cross_entropy(self.labels, backend)
        if self.op == "flow_matching_loss":
            return self._flow(backend, judged)
        rows, times = (self.timed_rows, self.times) if judged else (self.rows, None)
        options = dict(seed=self.seed, config=self.config, normalizer=self.normalizer, backend=backend)
        return sfr_loss(self.hidden, self.weight, self.head, rows, self.targets, times, **options, **self.memory).loss

    def apart(self, backend: str, *, judged: bool = False) -> Tensor:
        """The joint loss as its two parts, one after the other."""
        return self._cross_entropy(self.rows, backend) + self.config.flow_weight * self._flow(backend, judged)

    def _cross_entropy(self, labels: Tensor | SupervisedRows, backend: str) -> Tensor:
        options = dict(normalizer=self.normalizer, backend=backend) | self.memory
        return linear_cross_entropy(self.hidden, self.weight, labels, **options)

    def _flow(self, backend: str, judged: bool) -> Tensor:
        rows, times = (self.timed_rows, self.times) if judged else (self.rows, None)
        options = dict(seed=self.seed, config=self.config, normalizer=self.normalizer, backend=backend)
        return flow_matching_loss(self.hidden, self.head, rows, self.targets, times, **options)

    @property
    def num_rows(self) -> int:
        """n, of which the loss is a mean."""
        return max(1, self.num_flow if self.op == "flow_matching_loss" else self.num_ce)

    def oracle(self, judged: bool = True) -> Iterator[Callable[[], Tensor]]:
        """The value as the sum of what these return: the reference, on so many rows at a time that its logits
        fit."""
        if self.op != "flow_matching_loss":
            rows, labels = torch.arange(self.labels.numel(), device=self.device), self.labels.flatten()
            if self.op == "sfr_loss":
                rows, labels = self.rows.rows[self.rows.ce_start :], self.rows.labels[self.rows.ce_start :]
            step = max(1, ORACLE_LOGITS // self.shape.vocab)
            for some, their_labels in zip(rows.split(step), labels.split(step), strict=True):
                yield lambda i=some, y=their_labels: linear_cross_entropy(
                    self.hidden.flatten(0, 1)[i], self.weight, y, normalizer=self.normalizer, backend="reference"
                )
        if self.op == "flow_matching_loss":
            yield lambda: self._flow("reference", judged)
        elif self.op == "sfr_loss":
            yield lambda: self.config.flow_weight * self._flow("reference", judged)

    def run(self, backend: str) -> list[Tensor]:
        return self.with_gradients(self.loss(backend))

    def with_gradients(self, loss: Tensor, upstream: float = 1.0) -> list[Tensor]:
        """The loss, and `upstream` times the gradient of every leaf."""
        grads = torch.autograd.grad(loss, list(self.leaves.values()), torch.full_like(loss, upstream))
        return [loss.detach(), *grads]


def make_head(shape: Shape, config: SFRConfig) -> VelocityHead:
    """A float32 head on the CPU with norms, biases and output layer away from their initial values."""
    g = torch.Generator().manual_seed(2)
    head = VelocityHead.from_config(config, shape.hidden_size, shape.target_size)
    with torch.no_grad():
        for name, p in head.named_parameters():
            is_gain = name.endswith(("input_proj.1.weight", "norm.weight"))
            p.normal_(float(is_gain), p.shape[-1] ** -0.5 if p.dim() == 2 else 0.3, generator=g)
    return head

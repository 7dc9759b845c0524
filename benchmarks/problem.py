"""Inputs of a public op on a device, in a dtype: what benchmarks time, checks judge and tests share."""

from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr_kernels import SFRConfig, SupervisedRows, VelocityHead, flow_matching_loss, linear_cross_entropy, sfr_loss

from .case import WrongResultError

OPS = ("flow_matching_loss", "linear_cross_entropy", "sfr_loss")
UPSTREAM = 1024.0  # a loss scaler's factor, without which fp16 loses gradients below its smallest number, everyone's
CHUNK = 2**26  # logits that the reference makes at a time
# Times that 16 bit holds exactly. With those of a training step, and its time scale, eager torch errs by more than half
# in the sinusoid, and to be no worse than that proves nothing.
TIMES = (0.125, 0.375, 0.625, 0.875)


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; `vocab` matters to the ops with a decoder, the head's sizes to those with a head."""

    batch: int
    length: int
    hidden_size: int
    supervised: float = 1.0  # share of the tokens, the last ones of each sequence
    vocab: int = 0
    frozen: bool = False  # the decoder's weight takes no gradient
    target_size: int = 1024
    width: int = 1024
    num_layers: int = 3

    def config(self, **options) -> SFRConfig:
        short = {} if self.length >= 256 else dict(stride=8, min_tokens=4, segment_tokens=16)
        return SFRConfig(width=self.width, num_layers=self.num_layers, time_scale=1.0, **short, **options)


def make_head(hidden_size: int, target_size: int | None, config: SFRConfig, dtype=torch.float64) -> VelocityHead:
    """A head on the CPU as in mid-training: the output layer and the norms are not at their initial values."""
    g = torch.Generator().manual_seed(3)
    head = VelocityHead.from_config(config, hidden_size, target_size).to(dtype)
    with torch.no_grad():
        for name, p in head.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            is_gain = name.endswith(("input_proj.1.weight", "norm.weight"))
            p.copy_(1 + 0.3 * noise if is_gain else noise * (p.shape[-1] ** -0.5 if p.dim() == 2 else 0.3))
    return head


class Problem:
    """Inputs of `op` in `dtype` on `device`, each sequence a prompt without loss and then a response. `run` is forward
    and backward through the public function. published: as the published head has it, a time per sequence, h as is."""

    def __init__(self, op: str, shape: Shape, dtype: torch.dtype, device: torch.device, published: bool = False):
        self.op, self.shape, self.dtype, self.device = op, shape, dtype, device
        self.config = shape.config(**dict(hidden_norm="none") if published else {})
        size, g = (shape.batch, shape.length), torch.Generator().manual_seed(0)
        self.labels = torch.randint(shape.vocab or 2, size, generator=g)
        self.labels[:, : shape.length - round(shape.supervised * shape.length)] = -100
        rows = SupervisedRows.from_labels(self.labels, self.config)
        index = rows.rows // shape.length if published else torch.arange(len(rows))
        timed = rows.replace(time_index=(index % len(TIMES)).int())
        self.labels, self.rows, self.timed_rows = self.labels.to(device), rows.to(device), timed.to(device)
        self.times = torch.tensor(TIMES, dtype=torch.float32, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.num_flow = rows.num_flow
        self.num_ce = int((self.labels != -100).sum()) if op == "linear_cross_entropy" else rows.num_ce
        self.normalizer = torch.tensor(float(self.num_ce), dtype=torch.float32, device=device)

        g = torch.Generator(device).manual_seed(1)
        self.hidden = torch.empty(*size, shape.hidden_size, dtype=dtype, device=device)
        self.redraw(0)
        self.hidden.requires_grad_()
        self.weight = self.head = self.targets = None
        if op != "flow_matching_loss":
            self.weight = torch.empty(shape.vocab, shape.hidden_size, dtype=dtype, device=device)
            self.weight.normal_(std=shape.hidden_size**-0.5, generator=g).requires_grad_(not shape.frozen)
        if op != "linear_cross_entropy":
            self.head = make_head(shape.hidden_size, shape.target_size, self.config).to(device, dtype)
            size = rows.num_anchors, shape.target_size
            self.targets = F.normalize(torch.randn(size, generator=g, dtype=torch.float32, device=device), dim=1)

    def redraw(self, draw: int) -> None:
        """Hidden states and noise of their own for each number."""
        self.hidden.detach().normal_(generator=torch.Generator(self.device).manual_seed(100 + draw))
        self.seed.fill_(draw)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that gets a gradient."""
        named = {"hidden": self.hidden, "weight": self.weight}
        named |= {} if self.head is None else dict(self.head.named_parameters())
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
        return sfr_loss(self.hidden, self.weight, **self._options(backend, judged)).loss

    def apart(self, backend: str, *, judged: bool = False) -> Tensor:
        """The joint loss as its two parts, one after the other."""
        return self._cross_entropy(self.rows, backend) + self.config.first_weight * self._flow(backend, judged)

    def _options(self, backend: str, judged: bool) -> dict:
        times = dict(rows=self.timed_rows, times=self.times) if judged else dict(rows=self.rows)
        common = dict(seed=self.seed, config=self.config, normalizer=self.normalizer, backend=backend)
        return dict(head=self.head, targets=self.targets) | times | common

    def _cross_entropy(self, labels: Tensor | SupervisedRows, backend: str) -> Tensor:
        options = dict(normalizer=self.normalizer, backend=backend)
        return linear_cross_entropy(self.hidden, self.weight, labels, **options)

    def _flow(self, backend: str, judged: bool) -> Tensor:
        return flow_matching_loss(self.hidden, **self._options(backend, judged))

    def _pieces(self, judged: bool) -> Iterator[Tensor]:
        """The reference, a loss that is their sum: on as many rows at a time as its logits fit."""
        if self.op != "flow_matching_loss":
            rows, labels = torch.arange(self.labels.numel(), device=self.device), self.labels.flatten()
            if self.op == "sfr_loss":
                rows, labels = self.rows.rows[self.rows.ce_start :], self.rows.labels[self.rows.ce_start :]
            step = max(1, CHUNK // self.shape.vocab)
            options = dict(normalizer=self.normalizer, backend="reference")
            for some, y in zip(rows.split(step), labels.split(step), strict=True):
                yield linear_cross_entropy(self.hidden.flatten(0, 1)[some], self.weight, y, **options)
        if self.op != "linear_cross_entropy":
            yield self._flow("reference", judged) * (self.config.first_weight if self.op == "sfr_loss" else 1.0)

    def exact(self, judged: bool = True) -> list[Tensor]:
        """The reference's loss and UPSTREAM times every gradient in float64, piece after piece."""
        twin = self.in_float64()
        leaves = list(twin.leaves.values())
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = [torch.zeros_like(p) for p in leaves]
        for loss in twin._pieces(judged):
            if loss.requires_grad:
                found = torch.autograd.grad(loss * UPSTREAM, leaves, allow_unused=True)
                sums = [s if g is None else s.add_(g) for s, g in zip(sums, found, strict=True)]
            total += loss.detach()
        return [total, *sums]

    def run(self, backend: str) -> list[Tensor]:
        return self.with_gradients(self.loss(backend))

    def judged(self, backend: str) -> list[Tensor]:
        return self.with_gradients(self.loss(backend, judged=True), UPSTREAM)

    def with_gradients(self, loss: Tensor, upstream: float = 1.0) -> list[Tensor]:
        """The loss, and `upstream` times the gradient of every leaf."""
        grads = torch.autograd.grad(loss, list(self.leaves.values()), torch.full_like(loss, upstream))
        return [loss.detach(), *grads]


def check_replay(problem: Problem, graph, run: Callable[[], list[Tensor]]) -> None:
    """A replay is the launched call with the seed that the device holds at that moment; WrongResultError if not."""
    losses = []
    for seed in (11, 12):
        problem.seed.fill_(seed)
        graph.replay()
        losses.append(graph.outputs[0].item())
        for replayed, launched in zip(graph.outputs, run(), strict=True):
            wrong = (replayed.double() - launched.double()).norm() / launched.double().norm().clamp(min=1e-30)
            # cuBLAS may choose another kernel under capture: the same up to rounding
            if not wrong <= 4 * torch.finfo(problem.dtype).eps + 1e-5:
                raise WrongResultError(f"a graph replay differs from the launched call by {wrong:.1e}")
    if losses[0] == losses[1]:
        raise WrongResultError("two replays with different seeds gave the same loss")

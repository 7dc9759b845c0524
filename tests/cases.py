"""Batches, heads and comparisons that the tests share. Everything random is seeded.

The oracle is `sfr_kernels.reference` under autograd in float64, on the inputs as the judged dtype rounded them. In
float32 and 16 bit the error against it may be at most k times the error that the reference itself makes in that dtype.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.oracle import Oracle
from benchmarks.problem import make_head
from sfr_kernels import SFRConfig, SupervisedRows, VelocityHead, reference

LEAVES = ("hidden", "weight", "bias")
VOCAB = 256  # no test has more classes
SEED = -6917529027641081857  # negative, and both halves in use


def make_labels(length: int = 13, vocab: int = 17) -> tuple[Tensor, Tensor]:
    """(4, length) labels and segment ids: every shape of response that a batch can have."""
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocab, (4, length), generator=g)
    segments = torch.zeros(4, length, dtype=torch.int64)
    labels[0, : length // 3] = -100  # a prompt, and a response to the very end
    labels[1] = -100  # nothing supervised
    labels[2] = torch.where(torch.arange(length) == length // 2, labels[2], -100)  # a response of one token
    labels[3, :2] = -100  # two samples packed: a prompt and its response, then one without a prompt
    segments[3, length // 2 :] = 1
    return labels, segments


def small_config(preset: str = "default", **overrides) -> SFRConfig:
    """A preset with lengths that fit a dozen tokens: several anchors a response, some rows past the last of them."""
    small = dict(width=10, num_layers=4, stride=3, min_tokens=2, segment_tokens=5, num_times=8) | overrides
    if small.get("loss") == "cka":
        small["segment_tokens"] = 0
    # a scale of its own for h, that no rounding hides
    return SFRConfig(**dict(hidden_scale=0.3) | small) if preset == "default" else SFRConfig.official(**small)


def embed(rows: SupervisedRows, labels: Tensor, size: int) -> Tensor:
    """(A, size) unit-norm float32 embeddings that depend on the text of a segment alone; an empty one is zero."""
    g = torch.Generator().manual_seed(2)
    table = torch.randn(VOCAB, size, generator=g)
    out = torch.zeros(rows.num_anchors, size)
    for a, (start, stop) in enumerate(rows.segments.tolist()):
        text = labels.flatten()[start:stop]
        order = torch.arange(1.0, len(text) + 1).sqrt().unsqueeze(1)
        out[a] = torch.nn.functional.normalize((table[text] * order).sum(0), dim=0)
    return out


@dataclass
class LossCase:
    """Everything one call of a loss takes, in float64 (targets in float32)."""

    config: SFRConfig
    labels: Tensor  # (B, L)
    rows: SupervisedRows
    hidden: Tensor  # (B, L, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)
    head: VelocityHead | None
    targets: Tensor  # (A, d); rows.labels for "mtp"
    seed: int | Tensor = SEED
    options: dict = field(default_factory=dict)  # more keywords of the loss

    @property
    def scales(self) -> dict[str, float]:
        """The head's scales, as the reference takes them."""
        if self.head is None:
            return dict(time_scale=1.0)
        return dict(time_scale=self.head.shape.time_scale, hidden_scale=self.head.shape.hidden_scale)

    def inputs(self, dtype=torch.float64, head_dtype=None) -> SimpleNamespace:
        """Fresh leaves in `dtype`, the head's in `head_dtype`."""
        head = deepcopy(self.head)
        if head is not None:
            head.to(head_dtype or dtype)
        tensors = {name: getattr(self, name).to(dtype, copy=True).requires_grad_() for name in LEAVES}
        return SimpleNamespace(**tensors, head=head, params={} if head is None else dict(head.named_parameters()))


def in_float64(x: SimpleNamespace) -> SimpleNamespace:
    """The same values, as rounded as they are, as fresh float64 leaves."""
    head = deepcopy(x.head).double()
    tensors = {name: getattr(x, name).detach().double().requires_grad_() for name in LEAVES}
    return SimpleNamespace(**tensors, head=head, params=dict(head.named_parameters()))


def make_case(
    config: SFRConfig,
    *,
    labels: Tensor | None = None,
    segments: Tensor | None = None,
    length: int = 13,
    hidden_size: int = 12,
    target_size: int = 6,
    vocab: int = 17,
    noise_id: Tensor | None = None,
) -> LossCase:
    """The batch of `make_labels`, or of the labels given, with everything that goes with it."""
    if labels is None:
        labels, segments = make_labels(length, vocab)
    rows = SupervisedRows.from_labels(labels, config, segments, noise_id)
    g = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    hidden, weight, bias = normal(*labels.shape, hidden_size), normal(vocab, hidden_size) / 2, normal(vocab) / 2
    target_size = hidden_size if config.loss == "mtp" else target_size
    head = None if config.loss == "cka" else make_head(hidden_size, target_size, config)
    targets = rows.labels if config.loss == "mtp" else embed(rows, labels, target_size)
    return LossCase(config, labels, rows, hidden, weight, bias, head, targets)


def evaluate(function: Callable, x: SimpleNamespace, upstream: float = 1.0) -> dict[str, Tensor]:
    """The value of function(x) and the gradient of every leaf, zeros where it got none."""
    value = function(x)
    leaves = {name: t for name, t in vars(x).items() if isinstance(t, Tensor) and t.is_leaf} | getattr(x, "params", {})
    wanted = [t for t in leaves.values() if t.requires_grad]
    upstream = torch.full_like(value, upstream)
    found = iter(torch.autograd.grad(value, wanted, upstream, allow_unused=True) if value.requires_grad else ())
    grads = {name: next(found, None) if t.requires_grad else None for name, t in leaves.items()}
    grads = {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in grads.items()}
    return {"value": value.detach(), **grads}


def assert_same(ours: dict[str, Tensor], exact: dict[str, Tensor], rtol: float = 1e-10) -> None:
    """float64 agreement: relative for every entry, with a floor of 1e-12 of the largest."""
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        floor = 1e-12 * max(1.0, value.abs().max().item()) if value.numel() else 0.0
        torch.testing.assert_close(ours[name].double(), value, rtol=rtol, atol=floor, msg=lambda m, n=name: f"{n}: {m}")


def assert_as_good_as_eager(ours: dict, eager: dict, exact: dict, k: float) -> None:
    """Every error is at most k times eager torch's, but for a rounding of a float32 result or two."""
    assert ours.keys() == exact.keys()
    Oracle(exact, list(exact.values()), [eager[name] for name in exact]).verdict([ours[name] for name in exact], k)


def judge(case: LossCase, ours: Callable, eager: Callable, k: float, dtype, head_dtype=None, draws: int = 6) -> None:
    """`assert_as_good_as_eager` over several draws of hidden states and noise: one bias gradient of forty numbers is
    too small a sample of errors. ours and eager: case → (leaves → loss)."""
    found = [], [], []
    for draw in range(draws):
        g = torch.Generator().manual_seed(draw)
        hidden = torch.randn(case.hidden.shape, generator=g, dtype=torch.float64)
        drawn = replace(case, seed=draw, hidden=hidden)
        x, y = (drawn.inputs(dtype, head_dtype) for _ in range(2))
        result = evaluate(ours(drawn), x)
        assert result["value"].dtype == torch.float32
        assert all(result[name].dtype == dtype for name in LEAVES)
        assert all(result[name].dtype == (head_dtype or dtype) for name in x.params)
        found[0].append(result)
        found[1].append(evaluate(eager(drawn), y))
        found[2].append(evaluate(eager(drawn), in_float64(y)))
    mine, theirs, exact = ({name: torch.stack([r[name] for r in rs]) for name in rs[0]} for rs in found)
    assert_as_good_as_eager(mine, theirs, exact, k)


def reference_sfr(case: LossCase, **overrides) -> Callable:
    """x → the loss of `reference.sfr_loss` on the case."""
    return lambda x: reference.sfr_loss(
        x.hidden,
        x.weight,
        x.params,
        case.rows,
        case.targets,
        seed=case.seed,
        config=case.config,
        **case.scales | dict(bias=x.bias) | case.options | overrides,
    )[0]


def reference_flow(case: LossCase, **overrides) -> Callable:
    """x → the loss of `reference.flow_matching_loss` on the case."""
    return lambda x: reference.flow_matching_loss(
        x.hidden,
        x.params,
        case.rows,
        case.targets,
        seed=case.seed,
        config=case.config,
        **case.scales | case.options | overrides,
    )

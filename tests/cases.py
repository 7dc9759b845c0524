"""Batches, heads, losses and comparisons that the tests share. Everything random is seeded.

The oracle is `sfr_kernels.reference` under autograd in float64, on the inputs as the judged dtype rounded them. In
float32 and 16 bit the error against it may be at most k times the error that the reference itself makes in that dtype.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.oracle import Oracle
from benchmarks.problem import make_head
from sfr_kernels import LoRA, SFRConfig, SupervisedRows, flow_matching_loss, linear_cross_entropy, reference, sfr_loss
from sfr_kernels.modules import VelocityHead

IGNORE = -100
LEAVES = ("hidden", "weight", "bias")
ADAPTERS = (("down", "up", 0.7), ("down_2", "up_2", -1.5))  # leaves of a case that has some, and the scale
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

    config: SFRConfig | None  # None, and no rows: for the cross-entropy alone
    labels: Tensor  # (B, L)
    rows: SupervisedRows | None
    hidden: Tensor  # (B, L, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)
    head: VelocityHead | None
    targets: Tensor | None  # (A, d); rows.labels for "mtp"
    down: Tensor | None = None  # (2, H)
    up: Tensor | None = None  # (V, 2)
    down_2: Tensor | None = None  # (3, H)
    up_2: Tensor | None = None  # (V, 3)
    seed: int | Tensor = SEED
    options: dict = field(default_factory=dict)  # more keywords of the loss

    def inputs(self, dtype=torch.float64, head_dtype=None) -> SimpleNamespace:
        return leaves_in(self, dtype, head_dtype)


def leaves_in(x: LossCase | SimpleNamespace, dtype, head_dtype=None) -> SimpleNamespace:
    """The values of x as fresh leaves in `dtype`, the head's in `head_dtype`."""
    head = None if x.head is None else deepcopy(x.head).to(head_dtype or dtype)
    names = [*LEAVES, *(name for pair in ADAPTERS for name in pair[:2] if getattr(x, name, None) is not None)]
    tensors = {name: getattr(x, name).detach().to(dtype, copy=True).requires_grad_() for name in names}
    return SimpleNamespace(**tensors, head=head, params={} if head is None else dict(head.named_parameters()))


in_float64 = partial(leaves_in, dtype=torch.float64)  # as rounded as they are


def make_case(
    config: SFRConfig, *, labels: Tensor | None = None, segments: Tensor | None = None, noise_id: Tensor | None = None,
    length: int = 13, hidden_size: int = 12, target_size: int = 6, vocab: int = 17,
) -> LossCase:  # fmt: skip
    """The batch of `make_labels`, or of the labels given, with everything that goes with it."""
    if labels is None:
        labels, segments = make_labels(length, vocab)
    rows = SupervisedRows.from_labels(labels, config, segments, noise_id)
    g = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    hidden, weight, bias = normal(*labels.shape, hidden_size), normal(vocab, hidden_size) / 2, normal(vocab) / 2
    mtp = config.loss == "mtp"
    head = None if config.loss == "cka" else make_head(hidden_size, None if mtp else target_size, config)
    targets = rows.labels if mtp else embed(rows, labels, target_size)
    return LossCase(config, labels, rows, hidden, weight, bias, head, targets)


def decoder_case(shape=(3, 11), hidden_size=20, vocab=37, used=0.6) -> LossCase:
    """For the cross-entropy alone: labels without an order, of which a share is not ignored."""
    g = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    hidden, weight, bias = normal(*shape, hidden_size), normal(vocab, hidden_size) / 2, normal(vocab)
    labels = torch.randint(0, vocab, shape, generator=g)
    labels[torch.rand(shape, generator=g) > used] = IGNORE
    return LossCase(None, labels, None, hidden, weight, bias, None, None)


def with_adapters(case: LossCase) -> LossCase:
    """Two adapters, neither of whose ranks is a multiple of anything."""
    g, found = torch.Generator().manual_seed(5), {}
    (vocab, size), options = case.weight.shape, dict(generator=g, dtype=torch.float64)
    for rank, (down, up, _) in zip((2, 3), ADAPTERS, strict=True):
        found[down], found[up] = torch.randn(rank, size, **options) / 3, torch.randn(vocab, rank, **options) / 3
    return replace(case, **found)


def lora_of(x: SimpleNamespace) -> list[LoRA]:
    return [LoRA(getattr(x, down), getattr(x, up), scale) for down, up, scale in ADAPTERS if hasattr(x, down)]


def leaves_of(x: SimpleNamespace) -> dict[str, Tensor]:
    """The tensors of `inputs` that may have a gradient, the head's parameters by their names."""
    return {name: t for name, t in vars(x).items() if isinstance(t, Tensor) and t.is_leaf} | getattr(x, "params", {})


def evaluate(function: Callable, x: SimpleNamespace, upstream: float = 1.0) -> dict[str, Tensor]:
    """The value of function(x) and the gradient of every leaf, zeros where it got none."""
    value = function(x)
    leaves = leaves_of(x)
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


# ---------------------------------------------------------------------------------------------------------------------
# The losses: `output` calls the public function; ours and reference take a case to a function (leaves → scalar)


def entropy_output(case: LossCase, x: SimpleNamespace, *, of_rows=False, bias=True, **options):
    options = dict(bias=x.bias if bias else None, lora=lora_of(x)) | options
    return linear_cross_entropy(x.hidden, x.weight, case.rows if of_rows else case.labels, **options)


def flow_output(case: LossCase, x: SimpleNamespace, **options):
    options = dict(seed=case.seed, config=case.config) | options
    return flow_matching_loss(x.hidden, x.head, case.rows, case.targets, **options)


def sfr_output(case: LossCase, x: SimpleNamespace, **options):
    options = dict(bias=x.bias, lora=lora_of(x), seed=case.seed, config=case.config) | options
    return sfr_loss(x.hidden, x.weight, x.head, case.rows, case.targets, **options)


def our(output: Callable, case: LossCase, **overrides) -> Callable:
    """x → the loss in what the public function returns; the losses of rows are summed with a weight for each."""

    def run(x):
        found = output(case, x, **case.options | overrides)
        loss = found[0] if isinstance(found, tuple) else found
        return loss if loss.dim() == 0 else (loss.flatten() * row_upstream(loss.numel())).sum()

    return run


def row_upstream(count: int) -> Tensor:
    """The gradient that comes back to each of `count` rows, no two the same."""
    return torch.linspace(-1, 2, count, dtype=torch.float32)


our_entropy, our_flow, our_sfr = (partial(our, f) for f in (entropy_output, flow_output, sfr_output))


def reference_entropy(case: LossCase, **overrides) -> Callable:
    """x → the loss of `reference.linear_cross_entropy` on the case, its rows gathered and reduced here."""

    def run(
        x, *, of_rows=False, bias=True, shift=0, ignore_index=IGNORE, reduction="mean", normalizer=None,
        row_weight=None, **options,
    ):  # fmt: skip
        if of_rows:
            index, labels = case.rows.rows[case.rows.ce_start :], case.rows.labels[case.rows.ce_start :]
        else:
            ahead, labels = int(shift), torch.full_like(case.labels, ignore_index)
            labels[..., : labels.shape[-1] - ahead] = case.labels[..., ahead:]
            index = (labels.flatten() != ignore_index).nonzero().squeeze(1)
            labels = labels.flatten()[index]
        h = x.hidden.reshape(-1, x.hidden.shape[-1])
        weights = None if row_weight is None else row_weight.flatten()[index].to(h.dtype)
        options = dict(bias=x.bias if bias else None, lora=lora_of(x), row_weight=weights, ignore_index=-1) | options
        rows = reference.linear_cross_entropy(h[index], x.weight, labels, **options)
        if reduction == "none":
            return (rows * row_upstream(len(h))[index]).sum()
        return rows.sum() / (1 if reduction == "sum" else max(len(rows), 1) if normalizer is None else normalizer)

    return lambda x: run(x, **case.options | overrides)


def _flow_options(case: LossCase) -> dict:
    """What the reference is told of the flow."""
    shape = None if case.head is None else case.head.shape
    names = ("time_scale", "hidden_scale", "hidden_norm")
    scales = {name: getattr(shape, name) for name in names} if shape else dict(time_scale=1.0)
    return dict(seed=case.seed, config=case.config) | scales | case.options


def reference_sfr(case: LossCase, **overrides) -> Callable:
    """x → the loss of `reference.sfr_loss` on the case."""
    options, given = _flow_options(case) | overrides, (case.rows, case.targets)
    decoder = lambda x: dict(bias=x.bias, lora=lora_of(x))  # noqa: E731
    return lambda x: reference.sfr_loss(x.hidden, x.weight, x.params, *given, **decoder(x) | options)[0]


def reference_flow(case: LossCase, **overrides) -> Callable:
    """x → the loss of `reference.flow_matching_loss` on the case."""
    options = _flow_options(case) | overrides
    return lambda x: reference.flow_matching_loss(x.hidden, x.params, case.rows, case.targets, **options)


@dataclass(frozen=True)
class Loss:
    """One of the losses as the tests of every loss call it."""

    output: Callable  # (case, leaves, **options) → what the public function returns
    reference: Callable
    preset: str = "default"
    config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    lora: bool = False

    def case(self, config: dict | None = None, **sizes) -> LossCase:
        case = replace(make_case(small_config(self.preset, **config or self.config), **sizes), options=self.options)
        return with_adapters(case) if self.lora else case

    def sized_case(self) -> LossCase:
        """Enough rows for errors to be statistics, and times and angles that 16 bit holds, or eager drowns in t."""
        config = self.config | dict(time_scale=1.0, width=40)
        case = self.case(config=config, length=41, hidden_size=32, target_size=24, vocab=83)
        if self.output is not entropy_output and case.config.loss == "flow":
            case.rows = case.rows.replace(time_index=(case.rows.noise_id % 4).int())
            case.options = case.options | dict(times=torch.tensor([0.125, 0.375, 0.625, 0.875]))
        return case

    def ours(self, case: LossCase, **overrides) -> Callable:
        return our(self.output, case, **overrides)

    def leaves(self, x: SimpleNamespace) -> dict[str, Tensor]:
        """Those that this loss has a gradient for."""
        none = ("weight", "bias") if self.output is flow_output else x.params if self.output is entropy_output else ()
        return {name: t for name, t in leaves_of(x).items() if name not in none}


_entropy = partial(Loss, entropy_output, reference_entropy)
LOSSES = {
    "cross-entropy": _entropy(options=dict(shift=1)),
    "sum": _entropy(options=dict(reduction="sum")),
    "row losses": _entropy(options=dict(shift=1, reduction="none")),
    "cross-entropy of rows": _entropy(options=dict(of_rows=True)),
    # the published rows begin with some that have flow only
    "row losses of rows": _entropy("official", options=dict(of_rows=True, reduction="none")),
    **{
        f"{name}: {loss}, {preset}": Loss(output, exact, preset, dict(loss=loss, flow_weight=0.6))
        for name, output, exact in (("flow", flow_output, reference_flow), ("sfr", sfr_output, reference_sfr))
        for loss in ("flow", "mse", "cosine", "cka")
        for preset in ("default", "official")
    },
    "sfr: mtp": Loss(sfr_output, reference_sfr, config=dict(loss="mtp", mtp_tokens=3, flow_weight=0.6)),
}
LOSSES |= {
    f"{name}, lora": replace(LOSSES[name], lora=True)
    for name in ("cross-entropy", "row losses of rows", "sfr: flow, default", "sfr: flow, official", "sfr: mtp")
}


def losses(*words, without=()):
    """Parametrises a test by the names in which one of the words is, and none of those."""
    names = [n for n in LOSSES if any(word in n for word in words or ("",)) and not any(word in n for word in without)]
    return pytest.mark.parametrize("name", names)


EVERY = losses()

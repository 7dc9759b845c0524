"""Problems of a linear layer's cross-entropy that the tests share, and their oracle."""

from types import SimpleNamespace

import torch
from cases import evaluate
from torch import Tensor

from sfr_kernels import linear_cross_entropy, reference

IGNORE = -100
LEAVES = ("hidden", "weight", "bias")


def make(shape=(3, 11), hidden_size=20, vocab=37, dtype=torch.float64, used=0.6) -> SimpleNamespace:
    """Leaves hidden, weight and bias in `dtype`; labels, some of them ignored, and a weight for each row."""
    g = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    tensors = normal(*shape, hidden_size), normal(vocab, hidden_size) / 2, normal(vocab)
    hidden, weight, bias = (t.to(dtype).requires_grad_() for t in tensors)
    labels = torch.randint(0, vocab, shape, generator=g)
    labels[torch.rand(shape, generator=g) > used] = IGNORE
    x = SimpleNamespace(hidden=hidden, weight=weight, bias=bias, labels=labels)
    x.row_weight = torch.rand(shape, generator=g)
    return x


def again(x: SimpleNamespace, dtype: torch.dtype) -> SimpleNamespace:
    """The same values as fresh leaves in `dtype`."""
    leaves = {name: getattr(x, name).detach().to(dtype, copy=True).requires_grad_() for name in LEAVES}
    return SimpleNamespace(**vars(x) | leaves)


def leaves_only(x: SimpleNamespace, function) -> dict[str, Tensor]:
    """value and gradients of function(), by the names of LEAVES."""
    return evaluate(lambda _: function(), SimpleNamespace(**{name: getattr(x, name) for name in LEAVES}))


def oracle(x: SimpleNamespace, reduce=None, labels=None, row_weight=None, bias=True, **options) -> dict[str, Tensor]:
    """The reference under autograd; `reduce` takes the row losses (N,) to a scalar, the mean if None."""
    labels = (x.labels if labels is None else labels).flatten()

    def run():
        h = x.hidden.reshape(-1, x.hidden.shape[-1])
        weights = None if row_weight is None else row_weight.flatten().to(h.dtype)
        both = dict(bias=x.bias if bias else None, row_weight=weights)
        rows = reference.linear_cross_entropy(h, x.weight, labels, **both, **options)
        used = max(int((labels != options.get("ignore_index", IGNORE)).sum()), 1)
        return rows.sum() / used if reduce is None else reduce(rows)

    return leaves_only(x, run)


def ours(x: SimpleNamespace, bias=True, **options) -> dict[str, Tensor]:
    bias = x.bias if bias else None
    return leaves_only(x, lambda: linear_cross_entropy(x.hidden, x.weight, x.labels, bias=bias, **options))


OPTIONS = {
    "nothing but the bias": dict(),
    "no bias": dict(bias=False),
    "softcap": dict(softcap=3.0),  # logits have a deviation of about 2.5: most are in the bend of the tanh
    "logit_scale": dict(logit_scale=0.3),
    "label_smoothing": dict(label_smoothing=0.2),
    "z_loss": dict(z_loss=0.05),
    "row_weight": dict(row_weight=True),
    "ignore_index is a class": dict(ignore_index=5),
    "everything": dict(softcap=3.0, logit_scale=0.7, label_smoothing=0.1, z_loss=0.02, row_weight=True),
}

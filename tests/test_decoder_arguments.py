"""Arguments of the cross-entropy and the joint loss at their edges: a clear error, or the right number."""

import math
import re

import pytest
import torch
import torch._inductor.config
from cases import make_case, small_config
from decoder_cases import again, leaves_only, make, oracle

from sfr_kernels import flow_matching_loss, linear_cross_entropy, sfr_loss

pytestmark = pytest.mark.usefixtures("one_thread")

WRONG = [
    (TypeError, "row_weight", dict(row_weight=0.5)),
    (ValueError, "bias", dict(bias=[0.0] * 37)),
    (ValueError, "logits_dtype", dict(logits_dtype="float32")),
    (ValueError, "logits_dtype", dict(logits_dtype=torch.float16)),  # which has no room for 1 / normalizer
    (ValueError, "logits_dtype", dict(logits_dtype=torch.float64)),
    (TypeError, "z_loss", dict(z_loss="a")),
    (TypeError, "logit_scale", dict(logit_scale=True)),
    (ValueError, "softcap", dict(softcap=math.inf)),
    (TypeError, "ignore_index", dict(ignore_index=None)),
]


@pytest.mark.parametrize("error, name, option", WRONG, ids=[re.sub(r"\W+", " ", str(w[2])) for w in WRONG])
def test_errors_name_the_argument(error, name, option):
    x = make(dtype=torch.float32)
    with pytest.raises(error, match=name):
        linear_cross_entropy(x.hidden, x.weight, x.labels, **option)


@pytest.mark.parametrize("error, name, option", [
    (TypeError, "flow_weight", dict(flow_weight="1")),
    (ValueError, "targets", dict(targets=None)),
    (ValueError, "targets are on meta", dict(targets="meta")),
])  # fmt: skip
def test_errors_of_the_joint_loss_name_the_argument(error, name, option):
    case = make_case(small_config(loss="mtp"))
    targets = option.pop("targets", case.targets)
    targets = case.targets.to("meta") if isinstance(targets, str) else targets
    with pytest.raises(error, match=name):
        sfr_loss(case.hidden, case.weight, case.head, case.rows, targets, seed=1, config=case.config, **option)


@pytest.mark.parametrize("loss", ["flow", "cosine", "mtp"])
def test_a_flow_weight_of_another_dtype_leaves_the_loss_its_own(loss):
    case = make_case(small_config(loss=loss))
    x = case.inputs(torch.float32)
    weight = torch.tensor(0.5, dtype=torch.float64)
    options = dict(seed=1, config=case.config, flow_weight=weight)
    assert sfr_loss(x.hidden, x.weight, x.head, case.rows, case.targets, **options).loss.dtype == torch.float32


def test_unsigned_labels_are_shifted_like_others():
    """−100 would become the class 156."""
    x = make(vocab=200, used=1.0)
    expected = linear_cross_entropy(x.hidden, x.weight, x.labels, shift=True)
    assert linear_cross_entropy(x.hidden, x.weight, x.labels.to(torch.uint8), shift=True) == expected


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_float16_keeps_gradients_of_rows_of_little_weight(reduction):
    """Weights of 1 / (rows · batches) would put the gradients of the logits below what float16 holds."""
    x = make((2, 32), hidden_size=64, vocab=512)
    scale, row_weight = 2.0**16, 1e-6 * (0.5 + x.row_weight)
    kept = (x.labels != -100).sum()

    def reduce(rows):
        return scale * (rows.sum() if reduction == "sum" else rows.sum() / kept)

    exact = oracle(again(x, torch.float64), reduce, row_weight=row_weight)
    y = again(x, torch.float16)
    options = dict(bias=y.bias, row_weight=row_weight, reduction=reduction)
    mine = leaves_only(y, lambda: scale * linear_cross_entropy(y.hidden, y.weight, y.labels, **options))
    for name in ("hidden", "weight", "bias"):
        assert (mine[name].double() - exact[name]).norm() <= 3e-3 * exact[name].norm(), name


def test_rows_of_no_weight_give_zero_in_float16():
    x = make(dtype=torch.float16)
    loss = linear_cross_entropy(x.hidden, x.weight, x.labels, row_weight=torch.zeros(3, 11), reduction="sum")
    loss.backward()
    assert loss == 0 and not x.hidden.grad.any()


@pytest.mark.parametrize("joint", [False, True])
def test_a_transposed_weight_has_the_gradient_that_is_foretold(joint):
    """A fake that kept its strides would let inductor write where nothing is."""
    torch._dynamo.reset()
    case = make_case(small_config())
    x = case.inputs(torch.float32)

    def loss(hidden, weight):
        if joint:
            return sfr_loss(hidden, weight, x.head, case.rows, case.targets, seed=1, config=case.config).loss
        return linear_cross_entropy(hidden, weight, case.rows)

    transposed = x.weight.detach().T.contiguous().T.requires_grad_()
    wanted = torch.autograd.grad(loss(x.hidden, x.weight), x.weight)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="inductor")
    with torch._inductor.config.patch(force_disable_caches=True):  # which hold what another fake was compiled to
        found = torch.autograd.grad(compiled(x.hidden, transposed), transposed)[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["decoder", "flow", "sfr"])
def test_a_gradient_of_a_gradient_is_refused_whatever_the_upstream(kind):
    """The upstream gradient is the constant one, and yet the gradient depends on the parameters."""
    case = make_case(small_config())
    x = case.inputs()
    if kind == "decoder":
        loss = linear_cross_entropy(x.hidden, x.weight, case.labels, shift=True)
    elif kind == "flow":
        loss = flow_matching_loss(x.hidden, x.head, case.rows, case.targets, seed=1, config=case.config)
    else:
        loss = sfr_loss(x.hidden, x.weight, x.head, case.rows, case.targets, seed=1, config=case.config).loss
    (grad,) = torch.autograd.grad(loss, x.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()

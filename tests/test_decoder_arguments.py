"""Arguments of the cross-entropy and the joint loss at their edges: a clear error, or the right number."""

import itertools
import math
import re

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from cases import assert_same, make_case, make_head, small_config
from decoder_cases import IGNORE, LEAVES, again, leaves_only, make, oracle, ours

from sfr_kernels import LinearCrossEntropy, SupervisedRows, flow_matching_loss, linear_cross_entropy, sfr_loss

pytestmark = pytest.mark.usefixtures("one_thread")

WRONG = [
    (TypeError, "row_weight", dict(row_weight=0.5)),
    (TypeError, "bias", dict(bias=[0.0] * 37)),
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
    (TypeError, "targets", dict(targets=None)),
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


CODES = [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64]
FLOATS = ("hidden", "weight", "bias")
NUMBERS = ("row_weight", "labels", "normalizer")  # integers, too


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name, dtype", [*itertools.product(FLOATS, CODES), *itertools.product(NUMBERS, CODES[2:])])
def test_codes_of_a_quantized_tensor_are_no_numbers(name, dtype, autocast):
    """Autocast would cast them, and the loss would be that of the codes."""
    x = make(dtype=torch.float32)
    tensors = dict(hidden=x.hidden, weight=x.weight, bias=x.bias, row_weight=x.row_weight, labels=x.labels.clamp(min=0))
    tensors = {key: t.detach() for key, t in tensors.items()} | dict(normalizer=torch.tensor(2.0))
    tensors[name] = tensors[name].to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(TypeError, match=f"^{name} must be"):
        linear_cross_entropy(**tensors)


GIVEN = {
    "head.output_proj.weight": ("flow", "cosine", "mtp"),
    "rows.weight": ("flow", "cka", "mtp"),
    "targets": ("flow", "mse"),
    "times": ("flow",),
    "flow_weight": ("flow", "cosine"),
}


@pytest.mark.parametrize("name, loss, dtype", [
    (name, loss, dtype)
    for name, losses in GIVEN.items()
    for loss in losses
    for dtype in (CODES[2:] if name == "flow_weight" else CODES)  # which may be an integer
])  # fmt: skip
def test_the_flow_takes_no_codes(name, loss, dtype):
    case = make_case(small_config("official" if loss == "flow" else "default", loss=loss))
    x, call = case.inputs(torch.float32), dict(rows=case.rows, targets=case.targets, seed=1, config=case.config)
    if name.startswith("head"):
        parameter = x.head.output_proj.weight.detach().to(dtype)
        x.head.output_proj.weight = torch.nn.Parameter(parameter, requires_grad=False)
    elif name == "rows.weight":
        call["rows"] = case.rows.replace(weight=case.rows.weight.to(dtype))
    else:
        call[name] = dict(targets=case.targets, times=torch.zeros(4), flow_weight=torch.tensor(1.0))[name].to(dtype)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"^{name} must be"):
        sfr_loss(x.hidden, x.weight, x.head, **call)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("name", ["x_t", "t", "hidden", "head.input_proj.1.bias"])
def test_the_head_takes_no_codes(name, dtype):
    head, call = make_head(12, 6, small_config(), torch.float32), dict(x_t=torch.zeros(3, 6), t=torch.zeros(3))
    call |= dict(hidden=torch.zeros(3, 12))
    if name in call:
        call[name] = call[name].to(dtype)
    else:
        head.input_proj[1].bias = torch.nn.Parameter(torch.zeros(10).to(dtype), requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"^{name} must be"):
        head(**call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8])
def test_a_row_weight_of_integers_or_bools_counts_as_its_numbers(kind, backend, dtype):
    x = make(dtype=dtype)
    x.row_weight = torch.arange(33).view(3, 11).remainder(3).to(kind)
    used, y = x.labels != IGNORE, again(x, torch.float64)

    def exact():
        rows = F.cross_entropy((y.hidden @ y.weight.T + y.bias)[used], x.labels[used], reduction="none")
        return torch.zeros(3, 11, dtype=torch.float64).masked_scatter(used, rows * x.row_weight[used].double())

    for reduction, reduce in (
        ("none", torch.clone),
        ("sum", torch.sum),
        ("mean", lambda rows: rows.sum() / used.sum()),
    ):
        found = ours(x, reduction=reduction, row_weight=x.row_weight, backend=backend)
        for name, value in leaves_only(y, lambda reduce=reduce: reduce(exact())).items():
            error = (found[name].double() - value).norm() / value.norm()
            assert error < (1e-12 if dtype == torch.float64 else 3e-3), (reduction, name, error)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_label_smoothing_may_be_all(backend):
    x = make()
    used = x.labels != IGNORE
    wanted = leaves_only(
        x,
        lambda: F.cross_entropy((x.hidden @ x.weight.T + x.bias)[used], x.labels[used], label_smoothing=1.0),
    )
    assert_same(ours(x, label_smoothing=1.0, backend=backend), wanted)


def weighted(x, reduction, class_weight):
    """torch's own loss of the logits."""
    logits = (x.hidden @ x.weight.T + x.bias).flatten(0, 1)
    return F.cross_entropy(logits, x.labels.flatten(), class_weight.to(logits.dtype), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["torch", "reference", "compiled", "module", "rows"])
def test_class_weights_are_those_of_torch(kind, reduction):
    x, class_weight = make(), torch.rand(37, generator=torch.Generator().manual_seed(1)) * 3
    options, function, labels = dict(reduction=reduction, class_weight=class_weight), linear_cross_entropy, x.labels
    if kind == "module":
        function, options = LinearCrossEntropy(**options), {}
        assert [name for name, _ in function.named_buffers()] == ["class_weight"]
    elif kind == "compiled":  # where the operator finds the supervised rows; ignored is a class that has a weight
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        options["ignore_index"] = 5
        labels = x.labels.masked_fill(x.labels == IGNORE, 5)
        x.labels[x.labels == 5] = IGNORE
    elif kind == "rows":
        labels = SupervisedRows.from_labels(x.labels)
        x.labels = F.pad(x.labels[:, 1:], (0, 1), value=IGNORE)
    else:
        options["backend"] = kind
    upstream = torch.rand(33, dtype=torch.float64) if reduction == "none" else 1.0

    def run():
        return (function(x.hidden, x.weight, labels, bias=x.bias, **options).flatten() * upstream).sum()

    wanted = leaves_only(x, lambda: (weighted(x, reduction, class_weight) * upstream).sum())
    assert_same(leaves_only(x, run), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_class_and_row_weights_multiply(dtype):
    x, class_weight = make(dtype=dtype), torch.arange(37) / 10.0
    y = again(x, torch.float64)
    of_class = class_weight.double()[x.labels.clamp(min=0)].flatten() * (x.labels != IGNORE).flatten()
    total = leaves_only(y, lambda: (weighted(y, "none", class_weight) * x.row_weight.flatten()).sum())
    for options, divisor in ((dict(), of_class.sum()), (dict(normalizer=3.0), 3.0), (dict(reduction="sum"), 1.0)):
        found = ours(x, class_weight=class_weight, row_weight=x.row_weight, **options)
        for name in ("value", *LEAVES):
            wanted = total[name] / divisor
            error = (found[name].double() - wanted).norm() / wanted.norm()
            assert error < (1e-7 if dtype == torch.float64 else 3e-3), (options, name, error)


def test_a_label_that_is_no_class_has_no_weight_and_is_refused():
    x = make(used=1.0)
    x.labels[1, 1] = 37
    with pytest.raises(ValueError, match=r"labels .* got 37"):
        linear_cross_entropy(x.hidden, x.weight, x.labels, class_weight=torch.ones(37))


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

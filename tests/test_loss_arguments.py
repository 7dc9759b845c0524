"""Arguments of the losses: an error that names the argument, for all that would give a wrong number."""

import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import LOSSES, make_case, make_head, small_config

from sfr_kernels import LoRA, flow_matching_loss, linear_cross_entropy, sfr_loss

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])
META = torch.zeros(1, dtype=torch.float32, device="meta")
CASE = make_case(small_config())  # 4 sequences of 13, H = 12, V = 17, d = 6
ROWS, TARGETS, (A, D) = CASE.rows, CASE.targets.float(), CASE.targets.shape
BEYOND = ROWS.replace(labels=torch.full_like(ROWS.labels, 17))  # the vocabulary


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def labels(value):
    return torch.full((4, 13), value)


def head(hidden_size=12, target_size=6, **config):
    return make_head(hidden_size, target_size, small_config(**config), torch.float32)


def lora(down=None, up=None, **options):
    return LoRA(zeros(2, 12) if down is None else down, zeros(17, 2) if up is None else up, **options)


def spoilt(value):
    targets = TARGETS.clone()
    targets[1, 2] = value
    return targets


def wrong(functions, error, says=None, beside=None, **values):
    """For each of the values of one argument: a call, beside other arguments, of each of the functions. The error
    `says` something that begins with the argument's name."""
    ((name, values),) = values.items()
    says, beside = says or f"^{name}", beside or {}
    return [pytest.param(functions, error, says, {name: v} | beside, id=f"{name} {i}") for i, v in enumerate(values)]


# E is linear_cross_entropy, F flow_matching_loss, S sfr_loss
WRONG = [
    *wrong("EFS", TypeError, hidden=[zeros(4, 13, 12, dtype=torch.int64), [1.0]]),
    *wrong("EFS", ValueError, hidden=[zeros(12)]),
    *wrong("FS", ValueError, "rows were made for", hidden=[zeros(4, 12, 12)]),
    *wrong("ES", ValueError, weight=[zeros(17, 11), META.expand(17, 12)]),
    *wrong("ES", ValueError, "weight is empty", weight=[zeros(0), zeros(0, 12)]),  # as ZeRO-3 leaves it
    *wrong("ES", TypeError, weight=[zeros(17, 12, dtype=torch.float64)]),
    *wrong("ES", ValueError, bias=[zeros(12), META.expand(17)]),
    *wrong("ES", TypeError, bias=[zeros(17, dtype=torch.float64), [0.0] * 17]),
    *wrong("ES", TypeError, lora=[(zeros(2, 12), zeros(17, 2)), zeros(2, 12), [lora(), None]]),
    *wrong("ES", TypeError, "lora.down must", lora=[lora(zeros(2, 12, dtype=torch.int8))]),
    *wrong("ES", TypeError, "lora.down is", lora=[lora(zeros(2, 12, dtype=torch.float64))]),
    *wrong("ES", TypeError, "lora.up is", lora=[lora(up=zeros(17, 2, dtype=torch.bfloat16))]),
    *wrong("ES", ValueError, "lora.down", lora=[lora(zeros(12, 2)), lora(zeros(12)), lora(META.expand(2, 12))]),
    *wrong("ES", ValueError, "lora.down is empty", lora=[lora(zeros(0)), lora(zeros(0, 12))]),  # as ZeRO-3 leaves it
    *wrong("ES", ValueError, "lora.up", lora=[lora(up=zeros(17, 3)), lora(up=zeros(2, 17)), lora(up=zeros(0))]),
    *wrong("ES", ValueError, r"lora\[1\].up", lora=[[lora(), lora(up=zeros(16, 2))]]),
    *wrong("ES", TypeError, "lora.scale", lora=[lora(scale="1"), lora(scale=torch.ones(()))]),
    *wrong("ES", ValueError, "lora.scale", lora=[lora(scale=math.nan)]),
    *wrong("ES", ValueError, "lora.dropout", lora=[lora(dropout=1.5), lora(dropout=-0.1)]),
    *wrong("E", TypeError, labels=[zeros(4, 13), zeros(4, 13, dtype=torch.bool)]),
    *wrong("E", ValueError, labels=[zeros(13, 4, dtype=torch.int64), META.long().expand(4, 13)]),
    *wrong("E", ValueError, "labels .* got -1", labels=[labels(-1)]),
    *wrong("E", ValueError, "labels .* got 17", labels=[labels(17)]),  # beyond the vocabulary
    *wrong("E", ValueError, "labels .* got 17", labels=[labels(17)], beside=dict(debug=True)),
    *wrong("E", ValueError, "labels .* got 17", labels=[labels(17)], beside=dict(class_weight=torch.ones(17))),
    *wrong("S", ValueError, "labels .* got 17", rows=[BEYOND]),
    *wrong("S", ValueError, "labels .* got 17", rows=[BEYOND], beside=dict(debug=True)),
    *wrong("E", ValueError, "rows were made for", labels=[ROWS], beside=dict(hidden=zeros(3, 13, 12))),
    *wrong("E", TypeError, ignore_index=[None]),
    *wrong("E", ValueError, shift=[-1]),
    *wrong("E", ValueError, shift=[True], beside=dict(labels=ROWS)),
    *wrong("E", TypeError, shift=[1.0]),
    *wrong("E", ValueError, row_weight=[torch.ones(3), META.expand(4, 13)]),
    *wrong("E", TypeError, row_weight=[0.5]),
    *wrong("E", ValueError, class_weight=[torch.ones(4), META.expand(17)]),
    *wrong("E", TypeError, class_weight=[zeros(17, dtype=torch.int64)]),
    *wrong("E", ValueError, class_weight=[torch.ones(17)], beside=dict(label_smoothing=0.1)),
    *wrong("E", ValueError, reduction=["median"]),
    *wrong("E", ValueError, normalizer=[3], beside=dict(reduction="sum")),
    *wrong("EFS", ValueError, normalizer=[-1, math.nan, torch.ones(2)]),
    *wrong("EFS", TypeError, normalizer=["3", [1], True]),
    *wrong("ES", ValueError, softcap=[0.0, -1.0, math.inf]),
    *wrong("ES", TypeError, logit_scale=[True]),
    *wrong("ES", ValueError, logit_scale=[math.nan]),
    *wrong("ES", ValueError, label_smoothing=[1.1]),
    *wrong("ES", ValueError, z_loss=[-0.1, math.nan]),
    *wrong("ES", TypeError, z_loss=["a"]),
    # float16 has no room for 1 / normalizer
    *wrong("E", ValueError, logits_dtype=["float32", torch.float16, torch.float64, torch.int64]),
    *wrong("ES", ValueError, chunk_rows=[0]),
    *wrong("ES", TypeError, chunk_rows=[True]),  # not 1
    *wrong("ES", ValueError, accum_dtype=[torch.bfloat16, torch.float64]),
    *wrong("E", ValueError, vocab_start=[4, -1]),
    *wrong("E", TypeError, process_group=["tensor parallel"]),
    *wrong("ES", ValueError, return_stats=[True], beside=dict(backend="reference")),
    *wrong("FS", TypeError, rows=[zeros(3)]),
    *wrong("FS", ValueError, rows=[ROWS.to("meta")]),
    *wrong("FS", TypeError, head=[None, torch.nn.Linear(12, 6)]),
    *wrong("FS", ValueError, "head .* size", head=[head(11), head(12, 5)]),
    *wrong("FS", ValueError, "head .*_scale", head=[head(time_scale=1.0), head(hidden_scale=1)]),
    *wrong("FS", TypeError, config=[{}]),
    *wrong("FS", ValueError, "time_sampling", config=[replace(CASE.config, time_sampling="sequence")]),
    *wrong("FS", TypeError, targets=[None, zeros(A, D, dtype=torch.int64)]),
    *wrong("FS", ValueError, targets=[zeros(A * D), zeros(A + 1, D), META.expand(A, D)]),
    *wrong("FS", ValueError, "target size 6", targets=[zeros(A, 7)]),  # another width than the head's
    *wrong("F", ValueError, "targets contain NaN", targets=[spoilt(math.nan)]),
    *wrong("FS", ValueError, "targets .* infinite", targets=[spoilt(math.inf)], beside=dict(backend="torch")),
    *wrong("FS", TypeError, seed=[1.0, "0", True, zeros(2, dtype=torch.int64), zeros(1, dtype=torch.int32)]),
    *wrong("FS", ValueError, times=[zeros(1)]),  # the default preset leaves their index to the seed
    *wrong("FS", ValueError, "times (must|are)", times=[zeros(0), zeros(1, 1), torch.tensor(0.5), META]),
    *wrong("FS", TypeError, times=[[0.5], zeros(3, dtype=torch.int64)]),
    *wrong("S", TypeError, flow_weight=["1"]),
    *wrong("S", ValueError, flow_weight=[math.nan, math.inf, torch.ones(2)]),
]


@BACKENDS
@pytest.mark.parametrize("functions, error, says, arguments", WRONG)
def test_errors_name_the_argument(functions, error, says, arguments, backend):
    decoder = dict(weight=CASE.weight.float(), bias=CASE.bias.float())
    flow = dict(head=deepcopy(CASE.head).float(), rows=ROWS, targets=TARGETS, seed=0, config=CASE.config)
    calls = {
        "E": (linear_cross_entropy, decoder | dict(labels=CASE.labels)),
        "F": (flow_matching_loss, flow),
        "S": (sfr_loss, decoder | flow),
    }
    for name in functions:
        function, fitting = calls[name]
        fitting = fitting | dict(hidden=CASE.hidden.float(), backend=backend)
        function(**fitting)
        with pytest.raises(error, match=says):
            function(**fitting | arguments)


@pytest.mark.parametrize("name", ["flow: mse, default", "sfr: mse, default", "sfr: cosine, default", "sfr: mtp"])
def test_losses_at_time_zero_take_no_times(name):
    """The head would be told of a time at which there is no x_t."""
    case = LOSSES[name].case()
    with pytest.raises(ValueError, match="times must be None"):
        LOSSES[name].ours(case, times=torch.tensor([0.5]))(case.inputs())


def test_kinds_of_loss_that_do_not_fit_the_call():
    joint = LOSSES["sfr: mtp"]
    case = joint.case()
    with pytest.raises(ValueError, match="mtp"):  # which needs the decoder
        flow_matching_loss(case.hidden, case.head, case.rows, case.targets, seed=0, config=case.config)
    with pytest.raises(TypeError, match="targets must be"):  # embeddings, where labels are decoded
        joint.ours(replace(case, targets=zeros(len(case.rows), 12)))(case.inputs())
    with pytest.raises(ValueError, match="targets are on meta"):
        joint.ours(replace(case, targets=case.targets.to("meta")))(case.inputs())
    with pytest.raises(ValueError, match="output size 36"):  # the head's output must be hidden states
        y = case.inputs()
        y.head = make_head(12, 6, replace(case.config, loss="flow"))
        joint.ours(case)(y)


# ---------------------------------------------------------------------------------------------------------------------
# One argument of another kind: a tensor that wants a gradient, or one of codes

HEAD = "the head"
ENTROPY, PRESETS = ("cross-entropy", "row losses"), ("flow: flow, default", "flow: flow, official")
ARGUMENTS = {  # what it is given, and the losses that take it
    "normalizer": (torch.tensor(3.0), ("cross-entropy", *PRESETS, "flow: cka, default")),
    "row_weight": (torch.ones(4, 13), ENTROPY),
    "class_weight": (torch.ones(17), ENTROPY),
    "flow_weight": (torch.tensor(0.5), ("sfr: flow, default", "sfr: cosine, default", "sfr: mtp")),
    "targets": (None, ("flow: flow, default", "flow: cosine, default", "flow: cka, default", "sfr: mse, default")),
    "rows.weight": (None, ("flow: flow, default", "flow: cosine, default", "sfr: cka, default", "sfr: mtp")),
    "times": (torch.tensor([0.1, 0.2, 0.3, 0.4]), ("flow: flow, official", "sfr: flow, official")),
    "x_t": (torch.ones(13, 6), (HEAD,)),
    "t": (torch.ones(13), (HEAD,)),
}
# which may get a gradient, but hold no codes
INPUTS = {
    "hidden": (None, ("cross-entropy", "flow: flow, default", HEAD)),
    "weight": (None, ("cross-entropy", "sfr: flow, default")),
    "bias": (None, ("cross-entropy", "sfr: flow, default")),
    "labels": (None, ("cross-entropy",)),
    "head.output_proj.weight": (None, ("flow: flow, default", "sfr: cosine, default", "sfr: mtp", HEAD)),
}


def function_of(argument: str, name: str, dtype: torch.dtype):
    """The value that an argument has in a loss, and the loss as a function of it."""
    case = LOSSES.get(name, LOSSES["flow: flow, default"]).case()
    x = case.inputs(dtype)
    held = dict(targets=case.targets, labels=case.labels.clamp(min=0), **{"rows.weight": case.rows.weight}, **vars(x))
    held["head.output_proj.weight"] = x.head.output_proj.weight if x.head else None

    def run(value):
        changed, options, y = case, {}, SimpleNamespace(**vars(x))
        if argument == "head.output_proj.weight":
            y.head = deepcopy(x.head)
            y.head.output_proj.weight = torch.nn.Parameter(value.detach(), requires_grad=False)
        elif argument in vars(y):
            setattr(y, argument, value)
        elif argument in ("targets", "labels"):
            changed = replace(case, **{argument: value})
        elif argument == "rows.weight":
            changed = replace(case, rows=case.rows.replace(weight=value))
        else:
            options = {argument: value}
        if name == HEAD:
            fixed = dict(x_t=torch.ones(13, 6, dtype=dtype), t=0.5, hidden=y.hidden[0])
            return y.head(**fixed | options).square().sum()
        return LOSSES[name].ours(changed, **options)(y)

    value = (ARGUMENTS | INPUTS)[argument][0]
    return held[argument].detach() if value is None else value, run


def each(table: dict):
    return pytest.mark.parametrize("argument, name", [(a, name) for a, (_, names) in table.items() for name in names])


@BACKENDS
@each(ARGUMENTS)
def test_a_constant_must_not_ask_for_a_gradient(monkeypatch, argument, name, backend):
    """One that is silently missing trains another model."""
    monkeypatch.setenv("SFR_KERNELS_BACKEND", backend)
    value, run = function_of(argument, name, torch.float64)
    leaf = value.clone().requires_grad_()
    for call in (lambda: run(leaf), lambda: torch.func.jvp(run, (value,), (torch.ones_like(value),))):
        with pytest.raises(ValueError, match=rf"^{argument} must not require a gradient"):
            call()
    with torch.no_grad():  # an evaluation
        assert torch.equal(run(leaf), run(value))
    assert run(leaf.detach()).requires_grad


@pytest.mark.parametrize("autocast", [False, True])
@each(ARGUMENTS | INPUTS)
def test_codes_of_a_quantized_tensor_are_no_numbers(argument, name, autocast):
    """Autocast would cast them, and the loss would be that of the codes."""
    may_be_integers = argument in ("row_weight", "labels", "normalizer", "flow_weight")
    value, run = function_of(argument, name, torch.float32)
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64)[2 * may_be_integers :]:
        error = pytest.raises(TypeError, match=f"^{argument} must be")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), error:
            run(value.to(dtype))

"""Adapters of the decoder: what their values and gradients do not show in the tests of every loss."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import IGNORE, LOSSES, assert_same, decoder_case, evaluate, lora_of, with_adapters

from sfr_kernels import LoRA, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")
P = 0.4


def adapted() -> tuple:
    """A case, and its leaves with another weight for each adapter."""
    case = with_adapters(decoder_case())
    return case, case.inputs()


def dropped(x: SimpleNamespace) -> list[LoRA]:
    return [a._replace(dropout=P) for a in lora_of(x)]


def of_torch(x: SimpleNamespace, labels: torch.Tensor, hidden: torch.Tensor, mask_of) -> torch.Tensor:
    """Cross-entropy of the logits of layers of torch, in which mask_of(h) drops entries."""
    logits = hidden @ x.weight.T + x.bias
    for a in lora_of(x):
        logits = logits + a.scale * F.linear(F.linear(mask_of(hidden), a.down), a.up)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("way", ["torch", "autocast", "compiled", "reference"])
def test_dropout_draws_as_that_of_a_layer_of_torch_on_the_same_hidden_states(way):
    """So a model trains with the same draws as with PEFT; the reference drops of the supervised rows alone."""
    case, x = adapted()
    used = case.labels != IGNORE
    torch._dynamo.reset()
    function = linear_cross_entropy
    if way == "compiled":
        function = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    backend = dict(backend="reference") if way == "reference" else {}

    def ours(x):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):  # which leaves float64 alone
            return function(x.hidden, x.weight, case.labels, bias=x.bias, lora=dropped(x), **backend)

    def wanted(x):
        torch.manual_seed(1)
        hidden, labels = (x.hidden[used], case.labels[used]) if backend else (x.hidden, case.labels)
        return of_torch(x, labels, hidden, lambda h: F.dropout(h, P))

    found = evaluate(ours, x)
    assert_same(found, evaluate(wanted, x))
    assert found["value"] != evaluate(lambda x: of_torch(x, case.labels, x.hidden, lambda h: h), x)["value"]


def test_nothing_is_dropped_where_all_may_be():
    """A probability of one leaves the layer alone."""
    case, x = adapted()
    lora = [a._replace(dropout=1.0) for a in lora_of(x)]
    found = linear_cross_entropy(x.hidden, x.weight, case.labels, bias=x.bias, lora=lora)
    assert torch.equal(found, linear_cross_entropy(x.hidden, x.weight, case.labels, bias=x.bias))


@pytest.mark.parametrize("name", ["cross-entropy", "row losses of rows", "sfr: flow, official", "sfr: mtp"])
def test_no_adapter_changes_no_bit_and_an_adapter_that_is_new_no_value(name):
    """B of a new one is zero. An empty list is none."""
    loss, case = LOSSES[name], LOSSES[name].case()
    x = case.inputs(torch.bfloat16)
    plain = evaluate(loss.ours(case), x)
    empty = evaluate(loss.ours(case, lora=[]), x)
    assert all(torch.equal(plain[leaf], empty[leaf]) for leaf in plain)
    x = case.inputs()
    new = LoRA(torch.ones_like(x.weight[:4]), torch.zeros_like(x.weight[:, :4]).requires_grad_(), 0.5)
    assert_same(evaluate(loss.ours(case, lora=new), x), evaluate(loss.ours(case), x))
    loss.ours(case, lora=new)(x).backward()
    assert new.up.grad.any()


def test_float16_has_room_for_the_gradient_of_b_over_thousands_of_rows():
    # Σ_r dz low is near 4096 · 30, beyond float16's 65504; the mean is near 30
    half = dict(dtype=torch.float16)
    hidden, labels = torch.full((4096, 4), 7.5, **half), torch.zeros(4096, dtype=torch.int64)
    lora = LoRA(torch.ones(1, 4, **half), torch.zeros(8, 1, **half).requires_grad_())
    for chunk_rows in (64, 4096):
        loss = linear_cross_entropy(hidden, torch.zeros(8, 4, **half), labels, lora=lora, chunk_rows=chunk_rows)
        (found,) = torch.autograd.grad(loss, lora.up)
        expected = torch.full((8, 1), 30 / 8, **half)
        expected[0] -= 30
        assert torch.equal(found, expected)

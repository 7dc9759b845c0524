"""In 16 bits an attached model is as exact as the plain one: judged by float64, no gradient's error is more than 1.3
times that of the model's own loss and the reference's flow loss in the same dtypes."""

import contextlib
import copy
from functools import partial

import pytest
import torch
from outcomes import gradients, weights
from peft import get_peft_model
from test_adapters import IN_LM_HEAD, own_loss, plain_gradients, quantised, stirred, tiny_llama, with_head
from tiny import BATCH, adapted

from sfr_kernels.training.objectives import attachment_of

setting = pytest.mark.setting
MOST = 1.3  # times the error that plain torch makes
BF16, FP16 = torch.bfloat16, torch.float16
plainly = contextlib.nullcontext


def autocast(dtype: torch.dtype):
    return partial(torch.autocast, "cpu", dtype)


def wide_lm_head():
    """As transformers keeps one: its input is cast."""
    model = tiny_llama().bfloat16()
    model.lm_head.float().register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    return model


# What of the model has which dtype, the autocast around it, and the dtype it computes in.
CASES = {
    "bf16 autocast": (tiny_llama, autocast(BF16), BF16),
    "fp16 autocast": (tiny_llama, autocast(FP16), FP16),
    "weights in bfloat16": (lambda: tiny_llama().bfloat16(), plainly, BF16),
    "weights in float16": (lambda: tiny_llama().half(), plainly, FP16),
    "lm_head in float32, the rest in bfloat16": (wide_lm_head, plainly, BF16),
    "LoRA in float32 on weights in bfloat16": (lambda: stirred(adapted(tiny_llama().bfloat16())), plainly, BF16),
    "LoRA in float32 on weights in bfloat16, bf16 autocast": (
        lambda: stirred(adapted(tiny_llama().bfloat16())), autocast(BF16), BF16,
    ),
    'modules_to_save=["lm_head"] in float32 on weights in bfloat16': (
        lambda: stirred(get_peft_model(tiny_llama().bfloat16(), IN_LM_HEAD)), plainly, BF16,
    ),
    "QLoRA in bfloat16": (lambda: stirred(adapted(quantised(tiny_llama().bfloat16()))), autocast(BF16), BF16),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=setting("own loop", name)) for name in CASES])
def test_no_gradient_is_less_exact_than_the_plain_models(name):
    make, precision, dtype = CASES[name]
    plain, (model, head) = make().train(), with_head(make().train())
    oracle, oracle_head = copy.deepcopy(plain).double(), copy.deepcopy(head).double()
    exact = own_loss(oracle, oracle_head)
    with precision():
        wanted, found = own_loss(plain, head), model(**BATCH).loss
    for loss in (exact, wanted, found):
        loss.backward()
    # the mean over 94 tokens of errors of at most eps / 2
    assert found.dtype == wanted.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=torch.finfo(dtype).eps / 8)
    assert_no_worse(plain_gradients(model), gradients(plain), gradients(oracle))
    assert_no_worse(gradients(attachment_of(model).head), gradients(head), gradients(oracle_head))


def assert_no_worse(found: dict, plain: dict, exact: dict) -> None:
    assert set(found) == set(plain) == set(exact) and len(exact) > 3
    for name, value in exact.items():
        ours, theirs = ((x[name].double() - value).norm().item() for x in (found, plain))
        assert found[name].dtype == plain[name].dtype
        assert ours <= MOST * theirs, f"{name}: {ours:.2e} from float64, plain torch {theirs:.2e}"
        assert ours < 0.1 * value.norm(), name  # whatever plain torch makes


@setting("own loop", "fp16 autocast and GradScaler, from a scale that overflows")
def test_steps_that_overflow_in_float16_are_none_and_keep_their_noise():
    """The first two gradients overflow, as those of the plain model do; the steps that follow are its own."""
    plain, (model, head) = tiny_llama().train(), with_head(tiny_llama().train())
    before, ends, losses = weights(plain), [], []

    def of_plain(step):
        return own_loss(plain, head, step=step)

    def of_model(step):
        assert model.sfr.step == step  # counted by the model itself
        losses.append(model(**BATCH).loss)
        return losses[-1]

    for loss_of, modules in ((of_plain, [plain, head]), (of_model, [model])):
        optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.3)
        scaler, taken = torch.amp.GradScaler("cpu", init_scale=2.0**20), []
        for _ in range(5):
            optimizer.zero_grad()
            with autocast(FP16)():
                loss = loss_of(sum(taken))
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            taken.append(scaler.get_scale() == scale)
        assert taken == [False, False, True, True, True]
        ends.append(weights(modules[0]))
    assert losses[0] == losses[1] == losses[2] != losses[3] and model.sfr.step == 3
    for name, start in before.items():
        wanted, found = (end[name] - start for end in ends)
        assert (found - wanted).norm() < 0.01 * wanted.norm(), name  # float16 has 11 bits, and there are three steps

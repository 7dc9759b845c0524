"""`fit_head`: the velocity head learns to read the model as it is, before the model is trained through it.

A new head knows nothing, and what its loss asks of the hidden states while it learns is noise: in the experiments
(benchmarks/collapse) SFR had no effect without this.
"""

import contextlib
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ..modules import VelocityHead
from ..ops import SFROutput, flow_matching_loss, sfr_loss
from ..ops.flow_loss import step_seed
from .checkpoint import head_of
from .objectives import Attachment, attachment_of
from .sharding import device_of, fill, gathered, parameters_of

RATE = 1e-3


def is_new(head: VelocityHead) -> bool:
    """Whether the head is as it was made: its last layer is zero. Of a sharded one every process must ask."""
    return not gathered(parameters_of(head.output_proj))["weight"].any()


def fit_head(
    model: nn.Module,  # attached, with a head
    batches: Iterable[dict],  # what its forward takes for the loss; a list or a loader, passed over again and again
    steps: int,  # of AdamW, one batch each
    *,
    rate: float = RATE,
    progress: bool = True,
) -> float:
    """Trains the velocity head alone, on the flow loss of hidden states of the model as it is. Returns the loss of the
    last step.

    Call it between attach and training; SFRCallback does, by `config.head_steps`. The model is in evaluation mode
    meanwhile and computes no gradient, so a step costs its forward pass. Under torch.distributed every process gives
    batches of its own, and the gradients are averaged. ValueError for a model without a head, steps below 1, and
    batches that run out.
    """
    sfr = attachment_of(model)
    if not isinstance(sfr, Attachment) or sfr.head is None:
        raise ValueError("model has no velocity head to fit: attach an SFR objective that has one")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not rate > 0:
        raise ValueError(f"rate must be positive, got {rate}")
    # A copy is trained, since `guard` takes an optimizer of the attached head for that of the training.
    device = device_of(sfr.head)
    twin = _twin(sfr.head, device)
    optimizer = torch.optim.AdamW(twin.parameters(), rate, weight_decay=0.0)
    flow = torch.full((), math.nan, dtype=torch.float32)
    again = _again(batches)
    with _own_random_numbers(device), _evaluating(model):
        for step in tqdm(range(steps), desc="velocity head", disable=not progress):
            batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in next(again).items()}
            seed = step_seed(sfr.config.seed, -2 - step)  # unlike those of training, and of evaluation
            optimizer.zero_grad()
            flow = _differentiate(model, sfr, twin, batch, seed)
            _average(twin)
            optimizer.step()
    fill(sfr.head, twin.state_dict())
    sfr.fitted = steps
    return flow.item()


def _again(batches: Iterable[dict]) -> Iterator[dict]:
    while True:
        any_batch = False
        for batch in batches:
            any_batch = True
            yield batch
        if not any_batch:
            raise ValueError("batches ran out: give a list or a loader that is not empty and can be passed over again")


@torch.no_grad()
def _differentiate(model: nn.Module, sfr: Attachment, head: VelocityHead, batch: dict, seed: int | Tensor) -> Tensor:
    """Gives `head` the gradient of its loss on a batch, and returns L_flow: in a forward of the model that calls its
    loss, where an engine has gathered the lm_head's weight."""
    found: list[Tensor] = []

    @torch.compiler.disable
    def in_place_of_the_loss(hidden: Tensor, weight: Tensor, **given: Any) -> SFROutput:
        with torch.enable_grad():
            loss, flow = _flow_loss(sfr, head, given.pop("flow_hidden", hidden), weight, given, seed)
            loss.backward()
        found.append(flow.detach())
        return SFROutput(*hidden.new_zeros(3))

    sfr.__dict__["forward"] = in_place_of_the_loss  # before the class's own
    try:
        model(**batch)
    finally:
        del sfr.__dict__["forward"]
    return found[0]


def _flow_loss(
    sfr: Attachment, head: VelocityHead, hidden: Tensor, weight: Tensor, given: dict[str, Any], seed: int | Tensor
) -> tuple[Tensor, Tensor]:
    """What is differentiated, and L_flow."""
    rows, targets = given["rows"], given["targets"]
    backend = sfr.options["backend"]
    if sfr.config.loss != "mtp":
        loss = flow_matching_loss(hidden, head, rows, targets, seed=seed, config=sfr.config, backend=backend)
        return loss, loss
    logits = {name: given[name] for name in ("softcap", "logit_scale") if name in given}
    if (bias := given.get("bias")) is not None:
        logits["bias"] = bias.detach()
    logits["lora"] = [a._replace(down=a.down.detach(), up=a.up.detach()) for a in given.get("lora", ())]
    out = sfr_loss(
        hidden, weight.detach(), head, rows, targets, seed=seed, config=sfr.config, flow_weight=1.0, **sfr.options,
        **logits,
    )  # fmt: skip
    return out.loss, out.flow


def _twin(head: VelocityHead, device: torch.device) -> VelocityHead:
    """A copy of the first process's head, whole."""
    with _own_random_numbers(device):  # a new head's
        twin = head_of(asdict(head.shape))
    twin.load_state_dict(gathered(parameters_of(head)), assign=True)
    twin.to(device)
    if dist.is_available() and dist.is_initialized():
        for p in twin.parameters():
            dist.broadcast(p.data, 0)
    return twin


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn inside changes no draw of the training: of torch's own numbers, Python's and NumPy's."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _average(head: VelocityHead) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    for p in head.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()

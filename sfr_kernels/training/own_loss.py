"""Compares a model's own loss with the one `attach` computes, and measures what the model does to its logits.

The fused loss is next-token cross-entropy of softcap · tanh(scale · logits / softcap). No configuration says that a
model's own is the same: some do not shift their labels, some mask classes, and a model may be given another loss
function. So the model's own forward runs once on a few tokens, its lm_head returns a probe (known numbers), and the
loss is compared with the cross-entropy of the probe.
"""

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .guard import check_exchanged
from .lm_head import REPLACED_FORWARD, copy_in_use, covered_linear, weight_shape
from .methods import plain

TOKENS = 6
# The probe's logits of classes 0 to 3 in its last row: the first shows the scale, the last the softcap, the others that
# there is nothing else. All are exact in 16 bits, to which an engine may cast them.
KNOWN = (2.0**-9, 1.0, -3.0, 2.0**15)
ITEMS = 7  # num_items_in_batch: another number than that of the labels


def router_loss(base: nn.Module, aux: Tensor) -> Tensor:
    """The weighted router loss that a mixture of experts adds to its own loss."""
    text = base.config.get_text_config()
    for owner, name in ((base, "router_aux_loss_coef"), (base, "aux_loss_coef"), (text, "router_aux_loss_coef")):
        if hasattr(owner, name):
            return getattr(owner, name) * aux
    raise ValueError(f"{type(base).__name__} returns a router loss, and has no router_aux_loss_coef to weigh it with")


class OwnLoss:
    """A model's own loss, measured at the first forward with a loss: before that, weights may be on another device."""

    def __init__(self, base: nn.Module, run: Callable):
        self.base, self.run = base, run  # run(base, probe, inputs) is `run_probe` of calls
        self.options = self.hooks = None  # softcap and logit_scale; the lm_head's hooks when they were measured

    @torch.compiler.assume_constant_result  # a compiler runs it while it traces
    @torch.no_grad()
    def measure(self, device: torch.device) -> None:
        """ValueError, with the reason, if the model's own loss is another. Repeated when the lm_head's hooks change."""
        if self.options is not None and self.hooks == self._hooks():
            return
        check_exchanged(self.base.sfr)
        probe, labels = _make_probe(weight_shape(covered_linear(self.base))[0])
        outputs, returned, reached = self._forward(probe, labels, device)
        if returned is None:
            self._refuse("does not call its lm_head where it computes a loss: switch off the fused loss it has")
        if not reached:
            raise RuntimeError(REPLACED_FORWARD)
        if not torch.equal(returned.cpu(), probe.to(returned.dtype)):
            self._refuse("has a hook on the lm_head that changes its output: remove it, or attach where there is none")
        options = {"softcap": None, "logit_scale": 1.0}
        if getattr(outputs, "logits", None) is not None:
            options = self._measure_logits(outputs.logits.cpu().double(), probe.double(), _tolerance(outputs.logits))
        rows = _transformed(probe.double(), **options)[0]
        wanted = F.cross_entropy(rows[:-1], labels[0, 1:]).item()
        if not self._loss_is(outputs, wanted):
            own = self._loss_of(outputs)
            reason = f"has a loss of its own that is not next-token cross-entropy: {own}, not {wanted}"
            if self._loss_is(outputs, F.cross_entropy(rows, labels[0]).item()):
                reason = "does not shift its labels, as a masked LM or the decoder of an encoder-decoder does not"
            self._refuse(reason)
        if self._takes_num_items():
            items = torch.tensor(ITEMS, dtype=torch.int64, device=device)
            outputs, *_ = self._forward(probe, labels, device, num_items_in_batch=items)
            wanted *= (labels[0, 1:] >= 0).sum().item() / ITEMS
            if not self._loss_is(outputs, wanted):
                own = self._loss_of(outputs)
                self._refuse(f"is given num_items_in_batch and divides its loss by another number: {own}, not {wanted}")
        self.options, self.hooks = options, self._hooks()

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"attach does not fit {type(self.base).__name__}: it {reason}")

    def _hooks(self) -> list[int]:
        """The keys of the output embeddings' hooks, of the copy in use, which torch makes unique."""
        outer = self.base.get_output_embeddings()
        return [key for module in (outer, *copy_in_use(outer).modules()) for key in module._forward_hooks]

    def _forward(self, probe: Tensor, labels: Tensor, device: torch.device, **inputs):
        """The model's own forward with the probe, on ordinary tokens, in evaluation mode."""
        ids = torch.full_like(labels, _plain_token(self.base.config, probe.shape[-1]))
        modes = [(module, module.training) for module in self.base.modules()]
        for module, _ in modes:
            module.training = False  # no state of a norm or a router moves
        inputs |= {"input_ids": ids.to(device), "labels": labels.to(device)}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                return self.run(self.base, probe.to(device, copy=True), inputs)
            except Exception as error:
                raise RuntimeError(
                    f"{type(self.base).__name__} must run once on {TOKENS} token ids and their labels alone, so that "
                    f"its own loss can be compared with attach's, and failed: {type(error).__name__}: {error}"
                ) from error
            finally:
                for module, training in modes:
                    module.training = training

    def _measure_logits(self, logits: Tensor, probe: Tensor, rel: float) -> dict:
        """softcap and logit_scale, from the last row; the others must agree in every class."""
        if logits.shape != probe.shape:
            self._refuse(f"makes logits of shape {tuple(logits.shape)} of its lm_head's {tuple(probe.shape)}")
        known = logits[0, -1, : len(KNOWN)].tolist()
        scale = known[0] / KNOWN[0]
        softcap = None if math.isclose(known[3], scale * KNOWN[3], rel_tol=rel) else known[3]
        wanted = _transformed(probe, softcap, scale)
        if not torch.isclose(logits[0, -1, :3], wanted[0, -1, :3], rtol=rel, atol=0).all():
            self._refuse(f"transforms its logits in a way the loss does not know: {KNOWN} to {tuple(known)}")
        same = torch.isclose(logits[:, :-1], wanted[:, :-1], rtol=rel, atol=rel * abs(scale)).all(1)[0]
        if other := (~same).nonzero().flatten().tolist():
            first = ", ".join(map(str, other[:5])) + (", …" if len(other) > 5 else "")
            self._refuse(f"changes {len(other)} of {len(same)} classes after the lm_head, as by a mask: {first}")
        return {"softcap": softcap, "logit_scale": scale}

    def _loss_of(self, outputs) -> float:
        """The model's own loss without its router loss."""
        if getattr(outputs, "loss", None) is None:
            self._refuse("returns no loss where it is given labels")
        aux = getattr(outputs, "aux_loss", None)
        return outputs.loss.item() - (0.0 if aux is None else router_loss(self.base, aux).item())

    def _loss_is(self, outputs, wanted: float) -> bool:
        own = self._loss_of(outputs)
        rel = max(_tolerance(x) for x in (outputs.loss, getattr(outputs, "logits", None)) if x is not None)
        return math.isclose(own, wanted, rel_tol=rel)

    def _takes_num_items(self) -> bool:
        """Whether Trainer passes num_items_in_batch to the model, by Trainer's own rule."""
        kinds = inspect.signature(plain(self.base, "forward")).parameters
        named = "num_items_in_batch" in kinds or any(p.kind is p.VAR_KEYWORD for p in kinds.values())
        return named and getattr(type(self.base), "accepts_loss_kwargs", True)


def _make_probe(classes: int) -> tuple[Tensor, Tensor]:
    """The probe (1, T, V), and labels (1, T) for it. Its last row, with the known numbers, is part of no loss: shifted
    labels have none for it, and its own is ignored."""
    generator = torch.Generator().manual_seed(0)
    probe = 3 * torch.randn(1, TOKENS, classes, generator=generator, dtype=torch.float32)
    probe = probe.bfloat16().float()  # exact in 16 bits
    probe[0, -1, : len(KNOWN)] = torch.tensor(KNOWN, dtype=torch.float32)
    labels = torch.randint(classes, (1, TOKENS), generator=generator)
    labels[0, [2, -1]] = -100
    return probe, labels


def _transformed(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    scaled = logit_scale * logits
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def _tolerance(values: Tensor) -> float:
    """The relative error allowed for numbers that were rounded to this dtype."""
    return max(1e-4, 2 * torch.finfo(values.dtype).eps)


def _plain_token(config, classes: int) -> int:
    """The first token id that the configuration does not name: it is no padding, image or other special token."""
    special, parts = set(), [config.to_dict()]
    while parts:
        for name, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif str(name).endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])
    return next((i for i in range(classes) if i not in special), 0)

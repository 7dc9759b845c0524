"""`attach`: a transformers causal LM whose forward returns the SFR loss and makes no logits.

The model's own forward runs unchanged, so whatever it does around the decoder stays. Only its lm_head answers
differently while a loss is wanted: given the hidden states, it runs the fused loss with its own weight and returns that
instead of logits. So the weight is read inside the module's own call, after any engine that shards or offloads it has
gathered it, and the head's inside that of `SFRLoss`. What the model does to its logits afterwards (softcap, scale) is
measured once, by sending known numbers through, and handed to the loss.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn

from ..config import SFRConfig
from ..modules import LinearCrossEntropy, SFRLoss, VelocityHead
from ..ops import SFROutput
from ..targets import OnlineTargets, TargetStore
from .attachment import Attachment, BatchInputs, CrossEntropyAttachment, SFRModelOutput, attachment_of
from .checkpoint import pairing, save_head

_KWARGS_FLAG = "accepts_loss_kwargs"  # read by Trainer: forward takes num_items_in_batch
_EXTRA_INPUTS = ("rows", "targets", "times", "seed", "sample_id")


@dataclass
class _Call:
    """One loss, on its way through the model's forward to the lm_head; or a probe of the logits' transform."""

    sfr: Attachment | CrossEntropyAttachment
    inputs: dict | None = None
    probe: Tensor | None = None
    out: SFROutput | None = None
    returned: Tensor | None = None


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach(
    model: nn.Module,
    head_or_config: VelocityHead | SFRConfig | SFRLoss | LinearCrossEntropy | None = None,
    targets: TargetStore | OnlineTargets | None = None,
    *,
    objective: str = "sfr",
    target_size: int | None = None,
) -> nn.Module:
    """Makes `model(input_ids=…, labels=…, rows=…, targets=…)` return the SFR loss; returns the same model.

    model           a transformers causal LM, or a PEFT model around one (wrap with PEFT first, then attach).
    head_or_config  the objective: an SFRConfig (a new head is made), a VelocityHead (with the default config of its
                    sizes), or an SFRLoss, which is both. With objective "ce", nothing, or a LinearCrossEntropy for its
                    options.
    targets         the store of the data set: says how wide the head must be, and lets a batch that has `sample_id`
                    but no rows and targets look them up. Or OnlineTargets, which embed the texts of a batch.
    objective       "sfr", or "ce": cross-entropy alone, fused, for people who want only that.
    target_size     d, where there is no store.

    Without labels the model is what it was. `rows` default to those of `labels`; `seed` to one per optimizer step under
    `SFRCallback`, else per forward; `num_items_in_batch`, which Trainer passes, is the normalizer.
    `save_pretrained` writes the plain model, and the head beside it. TypeError or ValueError, with the model unchanged,
    if something does not fit.
    """
    base = base_of(model)
    if attachment_of(base) is not None:
        raise ValueError("model already has an SFR objective: detach it first")
    linear = output_linear(base)
    if objective not in ("sfr", "ce"):
        raise ValueError(f"objective must be sfr or ce, got {objective!r}")
    if objective == "ce":
        sfr = _cross_entropy(head_or_config, targets)
    else:
        sfr = Attachment(_objective(head_or_config, linear, targets, target_size), targets)
    _fit(sfr, linear, targets)

    base.sfr = sfr.train(base.training)
    ignored = base._keys_to_ignore_on_save
    base.sfr.restore = {"_keys_to_ignore_on_save": ignored, _KWARGS_FLAG: base.__dict__.get(_KWARGS_FLAG)}
    base._keys_to_ignore_on_save = {*(ignored or ()), *(f"sfr.{name}" for name in base.sfr.state_dict())}
    base.accepts_loss_kwargs = True

    # An engine that offloads weights has put its own forward over the module's; ours goes under it.
    slot = "_old_forward" if hasattr(linear, "_hf_hook") else "forward"
    linear._sfr_plain = slot, getattr(linear, slot)
    setattr(linear, slot, MethodType(_linear_forward, linear))
    base._sfr_plain_forward = base.forward
    base.forward = MethodType(_forward_like(base.forward), base)
    model._sfr_plain_save = model.save_pretrained
    model.save_pretrained = MethodType(_save_pretrained, model)
    return model


def detach(model: nn.Module) -> VelocityHead | None:
    """Undoes `attach`: the model is the plain one again. Returns the velocity head, None where there was none."""
    base = base_of(model)
    sfr = getattr(base, "sfr", None)
    if not isinstance(sfr, Attachment | CrossEntropyAttachment):
        raise ValueError("model has no SFR objective to detach")
    linear = _patched_linear(base)
    slot, plain = linear.__dict__.pop("_sfr_plain")
    _restore(linear, slot, plain)
    _restore(base, "forward", base.__dict__.pop("_sfr_plain_forward"))
    if "_sfr_plain_save" in model.__dict__:
        _restore(model, "save_pretrained", model.__dict__.pop("_sfr_plain_save"))
    base._keys_to_ignore_on_save = sfr.restore["_keys_to_ignore_on_save"]
    del base.accepts_loss_kwargs
    if (flag := sfr.restore[_KWARGS_FLAG]) is not None:
        base.accepts_loss_kwargs = flag
    del base.sfr
    return sfr.head


def _restore(module: nn.Module, name: str, value) -> None:
    """Puts an overridden method back; one that was the class's own is simply uncovered."""
    if getattr(value, "__func__", None) is getattr(type(module), name, None):
        module.__dict__.pop(name, None)
    else:
        setattr(module, name, value)


def output_linear(base: nn.Module) -> nn.Linear:
    """The linear layer behind the model's logits. TypeError if they come from anything else."""
    if not hasattr(base, "get_output_embeddings"):
        raise TypeError(f"model must be a transformers causal LM, got {type(base).__name__}")
    out = base.get_output_embeddings()
    if hasattr(out, "modules_to_save") and hasattr(out, "active_adapters"):
        out = out.modules_to_save[out.active_adapters[0]]  # PEFT's trainable copy of the layer
    if hasattr(out, "base_layer"):
        raise TypeError(
            "model's lm_head carries an adapter, whose share of the logits a fused loss would drop: leave it out of "
            "target_modules, or train it whole with modules_to_save"
        )
    if not isinstance(out, nn.Linear):
        raise TypeError(f"model's output embeddings must be an nn.Linear, got {type(out).__name__}")
    return out


def _objective(
    given, linear: nn.Linear, targets: TargetStore | OnlineTargets | None, target_size: int | None
) -> SFRLoss:
    if isinstance(given, SFRLoss):
        return given
    if isinstance(given, VelocityHead):
        s = given.shape
        sizes = dict(width=s.width, num_layers=s.num_blocks + 2, time_scale=s.time_scale, hidden_scale=s.hidden_scale)
        return SFRLoss(SFRConfig(**sizes), given)
    if not isinstance(given, SFRConfig):
        raise TypeError(f"head_or_config must be a VelocityHead, SFRConfig or SFRLoss, got {type(given).__name__}")
    if given.loss == "cka":
        return SFRLoss(given, None)
    if given.loss == "mtp":
        target_size = linear.in_features
    elif targets is not None:
        target_size = targets.target_size
    elif target_size is None:
        raise ValueError("target_size must be given where there are no targets: the head has to know it")
    return SFRLoss(given, VelocityHead.from_config(given, linear.in_features, target_size))


def _cross_entropy(given, targets) -> CrossEntropyAttachment:
    if targets is not None:
        raise ValueError("targets have no meaning with objective='ce'")
    if not isinstance(given, LinearCrossEntropy | None):
        raise TypeError(
            f"head_or_config must be None or a LinearCrossEntropy with objective='ce', got {type(given).__name__}"
        )
    return CrossEntropyAttachment(LinearCrossEntropy() if given is None else given)


def _fit(sfr: Attachment | CrossEntropyAttachment, linear: nn.Linear, targets) -> None:
    """Errors for a head that does not fit the model or the targets; moves it to the model."""
    if targets is not None and sfr.config.loss != "mtp":
        targets.check(sfr.config)
    if sfr.head is None:
        return
    shape = sfr.head.shape
    if shape.hidden_size != linear.in_features:
        raise ValueError(f"head is for hidden size {shape.hidden_size}, the model's is {linear.in_features}")
    if targets is not None and sfr.config.loss != "mtp" and shape.target_size != targets.target_size:
        raise ValueError(f"head is for target size {shape.target_size}, targets have {targets.target_size}")
    if linear.weight.device.type != "meta":
        sfr.head.to(linear.weight.device)


def _patched_linear(base: nn.Module) -> nn.Linear:
    for module in base.get_output_embeddings().modules():
        if "_sfr_plain" in module.__dict__:
            return module
    raise RuntimeError("the model's lm_head was replaced after attach: resize or wrap it first, then attach")


def _linear_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    """The lm_head: logits as ever, or the loss, shaped like one logit, while a call waits for it."""
    call: _Call | None = self.__dict__.get("_sfr_call")
    if call is None:
        return self._sfr_plain[1](hidden)
    if call.probe is not None:
        return call.probe
    call.out = call.sfr(hidden, self.weight, bias=self.bias, **call.inputs)
    return call.out.loss.reshape(1, 1, 1)


@contextlib.contextmanager
def _waiting(base: nn.Module, call: _Call) -> Iterator[None]:
    """Routes the next lm_head call to `call`, and catches what it returns after every other hook."""
    linear = _patched_linear(base)
    linear._sfr_call = call
    hook = base.get_output_embeddings().register_forward_hook(lambda m, i, out: setattr(call, "returned", out))
    try:
        yield
    finally:
        hook.remove()
        del linear._sfr_call


def _forward_like(plain):
    """The attached forward, with the signature of the model's own and the inputs of the loss added."""

    def forward(self, *args, labels=None, rows=None, targets=None, times=None, seed=None, sample_id=None,
                num_items_in_batch=None, **kwargs):  # fmt: skip
        if labels is None and rows is None:
            return self._sfr_plain_forward(*args, **kwargs)
        sfr, given = self.sfr, (labels, rows, targets, times, seed, sample_id, num_items_in_batch)
        inputs = sfr.inputs(BatchInputs(*given, kwargs))
        if sfr.logit_options is None:
            device = (labels if rows is None else rows).device
            sfr.logit_options = _measure_logits(self, sfr, device)
        inputs |= sfr.logit_options
        call = _Call(sfr, inputs)
        with _waiting(self, call):
            outputs = self._sfr_plain_forward(*args, **{"use_cache": False, **kwargs, "return_dict": True})
        loss, aux = call.returned.reshape(()), getattr(outputs, "aux_loss", None)
        if aux is not None:  # the router loss of a mixture of experts, which such models add themselves
            loss = loss + self.router_aux_loss_coef * aux.to(loss.device)
        if sfr.training:
            sfr.record(call.out)
        return SFRModelOutput(loss=loss, ce_loss=call.out.ce, flow_loss=call.out.flow, aux_loss=aux)

    signature = inspect.signature(plain)
    names = [p for p in signature.parameters.values() if p.name not in _EXTRA_INPUTS]
    extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in _EXTRA_INPUTS]
    tail = [p for p in names if p.kind is inspect.Parameter.VAR_KEYWORD]
    self_ = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[self_, *(p for p in names if p not in tail), *extra, *tail])
    return forward


@torch.no_grad()
def _measure_logits(base: nn.Module, sfr: Attachment | CrossEntropyAttachment, device: torch.device) -> dict:
    """softcap and scale of the model's logits, found by passing known numbers off as logits of one token."""
    values = torch.tensor([2.0**-9, 1.0, -3.0, 1e6], device=device)
    call = _Call(sfr, probe=values.reshape(1, 1, -1))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _waiting(base, call):
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        found = base._sfr_plain_forward(input_ids=token, use_cache=False, return_dict=True).logits.flatten().tolist()
    scale = found[0] * 2**9
    softcap = None if math.isclose(found[3], scale * 1e6, rel_tol=1e-4) else found[3]
    wanted = [scale * x if softcap is None else softcap * math.tanh(scale * x / softcap) for x in (1.0, -3.0)]
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(wanted, found[1:3], strict=True)):
        raise ValueError(f"{type(base).__name__} transforms its logits in a way the loss does not know: {found}")
    return {"softcap": softcap, "logit_scale": scale}


def _save_pretrained(self: nn.Module, save_directory, *args, **kwargs):
    """The model's own save_pretrained, which leaves the head out, and the head beside it."""
    result = self._sfr_plain_save(save_directory, *args, **kwargs)
    sfr = attachment_of(self)  # None if the model inside a PEFT model was detached
    if isinstance(sfr, Attachment) and kwargs.get("is_main_process", True):
        save_head(save_directory, sfr, pairing(self))
    return result

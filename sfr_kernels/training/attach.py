"""`attach`: a transformers causal LM whose forward returns the SFR loss and makes no logits.

The model's own forward runs unchanged, so whatever it does around the decoder stays. Only its lm_head answers
differently while a loss is wanted: given the hidden states, it runs the fused loss with its own weight and returns that
instead of logits. So the weight is read inside the module's own call, after any engine that shards or offloads it has
gathered it, and the head's inside that of `SFRLoss`. What the model does to its logits afterwards (softcap, scale) is
measured once, by sending known numbers through, and handed to the loss.
"""

import contextlib
import inspect
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import SFRConfig
from ..modules import LinearCrossEntropy, SFRLoss, VelocityHead
from ..ops import SFROutput
from ..targets import OnlineTargets, TargetStore
from .checkpoint import pairing, save_head
from .guard import NEVER_CALLED, Watch, check_head, forget, watch_of
from .lm_head import OTHER_LM_HEAD, covered_linear, output_linear
from .methods import cover, is_covered, owner, plain, uncover
from .objectives import (
    Attachment,
    BatchInputs,
    CrossEntropyAttachment,
    SFRModelOutput,
    attachment_of,
    keep_from_predictions,
    placed,
)
from .own_loss import OwnLoss, router_loss

Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class _Call:
    """One loss, on its way through the model's forward to the lm_head; or a probe of the logits' transform."""

    sfr: Attachment | CrossEntropyAttachment
    linear: nn.Linear
    outer: nn.Module  # the linear layer, or what wraps it
    inputs: dict[str, Any] = field(default_factory=dict)
    probe: Tensor | None = None
    out: SFROutput | None = None
    answered: bool = False
    returned: Tensor | None = None  # by outer, after every hook

    @classmethod
    def of(cls, base: Any, **given: Any) -> "_Call":
        return cls(base.sfr, covered_linear(base), base.get_output_embeddings(), **given)


# The calls in progress. They are kept off the modules: a compiler takes the sizes of what hangs on a module for fixed.
_calls: list[_Call] = []


def base_of(model: Any) -> Any:  # of any class: its attributes are transformers' and ours
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach(
    model: Model,
    head_or_config: VelocityHead | SFRConfig | SFRLoss | LinearCrossEntropy | None = None,
    targets: TargetStore | OnlineTargets | None = None,
    *,
    objective: Literal["sfr", "ce"] = "sfr",
    target_size: int | None = None,
) -> Model:
    """Makes `model(input_ids=…, labels=…, rows=…, targets=…)` return the SFR loss; returns the same model.

    model           a transformers causal LM, or a PEFT model around one (wrap with PEFT first, then attach).
    head_or_config  the objective: an SFRConfig (a new head is made), a VelocityHead (with the default config of its
                    sizes), or an SFRLoss, which is both. With objective "ce", nothing, or a LinearCrossEntropy for its
                    options.
    targets         the store of the data set: says how wide the head must be, and lets a batch that has `sample_id`
                    but no rows and targets look them up. Or OnlineTargets, which embed the texts of a batch.
    objective       "sfr", or "ce": cross-entropy alone, fused, for people who want only that.
    target_size     d, where there is no store.

    Without labels and rows the model is what it was. `rows` default to those of `labels`; `seed` to that of the step,
    `model.sfr.step`, which is counted by the steps of the optimizer and is part of the state_dict;
    `num_items_in_batch`, which Trainer passes, is the normalizer. An optimizer's first step is an error where the loss
    was not computed or the head cannot learn. In evaluation λ is the configuration's, whatever its schedule.
    `save_pretrained` writes the plain model, and the head beside it. A copy (deepcopy, pickle, torch.save) is attached
    too. Compiled, the model is one graph for all steps, where a batch brings rows and targets. TypeError or ValueError,
    with the model unchanged, if something does not fit; at the first loss, if the model's own loss is another.
    """
    base = base_of(model)
    if attachment_of(base) is not None:
        raise ValueError("model already has an SFR objective: detach it first")
    linear = output_linear(base)
    if not isinstance(targets, TargetStore | OnlineTargets | None):
        raise TypeError(
            f"targets must be a TargetStore or OnlineTargets, got {type(targets).__name__}: TargetStore.open(folder) "
            "opens what build_targets has made"
        )
    if objective not in ("sfr", "ce"):
        raise ValueError(f"objective must be sfr or ce, got {objective!r}")
    sfr: Attachment | CrossEntropyAttachment
    if objective == "ce":
        sfr = _cross_entropy(head_or_config, targets)
    else:
        sfr = Attachment(_objective(head_or_config, linear, targets, target_size), targets)
    _fit(sfr, linear, targets)

    base.sfr = sfr.train(base.training)
    base._sfr_watch = Watch(base)
    keep_from_predictions(type(base.config))
    ignored = base._keys_to_ignore_on_save
    flag = base.__dict__.get("accepts_loss_kwargs")  # read by Trainer: forward takes num_items_in_batch
    base.sfr.restore = {"_keys_to_ignore_on_save": ignored, "accepts_loss_kwargs": flag}
    base._keys_to_ignore_on_save = {*(ignored or ()), *(f"sfr.{name}" for name in base.sfr.state_dict())}
    base.accepts_loss_kwargs = True

    # An engine that offloads weights has put its own forward over the module's; ours goes under it.
    cover(linear, "forward", _linear_forward, "_old_forward" if hasattr(linear, "_hf_hook") else None)
    base.get_output_embeddings().register_forward_hook(_catch)
    cover(base, "forward", _forward)
    if hasattr(base, "generate"):
        cover(base, "generate", _generate)
    base.register_state_dict_post_hook(_without_head)
    base._sfr_own_loss = OwnLoss(base, _answer)
    cover(model, "save_pretrained", _save_pretrained)
    return model


def detach(model: nn.Module) -> VelocityHead | None:
    """Undoes `attach`: the model is the plain one again. Returns the velocity head, None where there was none."""
    base = base_of(model)
    sfr = getattr(base, "sfr", None)
    if not isinstance(sfr, Attachment | CrossEntropyAttachment):
        raise ValueError("model has no SFR objective to detach")
    covered = [module for module in {base, model} if is_covered(module)]
    if any(owner(module) is not module for module in covered):
        raise ValueError("model is a shallow copy, which shares its modules with the attached one: detach that one")
    for module in base.get_output_embeddings().modules():  # another one, if the embeddings were resized
        if is_covered(module):
            uncover(module)
    for hooks in (base.get_output_embeddings()._forward_hooks, base._state_dict_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_catch, _without_head)]:
            del hooks[key]
    for module in covered:
        uncover(module)
    base._keys_to_ignore_on_save = sfr.restore["_keys_to_ignore_on_save"]
    del base.accepts_loss_kwargs
    if (flag := sfr.restore["accepts_loss_kwargs"]) is not None:
        base.accepts_loss_kwargs = flag
    forget(base._sfr_watch)
    del base.sfr, base._sfr_own_loss, base._sfr_watch
    return sfr.head


def _objective(
    given, linear: nn.Linear, targets: TargetStore | OnlineTargets | None, target_size: int | None
) -> SFRLoss:
    if isinstance(given, SFRLoss):
        return given
    if isinstance(given, VelocityHead):
        s = given.shape
        sizes: dict[str, Any] = dict(
            width=s.width, num_layers=s.num_blocks + 2, time_scale=s.time_scale, hidden_scale=s.hidden_scale
        )
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
    if sfr.config is None or sfr.config.loss == "mtp":  # whose head predicts tokens
        targets = None
    if targets is not None:
        targets.check(sfr.config)
    shape = None if sfr.head is None else sfr.head.shape
    if shape and shape.hidden_size != linear.in_features:
        raise ValueError(f"head is for hidden size {shape.hidden_size}, the model's is {linear.in_features}")
    if shape and targets is not None and shape.target_size != targets.target_size:
        raise ValueError(f"head is for target size {shape.target_size}, targets have {targets.target_size}")
    if shape and isinstance(linear.weight, DTensor):
        raise ValueError(
            "model is sharded already (its lm_head's weight is a DTensor), and a head that is not would have the "
            "gradients of its own process alone: attach first, then fully_shard"
        )
    if linear.weight.device.type != "meta":
        sfr.to(linear.weight.device)


def _linear_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    """The lm_head: logits as ever, or the loss, shaped like one logit, while a call waits for it."""
    for call in _calls:
        if call.linear is self:
            break
    else:
        return plain(self, "forward")(hidden)
    call.answered = True
    if call.probe is not None:
        return call.probe
    call.out = call.sfr(hidden, self.weight, bias=self.bias, **call.inputs)
    return call.out.loss.reshape(1, 1, 1)


def _catch(module: nn.Module, args: tuple, output: Tensor) -> None:
    """The last hook of the output embeddings: keeps what a call gets from them."""
    for call in _calls:
        if call.outer is module:
            # a copy of a probe: some models write over their logits
            call.returned = output if call.probe is None else output.clone()


def _run(base: nn.Module, call: _Call, args: tuple, options: dict):
    """The model's own forward, in which the lm_head answers to `call`."""
    if list(call.outer._forward_hooks.values())[-1:] != [_catch]:
        _hook_last(call.outer)
    if any(other.linear is call.linear for other in _calls):
        raise RuntimeError("an attached model computes one loss at a time: it is in use, perhaps by another thread")
    _calls.append(call)
    try:
        return plain(base, "forward")(*args, **{"use_cache": False, **options, "return_dict": True})
    finally:
        _calls.remove(call)


@torch.compiler.disable
def _hook_last(module: nn.Module) -> None:
    """An engine that came after attach has hooks too, and its gradients need what they return."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is _catch]:
        del module._forward_hooks[key]
    module.register_forward_hook(_catch)


@torch.compiler.disable
def _find_inputs(sfr: Attachment, batch: BatchInputs) -> dict:
    """Rows from labels and targets from a store or an encoder: work of Python, and of the CPU."""
    return sfr.inputs(batch)


def _forward(
    self,
    *args,
    labels=None,
    rows=None,
    targets=None,
    times=None,
    seed=None,
    sample_id=None,
    label_smoothing=None,  # SFRCallback gives a Trainer's
    **kwargs,
):
    """The attached forward."""
    if len(args) > 1:  # labels may be among them
        kwargs |= zip(inspect.signature(plain(self, "forward")).parameters, args, strict=False)
        args, labels = (), kwargs.pop("labels", labels)
    normalizer = kwargs.pop("num_items_in_batch", None)
    if kwargs.get("fused_lm_head"):
        raise RuntimeError(NEVER_CALLED)
    if labels is None and rows is None:
        return plain(self, "forward")(*args, **kwargs)
    given = (labels, rows, targets, times, seed, sample_id, normalizer, label_smoothing)
    sfr, batch = self.sfr, BatchInputs(*given, kwargs)
    if torch.is_grad_enabled():
        if sfr.training:
            check_head(sfr)
        self._sfr_watch.forward(sfr.training)
    looked_up = isinstance(sfr, Attachment) and (rows is None or isinstance(sfr.store, OnlineTargets))
    inputs = _find_inputs(sfr, batch) if looked_up else sfr.inputs(batch)
    self._sfr_own_loss.measure((labels if rows is None else rows).device)
    call = _Call.of(self, inputs=inputs | self._sfr_own_loss.options)
    own = {name: value for name, value in kwargs.items() if name not in ("shift_labels", "ignore_index")}
    outputs = _run(self, call, args, own)
    if not call.answered:
        raise RuntimeError(OTHER_LM_HEAD)
    loss, aux = call.returned.reshape(()), getattr(outputs, "aux_loss", None)
    if aux is not None:  # the router loss of a mixture of experts, which such models add themselves
        loss = loss + router_loss(self, aux.to(loss.device))
    stats = call.out.stats
    found = SFRModelOutput(
        loss=loss,
        predictions=None if sfr.training or stats is None else placed(stats.predicted, inputs),
        ce_loss=call.out.ce,
        flow_loss=call.out.flow,
        stats=stats if sfr.return_stats else None,
        **{name: outputs.get(name) for name in _OUTPUTS},
    )
    wanted = kwargs.get("return_dict")
    return found if (self.config.return_dict if wanted is None else wanted) else found.to_tuple()


_OUTPUTS = ("aux_loss", "router_logits", "past_key_values", "hidden_states", "attentions")


def _generate(self, *args, rows=None, targets=None, times=None, seed=None, sample_id=None, **kwargs):
    """The model's own generate, also of a whole batch as the collator makes it."""
    return plain(self, "generate")(*args, **kwargs)


def _without_head(module: Any, state: dict, prefix: str, _) -> None:
    """Accelerator.save_model writes a model's state as it is, and is to write that of the plain model: the names to
    leave out, of which save_pretrained asks, are not asked for. So with PEFT's, which looks for names of its own (every
    bias, say). Accelerator.save_state, and all else, get the head too."""
    frame = None if module._sfr_watch.saving else sys._getframe()
    while frame is not None and frame.f_code is not Accelerator.save_model.__code__:
        frame = frame.f_back
    if frame is not None or module._sfr_watch.saving:
        for name in [name for name in state if name.startswith(f"{prefix}sfr.")]:
            del state[name]


def _answer(base: nn.Module, probe: Tensor, inputs: dict):
    """The outputs of the model's own forward, whose lm_head answers with `probe`; what its hooks made of that, None if
    it was not called; and whether it was the one that is attached."""
    call = _Call.of(base, probe=probe)
    outputs = _run(base, call, (), inputs)
    return outputs, call.returned, call.answered


def _save_pretrained(self: nn.Module, save_directory, *args, **kwargs):
    """The model's own save_pretrained, which leaves the head out, and the head beside it."""
    sfr = attachment_of(self)  # None if the model inside a PEFT model was detached
    saving = contextlib.nullcontext() if sfr is None else watch_of(self).save()
    with saving:
        result = plain(self, "save_pretrained")(save_directory, *args, **kwargs)
    if isinstance(sfr, Attachment) and kwargs.get("is_main_process", True):
        save_head(save_directory, sfr, pairing(self))
    return result

"""`attach`: a transformers causal LM whose forward returns the SFR loss and makes no logits.

The model's own forward runs unchanged; only its lm_head, called for a loss, runs the fused loss on the hidden states
with its own weight and returns that instead of logits. So the weight is read inside the module's own call, after any
engine that shards or offloads it has gathered it, and the velocity head's inside that of `SFRLoss`. What the model does
to its logits afterwards (softcap, scale) is measured once with known numbers (`own_loss`), and given to the loss.
"""

import inspect
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..config import SFRConfig
from ..modules import LinearCrossEntropy, SFRLoss, VelocityHead
from ..targets import OnlineTargets, TargetStore
from .calls import Call, cover_lm_head, run, run_probe, uncover_lm_head, unhook
from .guard import NEVER_CALLED, Watch, check_head, forget
from .inner_layer import check_trained, layer_of
from .lm_head import REPLACED_FORWARD, output_linear, weight_shape
from .methods import cover, is_covered, owner, plain, uncover
from .objectives import (
    Attachment,
    BatchInputs,
    CrossEntropyAttachment,
    SFRModelOutput,
    attachment_of,
    keep_from_predictions,
    objective_of,
    placed,
)
from .own_loss import OwnLoss, router_loss
from .saving import adapter_card, save_pretrained, upload, without_head

Model = TypeVar("Model", bound=nn.Module)


_OUTPUTS = ("aux_loss", "router_logits", "past_key_values", "hidden_states", "attentions")  # the model's own, passed on


def base_of(model: Any) -> Any:  # of any class: its attributes are transformers' and ours
    """The transformers model inside a PEFT model or what torch.compile(model) returns, or the model itself."""
    model = _uncompiled(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def attach(
    model: Model,
    head_or_config: VelocityHead | SFRConfig | SFRLoss | LinearCrossEntropy | None = None,
    targets: TargetStore | OnlineTargets | None = None,
    *,
    objective: Literal["sfr", "mtp", "ce"] = "sfr",
    target_size: int | None = None,
) -> Model:
    """Makes `model(input_ids=…, labels=…, rows=…, targets=…)` return the SFR loss; returns the same model.

    model           a transformers causal LM, or a PEFT model around one (wrap with PEFT first, then attach), or what
                    torch.compile returns for either.
    head_or_config  the objective: an SFRConfig (a new head is made), a VelocityHead (with the default config of its
                    sizes), or an SFRLoss, which has both. With objective "mtp" None, an SFRConfig, whose loss
                    becomes "mtp", or an SFRLoss that has it. With objective "ce" None, or a LinearCrossEntropy.
    targets         the store of the data set, which gives the head its target size, and in which a batch with
                    `sample_id` but without rows and targets finds them. Or OnlineTargets, which embed its texts.
    objective       "sfr"; "mtp": multi-token prediction, without targets; or "ce": fused cross-entropy alone.
    target_size     d, where there are no targets.

    Without labels and rows the model returns what it did. `rows` default to those of `labels`; `seed` to that of
    `model.sfr.step`, the optimizer steps counted; the normalizer is `num_items_in_batch`, which Trainer passes. An
    optimizer's first step is an error where the loss was not computed or the head cannot learn. `save_pretrained`
    writes the plain model, and the head beside it. A copy (deepcopy, pickle, torch.save) is attached too. Compiled, the
    model is one graph for all steps, where a batch brings rows and targets. TypeError or ValueError, with the model
    unchanged, if something does not fit; at the first loss, if the model's own loss is another.
    """
    base = base_of(model)
    if attachment_of(base) is not None:
        raise ValueError("model already has an SFR objective: detach it first")
    linear = output_linear(base)
    if not isinstance(targets, TargetStore | OnlineTargets | None):
        kind = type(targets).__name__
        raise TypeError(f"targets must be a TargetStore or OnlineTargets, got {kind}: see TargetStore.open")
    given = objective_of("head_or_config", head_or_config, objective)
    if targets is not None and objective != "sfr":
        raise ValueError(f"targets have no meaning with objective={objective!r}")
    sfr: Any
    if objective == "ce":
        sfr = CrossEntropyAttachment(given or LinearCrossEntropy())
    else:
        sfr = Attachment(_sfr_loss(given, linear, targets, target_size), targets)
    if sfr.config is not None:
        sfr.inner = layer_of(base, sfr.config.layer_index)
    _fit(sfr, linear, targets)

    base.sfr = sfr.train(base.training)
    base._sfr_watch = Watch(base)
    keep_from_predictions(type(base.config))
    ignored = base._keys_to_ignore_on_save
    flag = base.__dict__.get("accepts_loss_kwargs")  # tells Trainer that forward takes num_items_in_batch
    base.sfr.restore = {"_keys_to_ignore_on_save": ignored, "accepts_loss_kwargs": flag}
    base._keys_to_ignore_on_save = {*(ignored or ()), *(f"sfr.{name}" for name in base.sfr.state_dict())}
    base.accepts_loss_kwargs = True

    cover_lm_head(base)
    cover(base, "forward", _forward)
    if hasattr(base, "generate"):
        cover(base, "generate", _generate)
    base.register_state_dict_post_hook(without_head)
    base._sfr_own_loss = OwnLoss(base, run_probe)
    saved = _uncompiled(model)
    cover(saved, "save_pretrained", save_pretrained)
    cover(saved, "_upload_modified_files", upload)
    if hasattr(saved, "create_or_update_model_card"):
        cover(saved, "create_or_update_model_card", adapter_card)
    return model


def detach(model: nn.Module) -> VelocityHead | None:
    """Undoes `attach`: the model is the plain one again. Returns the velocity head, None where there was none.

    The head alone does not know its configuration: `attach(model, SFRLoss(config, head), targets)` goes on with both.
    """
    base, model = base_of(model), _uncompiled(model)
    sfr = getattr(base, "sfr", None)
    if not isinstance(sfr, Attachment | CrossEntropyAttachment):
        raise ValueError("model has no SFR objective to detach")
    covered = [module for module in {base, model} if is_covered(module)]
    if any(owner(module) is not module for module in covered):
        raise ValueError("model is a shallow copy, which shares its modules with the attached one: detach that one")
    uncover_lm_head(base)
    unhook(base._state_dict_hooks, without_head)
    for module in covered:
        uncover(module)
    base._keys_to_ignore_on_save = sfr.restore["_keys_to_ignore_on_save"]
    del base.accepts_loss_kwargs
    if (flag := sfr.restore["accepts_loss_kwargs"]) is not None:
        base.accepts_loss_kwargs = flag
    forget(base._sfr_watch)
    del base.sfr, base._sfr_own_loss, base._sfr_watch
    return sfr.head


def _sfr_loss(given: Any, linear: nn.Linear, targets, target_size) -> SFRLoss:
    if isinstance(given, SFRLoss):
        return given
    if isinstance(given, VelocityHead):
        s = given.shape
        sizes: dict[str, Any] = dict(
            width=s.width, num_layers=s.num_blocks + 2, time_scale=s.time_scale, hidden_scale=s.hidden_scale,
            hidden_norm=s.hidden_norm,
        )  # fmt: skip
        return SFRLoss(SFRConfig(**sizes), given)
    if given.loss == "cka":
        return SFRLoss(given, None)
    if targets is not None and given.loss != "mtp":
        target_size = targets.target_size
    if target_size is None and given.loss != "mtp":
        raise ValueError(
            f"targets must be given for loss={given.loss!r}, a TargetStore or OnlineTargets; or target_size, where "
            "batches bring their own"
        )
    return SFRLoss(given, VelocityHead.from_config(given, weight_shape(linear)[1], target_size))


def _fit(sfr: Attachment | CrossEntropyAttachment, linear: nn.Linear, targets) -> None:
    """Errors for a head that does not fit the model or the targets; moves it to the model."""
    if sfr.config is None or sfr.config.loss == "mtp":  # whose head predicts tokens
        targets = None
    if targets is not None:
        targets.check(sfr.config)
    if sfr.head is not None:
        shape = sfr.head.shape
        if shape.hidden_size != (hidden_size := weight_shape(linear)[1]):
            raise ValueError(f"head is for hidden size {shape.hidden_size}, the model's is {hidden_size}")
        if targets is not None and shape.target_size != targets.target_size:
            raise ValueError(f"head is for target size {shape.target_size}, targets have {targets.target_size}")
        if isinstance(linear.weight, DTensor):
            raise ValueError(
                "model is sharded, and the head's gradients would not be exchanged: attach first, then fully_shard"
            )
    device: Any = linear.weight.device
    if device.type == "meta":  # an engine that has offloaded the weight computes elsewhere
        device = getattr(getattr(linear, "_hf_hook", None), "execution_device", None)
    if device is not None:
        sfr.to(device)


# Finds rows from labels and targets from a store or an encoder, which a compiler cannot trace.
_find_inputs = torch.compiler.disable(Attachment.inputs)


def _forward(
    self, *args, labels=None, rows=None, targets=None, times=None, seed=None, sample_id=None,
    label_smoothing=None,  # a Trainer's, which SFRCallback passes on
    **kwargs,
):  # fmt: skip
    """The attached forward."""
    if len(args) > 1:  # labels may be among them
        kwargs |= zip(inspect.signature(plain(self, "forward")).parameters, args, strict=False)
        args, labels = (), kwargs.pop("labels", labels)
    normalizer = kwargs.pop("num_items_in_batch", None)
    if kwargs.get("fused_lm_head"):
        raise RuntimeError(NEVER_CALLED)
    if labels is None and rows is None:
        return plain(self, "forward")(*args, **kwargs)
    sfr = self.sfr
    batch = BatchInputs(labels, rows, targets, times, seed, sample_id, normalizer, label_smoothing, kwargs)
    if torch.is_grad_enabled():
        if sfr.inner:
            check_trained(self, sfr.inner, sfr.config.layer_index)
        if sfr.training:
            check_head(sfr)
            self._sfr_watch.trained = True
        self._sfr_watch.called = True
    looked_up = isinstance(sfr, Attachment) and (rows is None or isinstance(sfr.store, OnlineTargets))
    inputs = _find_inputs(sfr, batch) if looked_up else sfr.inputs(batch)
    self._sfr_own_loss.measure((labels if rows is None else rows).device)
    call = Call(self, inputs=inputs | self._sfr_own_loss.options)
    own = {name: value for name, value in kwargs.items() if name not in ("shift_labels", "ignore_index")}
    outputs = run(self, call, args, own)
    if not call.reached:
        raise RuntimeError(REPLACED_FORWARD)
    loss, aux = call.returned.sum(), getattr(outputs, "aux_loss", None)  # of one number; FSDP2 warns of views
    if aux is not None:  # the router loss, which a mixture of experts adds to its own loss
        loss = loss + router_loss(self, aux.to(loss.device))
    stats = call.out.stats
    result = SFRModelOutput(
        loss=loss,
        predictions=None if sfr.training or stats is None else placed(stats.predicted, inputs),
        ce_loss=call.out.ce,
        flow_loss=call.out.flow,
        stats=stats if sfr.return_stats else None,
        **{name: outputs.get(name) for name in _OUTPUTS},
    )
    as_dict = kwargs.get("return_dict")
    return result if (self.config.return_dict if as_dict is None else as_dict) else result.to_tuple()


def _generate(self, *args, rows=None, targets=None, times=None, seed=None, sample_id=None, **kwargs):
    """The model's own generate, which may be given a whole batch of the collator."""
    return plain(self, "generate")(*args, **kwargs)

"""Stops training, at its first optimizer step, that does not do what `attach` was asked for.

torch calls global hooks at every step of every optimizer. Those registered here find the attached models whose
parameters the optimizer holds: it is an error, in any loop or trainer, if the loss was not computed or the head cannot
learn. They also count the steps, from which the noise follows.
"""

import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .head import is_new
from .recipe import COPIES, HeadEMA
from .sharding import check_not_flat

NEVER_CALLED = (
    "this training does not compute the loss that was attached: the optimizer steps, and the model's forward was not "
    "called with labels or rows. With TRL use sfr_kernels.training.trl.SFRTrainer; with use_liger_kernel set "
    'liger_kernel_config={"fused_linear_cross_entropy": False}; for a trainer with a loss of its own (DPO, a loss '
    "function of logits) detach the model"
)
FROZEN = (
    "the velocity head is frozen or changed ({names}): get_peft_model and add_adapter freeze all they find and adapt "
    "what they may. Wrap the model first, then attach; or detach, wrap and attach again"
)
_NOT_HELD = "the optimizer holds the model's parameters and not those of the velocity head: make it after attach"
_STILL = "the learning rate of the velocity head is 0, and others are not: give its parameter group one"
_NO_GRADIENT = (
    "no gradient has reached the velocity head at the optimizer's step: it was cleared, or another loss differentiated"
)
_DETACHED = (
    "no gradient has reached the model, only the head: its hidden states are detached. With reentrant gradient "
    "checkpointing of a model whose embeddings are frozen call model.enable_input_require_grads()"
)
_NEW_HEAD = (
    "the optimizer is that of a run that is resumed, and the velocity head is new (its step is 0): a Trainer needs "
    "SFRCallback, which restores it; in a loop of your own load the attached model's state_dict, or give attach what "
    "checkpoint.load_head reads and set model.sfr.step"
)
_NO_SCHEDULE = (
    "config.flow_schedule and config.flow_warmup change λ in the course of a run, which only SFRCallback knows: add it "
    "to the Trainer, or set model.sfr.schedule, the factor of λ, at each step"
)
_NO_GATE = (
    "config.flow_gate opens and closes by the flow loss of each step, which nobody has told it: add SFRCallback to the "
    "Trainer, or call model.sfr.gate.update(loss) after each step"
)
_NOT_FITTED = (
    "the velocity head is new, and config.head_steps asks for it to be fitted before training, without which the flow "
    "loss does little: add SFRCallback to the Trainer, or call fit_head(model, batches, steps) of "
    "sfr_kernels.training.head first; head_steps=0 goes without"
)
_NOT_SET = (
    "flow_weight is auto, and λ stays 1, since nothing measures what to set it to: add SFRCallback to the Trainer, set "
    "sfr.measuring and call sfr.approach_share in a loop of your own, or give flow_weight a number"
)
_IN_EVALUATION = "the optimizer steps on a model in eval(): no dropout, the same noise at each step. Call model.train()"
_NOT_EXCHANGED = (
    "DistributedDataParallel has wrapped the model before attach, and does not exchange the gradients of the velocity "
    "head: attach first, then wrap"
)

_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()
# Of each optimizer, the number of its parameters, and the watches of the models that have some of them.
_found: "weakref.WeakKeyDictionary[Optimizer, tuple[int, list]]" = weakref.WeakKeyDictionary()
_handles: list = []


class Watch:
    """The forwards and optimizer steps of one attached model. Compiled code sets flags here, and reads none."""

    def __init__(self, base: nn.Module):
        self.__setstate__({"base": base})

    def __getstate__(self) -> dict:
        return {"base": self.base}

    def __setstate__(self, state: dict) -> None:
        self.base = state["base"]
        self.called = self.trained = False  # set by forwards: the loss was computed since the last step; in train()
        self.saving = self.silent = self.warned = False  # saving: the plain model is being written
        self.calls = 0  # steps before which the loss was computed
        self.stepped = 0  # of these, the ones counted in the attachment's step
        # Of each optimizer, the steps it made, `calls` at the last one, and whether `_judge` is done with it.
        self.steps: weakref.WeakKeyDictionary[Optimizer, tuple] = weakref.WeakKeyDictionary()
        self.engines: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers of flat copies of the parameters
        self.holders: dict[str, weakref.ref] = {}  # an optimizer of the head, and one of the model, once found
        self.ema = HeadEMA()
        _watches.add(self)
        _found.clear()
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before))
            _handles.append(register_optimizer_step_post_hook(_after))

    @property
    def progress(self) -> int:
        """Grows when the loss is computed for a further step."""
        return self.calls + self.called

    @property
    def head_ema(self) -> float:
        config = self.base.sfr.config
        return 0.0 if config is None else config.head_ema

    def before(self, optimizer: Optimizer, closure: bool) -> None:
        if optimizer not in self.steps and not self.silent and _is_resumed(optimizer, self.base.sfr):
            raise RuntimeError(_NEW_HEAD)
        if not closure:  # which computes the loss
            self._check(optimizer)
        if self.head_ema:
            self.ema.before(optimizer, self.base.sfr.head.parameters())

    def after(self, optimizer: Optimizer, closure: bool) -> None:
        self.ema.after(optimizer, self.head_ema)
        if closure:
            self._check(optimizer)
        self.count()

    def after_unknown(self, optimizer: Optimizer) -> None:
        """After a step of an optimizer that has none of the model's parameters. If none has them, and what it has may
        be copies, it has copies."""
        if optimizer not in self.engines:
            if not self._may_be_copies(optimizer) or self._has_optimizer("model", self.base.parameters()):
                return
            if self.head_ema:
                raise RuntimeError(COPIES)
            self.engines.add(optimizer)
        self.count()

    def _may_be_copies(self, optimizer: Optimizer) -> bool:
        """Whether what it has is flat, as engines lay parameters one after the other, or as large as the model's, one
        by one; the parameters of another model are neither."""
        held = [p.shape for group in optimizer.param_groups for p in group["params"]]
        trained = [p.shape for p in self.base.parameters() if p.requires_grad]
        return bool(held) and (all(len(shape) <= 1 for shape in held) or Counter(held) == Counter(trained))

    def count(self) -> None:
        """Counts a step; several optimizers that step after one loss make one step."""
        self.calls, self.called = self.progress, False
        if self.calls > self.stepped:
            self.stepped = self.calls
            if self.base.sfr.config is not None:
                self.base.sfr.advance()

    def _check(self, optimizer: Optimizer) -> None:
        """Errors at an optimizer's first two steps: the loss before the first may have been computed for another."""
        if self.called and not (self.trained or self.warned):
            self.warned = True
            warnings.warn(_IN_EVALUATION, RuntimeWarning, stacklevel=5)
        self.calls, self.called, self.trained = self.progress, False, False
        number, before, judged = self.steps.get(optimizer, (0, 0, self.silent))
        if number < 2 and self.calls == before and not self.silent:
            if _changes_anything(optimizer):
                raise RuntimeError(NEVER_CALLED)
            return
        gate = self.base.sfr.gate
        if number == 1 and not self.silent and gate is not None and not gate.driven:
            raise RuntimeError(_NO_GATE)
        self.steps[optimizer] = number + 1, self.calls, judged or self._judge(optimizer)

    def _judge(self, optimizer: Optimizer) -> bool:
        """Errors for a head or a model that this step does not train. False to judge again, if all rates are 0."""
        sfr, held = self.base.sfr, _ids(optimizer.param_groups)
        has_schedule = sfr.config is not None and (sfr.config.flow_warmup or sfr.config.flow_schedule != "constant")
        if has_schedule and not sfr.scheduled:
            raise RuntimeError(_NO_SCHEDULE)
        if sfr.config is not None and sfr.config.head_steps and sfr.head is not None and is_new(sfr.head):
            warnings.warn(_NOT_FITTED, RuntimeWarning, stacklevel=6)
        if sfr.config is not None and sfr.config.flow_weight == "auto" and not (sfr.shared or sfr.measuring):
            warnings.warn(_NOT_SET, RuntimeWarning, stacklevel=6)
        check_head(sfr)
        moving = _ids(group for group in optimizer.param_groups if float(group.get("lr", 1.0)))
        head = [] if sfr.head is None else list(sfr.head.parameters())
        held_head = [p for p in head if id(p) in held]
        if head and not held_head and not self._has_optimizer("head", head):
            raise RuntimeError(_NOT_HELD)
        if held_head and moving and not any(id(p) in moving for p in held_head):
            raise RuntimeError(_STILL)
        if held_head and not _has_gradient(held_head, sfr):
            raise RuntimeError(_NO_GRADIENT)
        others = {id(p) for p in (*head, *self.base.get_output_embeddings().parameters())}
        trunk = [p for p in self.base.parameters() if p.requires_grad and id(p) in held and id(p) not in others]
        if trunk and all(p.grad is None for p in trunk):
            raise RuntimeError(_DETACHED)
        return bool(moving)

    def _has_optimizer(self, part: str, parameters: Iterable[Tensor]) -> bool:
        """Whether any optimizer has these parameters. torch has no list of optimizers; the garbage collector has."""
        holder = self.holders.get(part, lambda: None)()
        if holder is None:
            wanted = {id(p) for p in parameters}
            optimizers = (x for x in gc.get_objects() if issubclass(type(x), Optimizer))
            holder = next((x for x in optimizers if wanted & _ids(getattr(x, "param_groups", ()))), None)
            if holder is not None:
                self.holders[part] = weakref.ref(holder)
        return holder is not None


def watch_of(model: nn.Module) -> Watch:
    """The watch of an attached model, which may be wrapped."""
    return next(w for m in model.modules() if (w := m.__dict__.get("_sfr_watch")) is not None)


def unwatch(model: nn.Module) -> None:
    """Ends the errors of this file, for a model that is trained by another loss, too. Steps are still counted."""
    watch_of(model).silent = True


def forget(watch: Watch) -> None:
    """Ends the watch of a detached model; with the last one the hooks go."""
    _watches.discard(watch)
    _found.clear()
    if not _watches:
        while _handles:
            _handles.pop().remove()


def check_head(sfr: nn.Module) -> None:
    """RuntimeError if the head was frozen, given adapters or flattened after attach."""
    if sfr.head is None:
        return
    check_not_flat(sfr.head)
    wrong = [name for name, p in sfr.head.named_parameters() if not p.requires_grad]
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise RuntimeError(FROZEN.format(names=", ".join(wrong[:2]) + more))


def check_exchanged(sfr: nn.Module) -> None:
    """RuntimeError, in a forward under DDP, if DDP does not exchange the head's gradients."""
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or sfr.head is None:
        return
    known = {id(p) for p in ddp._module_parameters}
    if not all(id(p) in known for p in sfr.head.parameters()):
        raise RuntimeError(_NOT_EXCHANGED)


def _ids(groups: Iterable[dict]) -> set[int]:
    return {id(p) for group in groups for p in group["params"]}


def _is_resumed(optimizer: Optimizer, sfr: nn.Module) -> bool:
    """Whether the optimizer's state has steps of the head, and the attachment has counted none."""
    if sfr.head is None or sfr.step:
        return False
    states = [optimizer.state[p] for p in sfr.head.parameters() if p in optimizer.state]
    return any(x.dim() and x.any() for state in states for x in state.values() if isinstance(x, Tensor))


def _has_gradient(head: list[Tensor], sfr: nn.Module) -> bool:
    """Whether there is a gradient; a nonzero one, unless λ or the last flow loss was 0."""
    gradients = [p.grad for p in head if p.grad is not None]
    if not gradients or not sfr.flow_weight * sfr.schedule or not sfr.last[1]:
        return bool(gradients)
    if any(isinstance(g, DTensor) for g in gradients):  # all of this process's share may be zero, or empty
        return True
    return any(bool(g.any()) for g in gradients)


def _changes_anything(optimizer: Optimizer) -> bool:
    """False for a step at rates of zero or without gradients, which some make to create the optimizer's state."""
    return any(
        float(group.get("lr", 1.0)) != 0 and any(p.grad is not None for p in group["params"])
        for group in optimizer.param_groups
    )


def _watching(optimizer: Optimizer) -> list[Watch]:
    """The watches of the models whose parameters the optimizer holds."""
    size = sum(len(group["params"]) for group in optimizer.param_groups)
    found = _found.get(optimizer)
    if found is None or found[0] != size:
        held = _ids(optimizer.param_groups)
        holds = [weakref.ref(w) for w in _watches if any(id(p) in held for p in w.base.parameters())]
        found = _found[optimizer] = size, holds
    return [watch for ref in found[1] if (watch := ref()) is not None]


@torch.compiler.disable
def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for watch in _watching(optimizer):
        watch.before(optimizer, _closure(args, kwargs))


@torch.compiler.disable
def _after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    known = _watching(optimizer)
    for watch in known:
        watch.after(optimizer, _closure(args, kwargs))
    for watch in [w for w in _watches if not known and w.called and not w.steps]:
        watch.after_unknown(optimizer)


def _closure(args: tuple, kwargs: dict) -> bool:
    """Whether step(closure), whose first argument is the optimizer, computes the loss itself."""
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None

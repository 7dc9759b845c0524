"""Training that does not do what `attach` was asked for stops at its first optimizer step.

torch tells of every step of every optimizer. The hooks registered here find the attached models whose parameters it
holds, so that whatever loop or trainer made the step, it is an error if the loss was not computed or the head cannot
learn. They also count the steps, from which the noise is drawn.
"""

import functools
import gc
import warnings
import weakref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

NEVER_CALLED = (
    "this training does not compute the loss that was attached: the optimizer steps, and the model's forward was not "
    "called with labels or rows. TRL's SFTTrainer multiplies by the lm_head itself: use "
    "sfr_kernels.training.trl.SFRTrainer. use_liger_kernel replaces the forward: set "
    'liger_kernel_config={"fused_linear_cross_entropy": False}. A trainer with a loss of its own (DPO, a loss function '
    "of logits) does not go with an attached model: detach it"
)
FROZEN = (
    "the velocity head is frozen or changed ({names}): get_peft_model and add_adapter freeze all they find and adapt "
    "what they may. Wrap the model first, then attach; or detach, wrap and attach again"
)
_NOT_HELD = (
    "the optimizer holds the model's parameters and not those of the velocity head: make it after attach, of "
    "model.parameters()"
)
_NO_GRADIENT = (
    "the velocity head has no gradient at the optimizer's step: the loss that was differentiated is not the attached "
    "model's, or the gradients were cleared in between"
)
_NEW_HEAD = (
    "the optimizer goes on with a run, and the velocity head is new: SFRCallback restores that of a Trainer's run; in "
    "a loop of your own load the attached model's state_dict, or give attach what checkpoint.load_head reads"
)
_NO_SCHEDULE = (
    "config.flow_schedule and config.flow_warmup change λ in the course of a run, which only SFRCallback knows: add it "
    "to the Trainer, or set model.sfr.schedule, the factor of λ, at each step"
)
_IN_EVALUATION = (
    "the optimizer steps on a model in eval(): its noise is the same at every step, and it has no dropout. Call "
    "model.train() before training"
)

_NOT_COMPILED = "steps of an attached model's optimizer are counted in Python: compile them without fullgraph=True"

_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()
_found: "weakref.WeakKeyDictionary[Optimizer, tuple[int, list]]" = weakref.WeakKeyDictionary()


class Watch:
    """What is seen of the training of one attached model. Compiled code writes flags here, and reads nothing."""

    def __init__(self, base: nn.Module):
        self.__setstate__({"base": base})

    def __getstate__(self) -> dict:
        return {"base": self.base}

    def __setstate__(self, state: dict) -> None:
        self.base = state["base"]
        self.called = self.in_evaluation = self.warned = False  # the loss, since the last step; in eval()
        self.calls = 0  # steps before which the loss was computed
        self.stepped = 0  # of them, those that are counted in the attachment's step
        self.holder = None  # a weak reference to an optimizer that has the head
        self.steps: weakref.WeakKeyDictionary[Optimizer, list[int]] = weakref.WeakKeyDictionary()  # [number, calls]
        _register()
        _watches.add(self)
        _found.clear()

    @property
    def progress(self) -> int:
        """Grows when the loss is computed for a further step."""
        return self.calls + self.called

    def before(self, optimizer: Optimizer, closure: bool) -> None:
        if optimizer not in self.steps and _goes_on(optimizer, self.base.sfr):
            raise RuntimeError(_NEW_HEAD)
        if not closure:  # which computes the loss
            self._check(optimizer)

    def after(self, optimizer: Optimizer, closure: bool) -> None:
        if closure:
            self._check(optimizer)
        if self.in_evaluation and not self.warned:
            self.warned = True
            warnings.warn(_IN_EVALUATION, RuntimeWarning, stacklevel=4)
        self.count()

    def count(self) -> None:
        """Counts a step, once however many optimizers make it."""
        self.calls, self.called = self.progress, False
        if self.calls > self.stepped:
            self.stepped = self.calls
            if self.base.sfr.config is not None:
                self.base.sfr.advance()

    def _check(self, optimizer: Optimizer) -> None:
        """Errors for an optimizer's first steps: at the second, another loss may have taken the place of ours."""
        self.calls, self.called = self.progress, False
        number, before = self.steps.get(optimizer, (0, 0))
        if number < 2 and self.calls == before:
            if _moves(optimizer):
                raise RuntimeError(NEVER_CALLED)
            return
        if number == 0:
            self._check_head(optimizer)
        self.steps[optimizer] = number + 1, self.calls

    def _check_head(self, optimizer: Optimizer) -> None:
        sfr, held = self.base.sfr, _ids(optimizer)
        if sfr.config is None:
            return
        if not sfr.scheduled and (sfr.config.flow_warmup or sfr.config.flow_schedule != "constant"):
            raise RuntimeError(_NO_SCHEDULE)
        check_head(sfr)
        ours = [] if sfr.head is None else [p for p in sfr.head.parameters() if id(p) in held]
        if ours and all(p.grad is None for p in ours):
            raise RuntimeError(_NO_GRADIENT)
        if sfr.head is not None and not ours and not self._held_by_another():
            raise RuntimeError(_NOT_HELD)

    def _held_by_another(self) -> bool:
        """Whether there is an optimizer of the head: parts of a model may have theirs."""
        if self.holder is None or self.holder() is None:
            head = {id(p) for p in self.base.sfr.head.parameters()}
            optimizers = (x for x in gc.get_objects() if issubclass(type(x), Optimizer))
            found = next((x for x in optimizers if head & _ids(x)), None)
            self.holder = found and weakref.ref(found)
        return self.holder is not None


def watch_of(model: nn.Module) -> Watch:
    """The watch of an attached model, however it is wrapped."""
    return next(w for m in model.modules() if (w := m.__dict__.get("_sfr_watch")) is not None)


def unwatch(model: nn.Module) -> None:
    """Leaves the steps of an attached model alone, for one that shares its parameters with a model that another loss
    trains: no error stops them, and `model.sfr.step` is set by whoever makes them."""
    _watches.discard(watch_of(model))
    _found.clear()


def check_head(sfr: nn.Module) -> None:
    """RuntimeError if the head was frozen or given adapters after attach."""
    if sfr.head is None:
        return
    wrong = [name for name, p in sfr.head.named_parameters() if not p.requires_grad]
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise RuntimeError(FROZEN.format(names=", ".join(wrong[:2]) + more))


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _goes_on(optimizer: Optimizer, sfr: nn.Module) -> bool:
    """Whether the optimizer has a past and the head, which starts at zero, has none."""
    if sfr.head is None or not sfr.flow_weight:
        return False
    states = [optimizer.state[p] for p in sfr.head.parameters() if p in optimizer.state]
    past = any(x.dim() and x.any() for state in states for x in state.values() if isinstance(x, Tensor))
    return past and not sfr.head.output_proj.weight.any()


def _moves(optimizer: Optimizer) -> bool:
    """Whether a step changes anything: some are made at a rate of zero, to have the optimizer's state."""
    return any(
        float(group.get("lr", 1.0)) != 0 and any(p.grad is not None for p in group["params"])
        for group in optimizer.param_groups
    )


def _watching(optimizer: Optimizer) -> list[Watch]:
    """The models whose parameters the optimizer holds."""
    size = sum(len(group["params"]) for group in optimizer.param_groups)
    found = _found.get(optimizer)
    if found is None or found[0] != size:
        held = _ids(optimizer)
        holds = [weakref.ref(w) for w in _watches if any(id(p) in held for p in w.base.parameters())]
        found = _found[optimizer] = size, holds
    return [watch for ref in found[1] if (watch := ref()) is not None]


@torch.compiler.disable(reason=_NOT_COMPILED)
def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if _watches:
        for watch in _watching(optimizer):
            watch.before(optimizer, _closure(args, kwargs))


@torch.compiler.disable(reason=_NOT_COMPILED)
def _after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if not _watches:
        return
    if known := _watching(optimizer):
        for watch in known:
            watch.after(optimizer, _closure(args, kwargs))
    else:  # perhaps an engine's, of flat copies: it counts for the models that no other has been seen to hold
        for watch in [w for w in _watches if w.called and not w.steps]:
            watch.count()


def _closure(args: tuple, kwargs: dict) -> bool:
    """Whether the step computes the loss itself; of the arguments, the first is the optimizer."""
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None


@functools.cache
def _register() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)

"""Methods that `attach` puts over those of a module. A copy of the module has them too, bound to the copy.

A bound method in an attribute would not survive: it is pickled as an object and an attribute name, and looked up before
that attribute is set. A `Method` is pickled by its values.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from types import MethodType

from torch import nn

_COVERED = "_sfr_covered"


class Method:
    """A function of this package bound to a module, over the module's own method `name`."""

    def __init__(self, function: Callable, module: nn.Module, name: str):
        self.function, self.module, self.name = function, module, name

    def __call__(self, *args, **kwargs):
        return self.function(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The covered method's, and the function's keywords that it lacks."""
        signature = inspect.signature(plain(self.module, self.name))
        keywords = [p for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        extra = [p for p in keywords if p.name not in signature.parameters]
        return signature.replace(parameters=sorted([*signature.parameters.values(), *extra], key=lambda p: p.kind))

    # accelerate reads these two of a bound method, to wrap it and to bind it to another module.
    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __func__(self) -> Callable:
        unbound, signature = functools.partial(self.function), self.__signature__
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        unbound.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
        return unbound


class _Covered:
    """The methods of a module that ours cover: by name, the attribute and what it held, None: the class's own."""

    def __init__(self, module: nn.Module):
        self.module, self.plain = module, {}

    def place(self, name: str) -> str | None:
        """The attribute that holds our method now: accelerate moves a forward that it wraps to `_old_forward`."""
        places = (self.plain[name][0], *(["_old_forward"] if name == "forward" else []))
        return next((p for p in places if isinstance(self.module.__dict__.get(p), Method)), None)

    def __getstate__(self) -> dict:
        kind = type(self.module)
        for name, (_, own) in self.plain.items():
            if self.place(name) is None:
                raise TypeError(
                    f"{name} of {kind.__name__} was replaced after attach, by something that a pickle "
                    "would not hold: detach the model and attach it again before it is saved whole or sent on"
                )
            if isinstance(own, MethodType) and own.__func__ is not getattr(kind, name, None):
                raise TypeError(
                    f"{name} of {kind.__name__} was replaced before attach, by a bound method, of which a pickle holds "
                    "no more than the name: take it away before the model is saved whole or sent on"
                )
        return self.__dict__

    def __deepcopy__(self, memo: dict) -> "_Covered":  # unlike a pickle, with what was put over ours
        memo[id(self)] = twin = type(self)(copy.deepcopy(self.module, memo))
        twin.plain = copy.deepcopy(self.plain, memo)
        return twin


def cover(module: nn.Module, name: str, function: Callable, slot: str | None = None) -> None:
    """Puts `function(module, …)` over the method `name`, in the attribute `slot` if something else calls it there."""
    slot = slot or name
    covered = module.__dict__.setdefault(_COVERED, _Covered(module))
    covered.plain[name] = slot, module.__dict__.get(slot)
    module.__dict__[slot] = Method(function, module, name)


def is_covered(module: nn.Module) -> bool:
    return _COVERED in module.__dict__


def owner(module: nn.Module) -> nn.Module:
    """The module whose methods were covered: another one, if this is a shallow copy of it."""
    return module.__dict__[_COVERED].module


def plain(module: nn.Module, name: str) -> Callable:
    """The method under ours; a partial, since a compiler cannot trace the creation of a bound method."""
    _, own = module.__dict__[_COVERED].plain[name]
    return functools.partial(getattr(type(module), name), module) if own is None else own


def uncover(module: nn.Module) -> None:
    """Puts back all methods of the module."""
    covered = module.__dict__[_COVERED]
    for name, (slot, own) in covered.plain.items():
        place = covered.place(name) or slot
        if own is None and place == name:
            module.__dict__.pop(place, None)
        else:
            module.__dict__[place] = own or MethodType(getattr(type(module), name), module)
    del module.__dict__[_COVERED]

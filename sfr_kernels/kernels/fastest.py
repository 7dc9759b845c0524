"""Which backend serves a leaf where nobody has asked for one: the one that was measured faster.

`fastest.json` is written by `python -m sfr_kernels bench choose RESULT_FILE`, a row for each compute capability, leaf
and class of size, with the times behind it and the result file they came from. What no row speaks of is Triton's.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

from . import FlowPath

FILE = Path(__file__).with_suffix(".json")
SMALL = 4 * 2**20  # bytes: below, a kernel takes less time than its launch
SIZES = ("small", "large")


def size_of(argument) -> str:
    """The class of a call, by the first argument of its leaf: a tensor, or the path of the rows that it makes."""
    if isinstance(argument, FlowPath):
        count = argument.noise_id.shape[0] * argument.targets.shape[1] * argument.targets.element_size()
    else:
        count = argument.numel() * argument.element_size()
    return "small" if count < SMALL else "large"


@cache
def rows(capability: tuple[int, int]) -> tuple[dict, ...]:
    """What was measured on GPUs of this compute capability: leaf, size, backend, ms of each backend, origin."""
    name = "{}.{}".format(*capability)
    return tuple(row for row in json.loads(FILE.read_text()) if row["capability"] == name)


class Fastest:
    """The leaves of two backends as those of one: each call goes where its like was faster."""

    def __init__(self, table: tuple[dict, ...], modules: dict[str, ModuleType], otherwise: str):
        wanted = {(row["leaf"], row["size"]): row["backend"] for row in table}
        for name in modules[otherwise].__all__:
            small, large = (getattr(modules[wanted.get((name, size), otherwise)], name) for size in SIZES)
            setattr(self, name, small if small is large else _by_size(small, large))


def _by_size(small: Callable, large: Callable) -> Callable:
    def leaf(first, *arguments, **options):
        return (small if size_of(first) == "small" else large)(first, *arguments, **options)

    return leaf

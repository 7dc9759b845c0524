"""The sizes that are measured: those of models people fine-tune, and sweeps along one of them.

On a CPU every shape is scaled down, to a 32nd of the tokens, a sixteenth of the classes and an eighth of the width,
in float32: there the harness can be tried, and a ratio that moves does mean something. What people do train on a CPU is
measured there as it is (`unscaled`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import torch

from .problems import Shape
from .work import Case, Goal

# H and V of the public configurations
MODELS = {
    "Llama-3-8B": (4096, 128256),
    "Qwen2.5-7B": (3584, 152064),
    "Qwen3-0.6B": (1024, 151936),
    "Qwen3-1.7B": (2048, 151936),
    "Qwen3-32B": (5120, 151936),
    "Gemma-3-4B": (2560, 262208),
    "SmolLM2-135M": (576, 49152),
}
LONGEST = 2048  # tokens of a sequence
CPU_SECONDS = 0.5  # of timing, for a case
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def shape_of(
    model: str | tuple[int, int],  # of MODELS, or H and V
    tokens: int,
    supervised: float = 0.5,
    *,
    frozen: bool = False,
    length: int = LONGEST,
    **sizes: int,
) -> Shape:
    hidden_size, vocab = MODELS[model] if isinstance(model, str) else model
    length = min(length, tokens)
    return Shape(tokens // length, length, hidden_size, supervised, vocab, frozen, **sizes)


def case_of(op: str, model: str | None, shape: Shape, dtype: torch.dtype = BF16, note: str = "", **options) -> Case:
    """A case named after its sizes; `note` says what else is special about it."""
    sizes = asdict(shape) | dict(model=model, tokens=shape.batch * shape.length, note=note)
    return Case(op, ", ".join(words(sizes)), sizes, dtype, shape, **options)


def words(sizes: dict, without: str | None = None) -> list[str]:
    """What sizes are called, all but one of them."""
    parts = dict(model=sizes["model"]) if sizes["model"] else {}
    if not sizes["model"]:
        parts |= dict(hidden_size=f"H {sizes['hidden_size']}")
        parts |= dict(vocab=f"V {sizes['vocab']}") if sizes["vocab"] else {}
    parts |= dict(tokens=f"{sizes['tokens']} tokens", supervised=f"{sizes['supervised']:.0%} supervised")
    parts |= dict(frozen="frozen" if sizes["frozen"] else "trained") if sizes["vocab"] else {}
    parts |= dict(note=sizes["note"]) if sizes["note"] else {}
    return [text for name, text in parts.items() if name != without]


def sweep(op: str, axis: str, shapes: Iterable[Shape], model: str | None = None, *, quick: bool = False) -> list[Case]:
    """Points of a curve; without torch.compile, which would take longer than all the rest."""
    options = dict(sweeps=(dict(axis=axis),), main=False, seconds=1.0, quick=quick)
    return [case_of(op, model, shape, **options) for shape in shapes]


def fit(cases: Sequence[Case], device: torch.device, on_cpu: Sequence[Case] = ()) -> list[Case]:
    """The cases as they are on a device, each once: one that is also a point of curves serves all of them; on a CPU
    those for it besides."""
    found: dict[str, Case] = {}
    for case in cases:
        if device.type != "cuda":
            case = scaled(case)
        if same := found.get(case.group):
            case = replace(same, quick=case.quick or same.quick, sweeps=(*same.sweeps, *case.sweeps))
        found[case.group] = case
    cases = [replace(case, sweeps=tuple(_point(case, c["axis"]) for c in case.sweeps)) for case in found.values()]
    return [*cases, *on_cpu] if device.type == "cpu" else cases


def _point(case: Case, axis: str) -> dict:
    series = f"{case.op}: {', '.join([*words(case.sizes, without=axis), case.dtype_name])}"
    return dict(axis=axis, x=case.sizes[axis], series=series)


def unscaled(
    op: str, shares: Iterable[tuple[int, float]], goal: Goal, *, frozen: bool = False, **options
) -> list[Case]:
    """A small model's cases for a CPU, at its own size, by tokens and share supervised; targets are MiniLM's."""
    found = []
    for tokens, share in shares:
        shape = shape_of("SmolLM2-135M", tokens, share, frozen=frozen, length=tokens // 2, target_size=384)
        found.append(
            case_of(op, "SmolLM2-135M", shape, FP32, note="unscaled", goal=goal, seconds=3.0, least_runs=5, **options)
        )
    return found


def scaled(case: Case) -> Case:
    shape = scaled_shape(case.shape)
    kept = {name: getattr(case, name) for name in ("sweeps", "main", "providers", "quick")}
    return case_of(case.op, case.sizes["model"], shape, FP32, case.sizes["note"], seconds=CPU_SECONDS, **kept)


def scaled_shape(shape: Shape) -> Shape:
    return replace(
        shape, length=max(16, shape.length // 32), hidden_size=shape.hidden_size // 8, vocab=shape.vocab // 16,
        target_size=256, width=256,
    )  # fmt: skip

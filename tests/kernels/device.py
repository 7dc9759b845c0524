"""Whose kernels these tests judge: Triton's or, with SFR_TEST_KERNELS=cuda, those of csrc/. They run on a GPU, else in
Triton's interpreter or emulated, which takes a process of its own (tests/test_interpreter.py, tests/test_csrc.py)."""

import os
from importlib import import_module

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKEND = os.environ.get("SFR_TEST_KERNELS", "triton")
if not ON_GPU and BACKEND == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or Triton's interpreter", allow_module_level=True)

# The interpreter computes with the raw bits of bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (ON_GPU or BACKEND == "cuda")

if not ON_GPU and BACKEND == "triton":
    # The interpreter looks through its whole language at every call of a function by a kernel, to replace what is
    # replaced already: half of these tests' time.
    from triton.language import core
    from triton.runtime import interpreter

    def replace_once(fn, replace=interpreter._patch_lang):
        known = (fn.__globals__.get(name) for name in ("tl", "core"))
        fresh = any(core.is_builtin(getattr(language, "load", None)) for language in known)
        return replace(fn) if fresh else interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once

from benchmarks.oracle import Oracle  # noqa: E402
from sfr_kernels.kernels.backend import kernels_of  # noqa: E402

kernels, eager = kernels_of(BACKEND), kernels_of("torch")
sums = import_module(f"sfr_kernels.kernels.sums.{BACKEND}")


def few_row_blocks(monkeypatch) -> None:
    """Nine rows are three programs of three, as thousands would be."""
    monkeypatch.setattr(sums, "MAX_BLOCKS", 4)


def every_other(t: torch.Tensor) -> torch.Tensor:
    """The same values, with a gap behind each."""
    return torch.stack([t, torch.zeros_like(t)], dim=-1).flatten(-2)[..., ::2]


def assert_as_good(found, eager, exact, k: float = 1.5) -> None:
    """The error is at most k times eager torch's, but for a rounding of a float32 result or two."""
    Oracle(["result"], [exact.cpu()], [eager.cpu()]).verdict([found.cpu()], k)

"""mypy accepts the public modules and right calls of them, such as the README's, and refuses wrong ones."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from corpora import needs

from sfr_kernels import linear_cross_entropy
from sfr_kernels.ops.linear_cross_entropy import CrossEntropyOptions

ROOT = Path(__file__).resolve().parents[1]
FILES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
# Where a line is right that ignores an error, that is an error of its own.
CALLS = f"""\
from torch import Tensor, nn
from sfr_kernels import LoRA, attach, detach
hidden: Tensor; lm_head: nn.Linear; labels: Tensor; targets: Tensor; step: int
{re.findall("```python.(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[-1]}
loss: Tensor = out.loss
model: nn.Sequential = attach(nn.Sequential(), config, target_size=8)
sfr_loss(hidden, lm_head.weight, head, rows, targets, config=config)  # type: ignore[call-arg]
sfr_loss(hidden, lm_head.weight, head, rows, targets, seed="3", config=config)  # type: ignore[arg-type]
linear_cross_entropy(hidden, lm_head.weight, labels, logit_cap=30.0)  # type: ignore[call-overload]
lse: Tensor = linear_cross_entropy(hidden, lm_head.weight, labels, return_stats=True)[1].lse
loss = linear_cross_entropy(hidden, lm_head.weight, labels, softcap=30.0, lora=LoRA(hidden, hidden, scale=2.0))
SFRConfig(loss="flows")  # type: ignore[arg-type]
attach(model, objective="cross-entropy")  # type: ignore[arg-type]
detach(model).shape  # type: ignore[union-attr]
rows.weights  # type: ignore[attr-defined]
"""


@pytest.mark.slow
def test_mypy_tells_right_calls_from_wrong_ones(tmp_path):
    needs("mypy", "transformers", "accelerate", "sentence_transformers")
    calls = tmp_path / "calls.py"
    calls.write_text(CALLS)
    done = subprocess.run([sys.executable, "-m", "mypy", *FILES, calls], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_typed_options_are_those_of_the_function():
    options = inspect.signature(linear_cross_entropy).parameters.keys() - {"hidden", "weight", "labels", "return_stats"}
    assert CrossEntropyOptions.__annotations__.keys() == options

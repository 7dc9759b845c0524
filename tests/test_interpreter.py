"""The Triton kernels' tests in Triton's interpreter, in a process of their own: a kernel's mode is fixed when it is
imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU itself")
def test_kernels_in_the_interpreter():
    tests = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(tests.parent), str(tests), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "triton_leaves"]
    done = subprocess.run(command, cwd=tests, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout.splitlines()[-1])
    assert passed and int(passed[1]) > 200, done.stdout[-2000:]  # nothing was left out as a whole

"""The Triton kernels' tests in Triton's interpreter, in a process of their own: a kernel's mode is fixed when it is
imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
VERSIONS = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, np)]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU itself")
@pytest.mark.skipif(VERSIONS[0] < (3, 7) and VERSIONS[1] >= (2, 4), reason="Triton 3.6's interpreter needs numpy < 2.4")
@pytest.mark.parametrize("marks, least", [("not long", 200), pytest.param("long", 20, marks=pytest.mark.long)])
def test_kernels_in_the_interpreter(marks, least):
    tests = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(tests.parent), str(tests), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, "kernels"]
    done = subprocess.run(command, cwd=tests, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout.splitlines()[-1])
    assert passed and int(passed[1]) > least, done.stdout[-2000:]  # nothing was left out as a whole

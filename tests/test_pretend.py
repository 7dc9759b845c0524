"""A GPU that is pretended (check/pretend.py) finds what mixes devices and what waits for one; nothing of ours does.

The first test runs the others in a process where the GPU is pretended, and tests that need a GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch

from sfr_kernels.kernels import build

TESTS = Path(__file__).parent
pretended = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_name() == "a pretended GPU"), reason="of a pretended GPU"
)
# Without Triton's kernels, which the interpreter runs elsewhere.
SHORT = "(never_waits and flow and not triton) or without_a_wait"
REST = "(never_waits and not flow and not triton) or (odd and not triton) or ends_where_one or logged_losses"


@pytest.mark.slow
@pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing() or "")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, or one is pretended")
@pytest.mark.parametrize("files, chosen, number", [
    ("pretend", "pretended", 24), ("gpu", SHORT, 3),
    pytest.param("gpu gpu_errors trainer", REST, 6 + 18 + 3, marks=pytest.mark.long),
])  # fmt: skip
def test_what_is_written_for_a_gpu_runs_on_a_pretended_one(files, chosen, number, emulated):
    environment = os.environ | {build.LIBRARY_VARIABLE: str(emulated), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "check.pretend", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-k", chosen]
    command += [f"test_{name}.py" for name in files.split()]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout.splitlines()[-1])
    assert passed and int(passed[1]) >= number, done.stdout[-2000:]


def there(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float32, device="cuda")


HERE = torch.ones(3, 3, dtype=torch.float32)
MIXED = {
    "product": lambda: there(3, 3) @ HERE,
    "sum": lambda: torch.zeros((), dtype=torch.float32).add_(there(3).sum()),
    "into": lambda: torch.add(there(3, 3), 1.0, out=HERE),
    "stack": lambda: torch.stack([there(3).sum(), HERE.sum()]),
}
WAITS = {
    "item": lambda: there(1).item(), "bool": lambda: bool(there(1)), "mask": lambda: there(3)[there(3) > 0],
    "to": lambda: HERE.to("cuda"), "cpu": lambda: there(3).cpu(), "copy_": lambda: there(3, 3).copy_(HERE),
    "tolist": lambda: there(3).tolist(), "allclose": lambda: torch.allclose(there(3), there(3)),
    "index": lambda: there(3)[torch.tensor([1])], "list": lambda: there(3)[[0, 1]],
    "tensor": lambda: torch.tensor([1.0], dtype=torch.float32, device="cuda"), "nonzero": lambda: there(3).nonzero(),
}  # fmt: skip
FREE = {
    "scalar": lambda: there(3) + torch.tensor(2.0, dtype=torch.float32),
    "index": lambda: there(3)[there(1).long()], "fill": lambda: there(3).masked_fill_(there(3) > 0, 0.0),
    "put": lambda: there(3).index_put_((there(3) > 0,), torch.tensor(0.0, dtype=torch.float32)),
    "to": lambda: HERE.to("cuda", non_blocking=True), "full": lambda: torch.full((3,), 2.0, device="cuda"),
}  # fmt: skip


@pretended
@pytest.mark.parametrize("name", MIXED)
def test_pretended_operations_of_both_devices_raise(name):
    with pytest.raises(RuntimeError, match="mixes devices"):
        MIXED[name]()


@pretended
@pytest.mark.parametrize("name", [*WAITS, *(f"free: {name}" for name in FREE)])
def test_pretended_waits_raise_where_they_are_forbidden(name):
    act = FREE[name.removeprefix("free: ")] if name.startswith("free") else WAITS[name]
    act()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if name.startswith("free"):
            assert act().is_cuda
        else:
            with pytest.raises(RuntimeError, match="waits for the device"):
                act()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pretended
def test_pretended_waits_raise_within_an_operator():
    """There an operation is not yet what it is made of."""

    @torch.library.custom_op("sfr_kernels::waits", mutates_args=())
    def waits(x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()

    assert waits(there(3)).is_cuda
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="waits for the device"):
            waits(there(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pretended
def test_pretended_tensors_stay_where_they_are_put():
    layer = torch.nn.Linear(3, 3).to("cuda")
    layer(there(2, 3)).sum().backward()
    made = [*layer.parameters(), layer.weight.grad]
    made += [there(2).double(), there(2).new_zeros(3), torch.zeros_like(there(2))]
    with torch.device("cuda"):
        made.append(torch.zeros(2, dtype=torch.float32))
    assert {x.device for x in made} == {torch.device("cuda", 0)} and all(x.is_cuda for x in made)
    with pytest.raises(TypeError, match="on the GPU"):
        there(2).numpy()
    back = there(2).cpu()
    assert (back.device.type, back.is_cuda, HERE.device.type) == ("cpu", False, "cpu")

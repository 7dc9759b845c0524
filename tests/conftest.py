"""What every test module may ask for by name."""

import fcntl
import gc
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

# no test needs a hub, and one that is out of reach is tried for minutes; read when its library is imported
os.environ["HF_HUB_OFFLINE"] = "1"
# pytest-benchmark measures nothing under xdist; what a test starts in a process of its own must measure all the same
os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_collection_modifyitems(items):
    """Those that take minutes first: the last to end would otherwise run alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """What is imported by now stays: a collection of garbage would look through all of it, for a quarter of a second,
    and the benchmarks, the compilers and the trainers collect often, and so does each fork."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of a few thousand numbers gain nothing from a second thread, and lose much where another job runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def large():
    """For tests that need most of a GPU's memory: one at a time, of whatever process."""
    with open(Path(tempfile.gettempdir()) / f"sfr-large-test-{os.getuid()}.lock", "w") as lock:
        for _ in range(400):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            pytest.skip("other large tests have had the GPU for 40 s")
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()


def _once(tmp_path_factory, name: str, make: Callable[[Path], Path]) -> Path:
    """The file that `make` leaves in a folder, made once for all of xdist's workers, whose folders lie side by side."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "made"
        if not made.is_file():
            made.write_text(str(make(folder)))
        return Path(made.read_text())


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Path:
    """csrc/ compiled for the CPU."""
    import emulation

    return _once(tmp_path_factory, "emulation", emulation.compile_emulation)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Callable[[str], Path]:
    """csrc/ compiled for the chips that are asked for; a warning or a spill is an error."""
    from sfr_kernels.kernels import build

    if build.nvcc() is None:
        pytest.skip("needs nvcc")

    def make(chips: str, folder: Path) -> Path:
        out = folder / build.NAME
        build.compile_library(build.sources(), out, chips, build.nvcc(), folder / "work")
        return out

    return lambda chips: _once(tmp_path_factory, f"compiled for {chips}", partial(make, chips))

"""What every test module may ask for by name."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of a few thousand numbers gain nothing from a second thread, and lose much where another job runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Path:
    """csrc/ compiled for the CPU."""
    import emulation

    return emulation.compile_emulation(tmp_path_factory.mktemp("emulation"))

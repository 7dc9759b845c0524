"""The times of a step, bit for bit those of the torch kernels, and their sinusoid against float64."""

import pytest
import torch
from device import DEVICE, eager, every_other, kernels

SEED = torch.tensor([-6917529027641081857])  # both halves of the key in use, and the sign


def drawn(module, identity, seed, num_times) -> list[torch.Tensor]:
    return [*module.stratified_times(identity, seed, num_times), module.sequence_times(identity, seed)]


@pytest.mark.parametrize("num_times", [1, 7, 256])
@pytest.mark.parametrize("n", [0, 3, 300])
def test_times_have_the_bits_of_the_torch_kernels(n, num_times):
    identity = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(n))
    wanted = drawn(eager, identity, SEED, num_times)
    dense, seed = identity.to(DEVICE), SEED.to(DEVICE)
    for given in (dense, every_other(dense)):
        for mine, theirs in zip(drawn(kernels, given, seed, num_times), wanted, strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("size", [1, 2, 3, 34, 384, 1030])  # one frequency, odd ones, more than one block
def test_sinusoid(size):
    times = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(6, generator=torch.Generator().manual_seed(0))])
    exact = eager.sinusoid(times.double(), size, 1000.0, torch.float64)
    for given in (times.to(DEVICE), every_other(times.to(DEVICE))):
        found = kernels.sinusoid(given, size, 1000.0, torch.float32)
        # the angle is taken in float64 here: closer than float32, where a thousand radians cost four digits
        assert (found.cpu().double() - exact).norm() <= 2.0**-22 * max(1.0, exact.norm().item())
    repeated = times[1:2].to(DEVICE).expand(4)
    assert torch.equal(kernels.sinusoid(repeated, size, 1000.0, torch.float32)[3], found[1])

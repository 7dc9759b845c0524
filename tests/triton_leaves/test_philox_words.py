"""The words of the generator, bit for bit those of the torch leaf, and the functions that make noise of them."""

import pytest
import torch
from device import BACKEND, DEVICE
from test_flow import SEEDS

from sfr_kernels.leaves.torch.philox import random_words

IDENTITIES = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 7, -1, -(2**63), 2**63 - 1])


def words_of(identity, seed, stream):
    """(n, 32): eight blocks of four words."""
    out = torch.empty(len(identity), 32, dtype=torch.int64, device=DEVICE)
    identity, seed = identity.to(DEVICE), torch.tensor([seed], device=DEVICE)
    if BACKEND == "triton":
        from philox_kernels import words_kernel

        words_kernel[(len(identity),)](out, identity, seed, STREAM=stream, BLOCK=8)
    else:
        from sfr_kernels.leaves.cuda.library import library, stream_of

        pointers = (identity.data_ptr(), seed.data_ptr(), out.data_ptr())
        library().philox(*pointers, len(identity), stream, 8, stream_of(out))
    return out.cpu()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1, 2, 3])
def test_words_are_the_bits_of_the_torch_leaf(seed, stream):
    assert torch.equal(words_of(IDENTITIES, seed, stream), random_words(seed, IDENTITIES, stream, 8))


@pytest.mark.skipif(BACKEND != "triton", reason="csrc/ has no kernel of the functions alone")
def test_logarithm_and_circle_are_within_two_units_of_the_last_place():
    import triton
    from philox_kernels import elementary_kernel

    edges = torch.tensor([2.0**-33, 2.0**-32, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1 - 2.0**-24])
    x = torch.cat([edges, torch.rand(5000, generator=torch.Generator().manual_seed(0)).clamp(min=1e-9)])
    found = torch.empty(3, len(x), device=DEVICE)
    elementary_kernel[(triton.cdiv(len(x), 1024),)](x.to(DEVICE), *found, len(x), BLOCK=1024, enable_fp_fusion=False)
    turn = 2 * torch.pi * x.double()
    exact = torch.stack([x.double().log(), turn.sin(), turn.cos()])
    unit = torch.maximum(exact.abs(), torch.tensor([[0.0], [2.0**-10], [2.0**-10]])) * 2.0**-23
    assert ((found.double().cpu() - exact).abs() <= 2 * unit + 1e-300).all()

"""The words of the generator, bit for bit those of the torch leaf, and the functions that make noise of them."""

import pytest
import torch
from device import BACKEND, DEVICE
from test_flow import SEEDS

from sfr_kernels.kernels.philox.torch import random_words, to_uniform

IDENTITIES = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 7, -1, -(2**63), 2**63 - 1])


def words_of(identity, seed, stream):
    """(n, 32): eight blocks of four words."""
    out = torch.empty(len(identity), 32, dtype=torch.int64, device=DEVICE)
    identity, seed = identity.to(DEVICE), torch.tensor([seed], device=DEVICE)
    if BACKEND == "triton":
        from philox_kernels import words_kernel

        words_kernel[(len(identity),)](out, identity, seed, STREAM=stream, BLOCK=8)
    else:
        from sfr_kernels.kernels.cuda import library, stream_of

        pointers = (identity.data_ptr(), seed.data_ptr(), out.data_ptr())
        library().philox(*pointers, len(identity), stream, 8, stream_of(out))
    return out.cpu()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1, 2, 3])
def test_words_are_the_bits_of_the_torch_leaf(seed, stream):
    assert torch.equal(words_of(IDENTITIES, seed, stream), random_words(seed, IDENTITIES, stream, 8))


@pytest.mark.skipif(BACKEND != "triton", reason="csrc/ has no kernel of the functions alone")
def test_radius_and_circle_are_as_exact_as_they_say():
    import triton
    from philox_kernels import elementary_kernel

    edges = torch.tensor([0, 1, 2, 77, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 2, 2**32 - 1])
    w = torch.cat([edges, torch.randint(2**32, (5000,), generator=torch.Generator().manual_seed(0))])
    found = torch.empty(5, len(w), device=DEVICE)
    elementary_kernel[(triton.cdiv(len(w), 1024),)](w.to(DEVICE), found, len(w), BLOCK=1024, enable_fp_fusion=False)
    angle, turn = 2 * torch.pi * (w.double() + 0.5) / 2**32, 2 * torch.pi * (w.float() * 2.0**-32).double()
    radius = (-2 * to_uniform(w).double().log()).sqrt()
    exact = torch.stack([radius, angle.cos(), angle.sin(), turn.cos(), turn.sin()])
    wrong = (found.double().cpu() - exact).abs()
    assert (wrong[:3] <= torch.tensor([[1.2e-6], [3e-7], [3e-7]])).all()
    assert (wrong[:3, len(edges) :].square().mean(1) <= 1e-14).all()
    assert (wrong[3:] <= 2.0**-22 * exact[3:].abs().clamp(min=2.0**-10)).all()

"""The generator's words, bit for bit those of torch and of Triton's own, and the functions that make noise of them."""

import pytest
import torch
from device import BACKEND, DEVICE
from test_flow import SEEDS

from sfr_kernels import reference
from sfr_kernels.kernels.philox.torch import random_words, to_uniform

if BACKEND == "triton":
    import triton
    from philox_kernels import elementary_kernel, tritons_kernel, words_kernel

IDENTITIES = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 7, -1, -(2**63), 2**63 - 1])
of_triton = pytest.mark.skipif(BACKEND != "triton", reason="csrc/ has no kernel of the functions alone")


def words_of(identity, seed, stream):
    """(n, 32): eight blocks of four words."""
    out = torch.empty(len(identity), 32, dtype=torch.int64, device=DEVICE)
    identity, seed = identity.to(DEVICE), torch.tensor([seed], device=DEVICE)
    if BACKEND == "triton":
        words_kernel[(len(identity),)](out, identity, seed, STREAM=stream, BLOCK=8)
    else:
        from sfr_kernels.kernels.cuda import library, stream_of

        pointers = (t.data_ptr() for t in (identity, seed, out))
        library().philox(*pointers, len(identity), stream, 8, stream_of(out))
    return out.cpu()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1, 2, 3])
def test_words_are_the_bits_of_torch(seed, stream):
    assert torch.equal(words_of(IDENTITIES, seed, stream), random_words(seed, IDENTITIES, stream, 8))


@of_triton
@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_is_tritons_own_generator(seed):
    """At any counter, and with both halves of the key."""
    counters = torch.randint(2**32, (4, 64), generator=torch.Generator().manual_seed(0))
    out, key = torch.empty(4, 64, dtype=torch.int64, device=DEVICE), torch.tensor([seed])
    tritons_kernel[(1,)](out, counters.to(DEVICE), key.to(DEVICE), SIZE=64)
    wanted = reference.philox(tuple(counters), (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF))
    assert torch.equal(out.cpu(), torch.stack(wanted))


@of_triton
def test_radius_and_circle_are_as_exact_as_they_say():
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

"""The counter-based generator: the published vectors, the same words everywhere, and the Gaussian made of them."""

import numpy as np
import pytest
import torch

from sfr_kernels import reference
from sfr_kernels.kernels.philox.torch import gaussian, random_words, to_uniform

# Random123 1.14, examples/kat_vectors, philox4x32 with 10 rounds: counter, key, output
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, -1, -(2**63), 2**63 - 1, 0x299F31D0A4093822]  # zero, both signs, and halves that are told apart
IDENTITIES = torch.tensor([0, 1, 2**32 - 1, 2**32, 5 * 2**32 + 7, 2**62 + 3, -1])  # beyond 32 bits: sample · 2³² + p


def hexadecimal(words: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(w, 16)) for w in words.split())


@pytest.mark.parametrize("counter, key, output", KNOWN)
def test_reference_gives_the_published_vectors(counter, key, output):
    assert reference.philox(hexadecimal(counter), hexadecimal(key)) == hexadecimal(output)


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_words_equal_reference_words(seed):
    blocks, block = 3, torch.arange(3)[None, :]
    for stream in (0, 1, 2, 3):
        words = random_words(seed, IDENTITIES, stream, blocks)
        expected = reference._words(seed, block, IDENTITIES[:, None], stream)
        assert torch.equal(words, torch.stack(expected, dim=2).flatten(1))
        assert torch.equal(random_words(torch.tensor([seed]), IDENTITIES, stream, blocks), words)


def test_seed_identity_stream_and_block_all_change_the_words():
    base = random_words(7, torch.tensor([3]), 0, blocks=2)
    others = [
        random_words(7 + 2**32, torch.tensor([3]), 0, blocks=2),  # only the high half of the key
        random_words(7, torch.tensor([3 + 2**32]), 0, blocks=2),  # only the high half of the identity
        random_words(7, torch.tensor([3]), 1, blocks=2),
        base.roll(4),
    ]
    assert all((base != other).all() for other in others)


def test_uniform_is_in_the_half_open_interval():
    ends = torch.tensor([0, 1, 2**32 - 1])
    for u in (to_uniform(ends), reference.uniform(ends)):
        assert u.dtype == torch.float32
        assert u.tolist() == [2.0**-33, 1.5 * 2.0**-32, 1.0]  # never 0, whose logarithm would be infinite


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 384])  # whole blocks of four lanes and every remainder
def test_gaussian_is_box_muller_of_the_words(size):
    identity = torch.arange(50) * (2**32 + 1)
    blocks = -(-size // 4)
    words = random_words(-3, identity, 0, blocks).numpy().reshape(50, blocks, 2, 2)
    u = ((words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(u[..., 0])), 2 * np.pi * u[..., 1]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(50, -1)[:, :size]
    ours, eager = gaussian(-3, identity, size), reference.gaussian_noise(-3, identity, size)
    assert ours.dtype == torch.float32 and ours.shape == (50, size)
    # 2π u is rounded at 2⁻²² and turns by that much a radius of at most √(66 ln 2)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=6.8 * 2.0**-22)
    assert torch.equal(ours, eager)


def test_moments_of_the_noise():
    x = gaussian(11, torch.arange(20_000), 50).double().numpy()
    n = x.size
    # four standard errors each: mean 1/√n, variance √(2/n), skewness √(6/n), kurtosis √(24/n)
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    # no coordinate knows another (the four lanes of a block, the block's neighbours), nor a row the next one
    among = np.corrcoef(x.T) - np.eye(50)
    assert np.abs(among).max() < 5 / 20_000**0.5
    assert abs((x[1:] * x[:-1]).mean()) < 4 / n**0.5

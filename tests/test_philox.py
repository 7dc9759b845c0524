"""The counter-based generator: the published vectors, the same words everywhere, and the Gaussian made of them."""

import importlib.util
import os
import subprocess
import sys

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


def signed(low: int, high: int) -> int:
    """Two 32-bit words as one int64."""
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("counter, key, output", KNOWN)
def test_reference_gives_the_published_vectors(counter, key, output):
    assert reference.philox(hexadecimal(counter), hexadecimal(key)) == hexadecimal(output)


@pytest.mark.parametrize("counter, key, output", KNOWN[:1])
def test_leaf_gives_the_published_vector_it_can_reach(counter, key, output):
    # its first counter word counts blocks from 0 and its last is the stream
    assert random_words(0, torch.tensor([0]), 0).flatten().tolist() == [w.item() for w in hexadecimal(output)]


@pytest.mark.parametrize("seed", SEEDS)
def test_leaf_words_equal_reference_words(seed):
    blocks = 3
    for stream in (0, 1, 2, 3):
        words = random_words(seed, IDENTITIES, stream, blocks)
        block = torch.arange(blocks)[None, :]
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


TRITON = """
import sys, torch, triton, triton.language as tl

@triton.jit
def by_offset(out_ptr, seed, offset_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    words = tl.randint4x(seed, tl.load(offset_ptr + offs, mask=offs < n, other=0))
    for lane in tl.static_range(4):
        tl.store(out_ptr + lane * n + offs, words[lane].to(tl.int64), mask=offs < n)

@triton.jit
def by_counter(out_ptr, seed, counter_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    mask = offs < n
    c0 = tl.load(counter_ptr + offs, mask=mask, other=0).to(tl.uint32)
    c1 = tl.load(counter_ptr + n + offs, mask=mask, other=0).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * n + offs, mask=mask, other=0).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * n + offs, mask=mask, other=0).to(tl.uint32)
    words = tl.philox(seed, c0, c1, c2, c3)
    for lane in tl.static_range(4):
        tl.store(out_ptr + lane * n + offs, words[lane].to(tl.int64), mask=mask)

given = torch.load(sys.argv[1])
for name, kernel in (("offsets", by_offset), ("counters", by_counter)):
    n = given[name].shape[-1]
    out = torch.empty(len(given["seeds"]), 4, n, dtype=torch.int64)
    for i, seed in enumerate(given["seeds"]):
        kernel[(1,)](out[i], seed, given[name], n, SIZE=triton.next_power_of_2(n))
    given[name] = out & 0xFFFFFFFF
torch.save(given, sys.argv[1])
"""


@pytest.fixture(scope="module")
def triton_words(tmp_path_factory):
    """What Triton's own generator makes of some offsets and counters, in its interpreter: a process of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folder = tmp_path_factory.mktemp("triton")
    script, data = folder / "kernels.py", folder / "words.pt"
    script.write_text(TRITON)
    offsets = torch.tensor([0, 1, 2, 3, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 7 * 2**32 + 2, 2**40 + 5])
    counters = torch.randint(0, 2**32, (4, 16), generator=torch.Generator().manual_seed(0))
    for lane, (counter, _, _) in enumerate(KNOWN):
        counters[:, lane] = torch.stack(hexadecimal(counter))
    torch.save(dict(seeds=SEEDS, offsets=offsets, counters=counters), data)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script, data], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(offsets=offsets, counters=counters, words=torch.load(data))


def test_reference_equals_triton_at_any_counter(triton_words):
    counters, words = triton_words["counters"], triton_words["words"]["counters"]
    for seed, expected in zip(SEEDS, words, strict=True):
        key = torch.tensor(seed) & 0xFFFFFFFF, (torch.tensor(seed) >> 32) & 0xFFFFFFFF
        assert torch.equal(torch.stack(reference.philox(tuple(counters), key)), expected)


def test_leaf_equals_triton_randint4x(triton_words):
    # randint4x has the counter (offset low, offset high, 0, 0): block, and an identity below 2³²
    for seed, expected in zip(SEEDS, triton_words["words"]["offsets"], strict=True):
        for offset, words in zip(triton_words["offsets"].tolist(), expected.T, strict=True):
            block, identity = offset & 0xFFFFFFFF, torch.tensor([offset >> 32])
            if block < 8:  # blocks are numbered from 0
                assert torch.equal(random_words(seed, identity, 0, blocks=block + 1)[0, 4 * block :], words)
            expected_here = reference._words(seed, torch.tensor([block]), identity, 0)
            assert torch.equal(torch.cat(expected_here), words)


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

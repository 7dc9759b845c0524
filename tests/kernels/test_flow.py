"""flow_path and flow_mse: the reference's noise, bit for bit up to the logarithm, and the loss on it."""

import hashlib

import pytest
import torch
from device import DEVICE, DTYPES, assert_as_good, eager, every_other, few_row_blocks, kernels

from sfr_kernels.kernels.flow import FlowPath
from sfr_kernels.kernels.philox.torch import random_words, to_uniform

SEEDS = (0, -6917529027641081857, 2**63 - 1)  # both halves of the key in use, signs included


def make_path(n, d, dtype=torch.float32, seed=SEEDS[1], source_std=0.7, strided=False, anchors=3) -> FlowPath:
    g = torch.Generator().manual_seed(0)
    targets = torch.randn(anchors, 2 * d if strided else d, generator=g).to(dtype)
    targets = targets[:, ::2] if strided else targets
    anchor, index = (torch.randint(k, (n,), generator=g, dtype=torch.int32) for k in (anchors, 5))
    identity = torch.randint(2**62, (n,), generator=g)
    times = torch.rand(5, generator=g)
    return moved(FlowPath(targets, times, identity, anchor, index, torch.tensor([seed]), 1.9, source_std), DEVICE)


def moved(path: FlowPath, device: str) -> FlowPath:
    return FlowPath(*(v.to(device) if torch.is_tensor(v) else v for v in path))


def exact_ends(path: FlowPath):
    """x_0 and x_1 in float64, the noise from the uniform numbers as float32 has them."""
    path = moved(path, "cpu")
    size = path.targets.shape[1]
    u = to_uniform(random_words(path.seed, path.noise_id, 0, -(-size // 4))).double().unflatten(1, (-1, 2))
    radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * torch.pi * u[..., 1]
    noise = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)[:, :size]
    return path.source_std * noise, path.target_scale * path.targets.double()[path.anchor.long()]


# d: below, at and above whole Philox blocks of four; not a power of two; more than one block of columns
@pytest.mark.parametrize("n, d", [(5, 1), (4, 6), (3, 64), (7, 384), (2, 2500)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flow_path(n, d, dtype):
    for path in (make_path(n, d), make_path(n, d, torch.float16, seed=SEEDS[2], strided=True)):
        x_0, x_1 = exact_ends(path)
        t = path.times.cpu().double()[path.time_index.cpu().long()].unsqueeze(1)
        exact = (1 - t) * x_0 + t * x_1, x_1 - x_0
        found, theirs = kernels.flow_path(path, dtype), eager.flow_path(moved(path, "cpu"), dtype)
        for mine, other, wanted in zip(found, theirs, exact, strict=True):
            assert mine.dtype == dtype and mine.shape == (n, d)
            assert_as_good(mine, other, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d", [(1, 3), (9, 384), (2, 2500)])  # 2500: two blocks of columns
def test_flow_mse(n, d, dtype, monkeypatch):
    g = torch.Generator().manual_seed(1)
    v, u = torch.randn(2, n, d, generator=g).to(dtype)
    coefficient = torch.randn(n, generator=g)
    e = v.double() - u.double()
    dv = e * coefficient.double().unsqueeze(1) * 2 / d
    theirs = v.clone()
    loss, db = eager.flow_mse(theirs, u, coefficient)
    few_row_blocks(monkeypatch)
    on_device = v.to(DEVICE, copy=True)
    for mine in (on_device, on_device.T.clone().T, torch.cat([on_device, on_device], 1)[:, d:]):  # strided twice
        only, nothing = kernels.flow_mse(mine, u.to(DEVICE))
        assert nothing is None and torch.equal(mine.cpu(), v)
        found = kernels.flow_mse(mine, u.to(DEVICE), coefficient.to(DEVICE))
        assert torch.equal(only, found[0]) and found[0].shape == (n,) and found[1].shape == (d,)
        assert_as_good(found[0], loss, e.square().mean(1))
        assert_as_good(found[1], db, dv.sum(0))
        assert_as_good(mine, theirs, dv)


def test_noise_has_the_same_bits_everywhere():
    """x_t of a case without random inputs: what the interpreter makes is what every GPU has to make."""
    n, d = 40, 384
    targets = (torch.arange(3 * d).view(3, d) * 37 % 101 - 50) / 64
    row = torch.arange(n)
    identity = row * 1234567891011 + 2**33
    times, seed = torch.tensor([0.0, 0.25, 0.9]), torch.tensor(SEEDS[1:2])
    path = FlowPath(targets, times, identity, (row % 3).int(), (row // 3 % 3).int(), seed, 2.0, 0.5)
    x_t = kernels.flow_path(moved(path, DEVICE), torch.float32)[0].cpu()
    digest = hashlib.sha256(x_t.numpy().tobytes()).hexdigest()
    assert digest[:16] == "1d13ad4f382367a8", x_t[0, :8].tolist()


def test_strided_vectors():
    path = make_path(6, 10)
    names = ("times", "noise_id", "anchor", "time_index")
    loose = path._replace(**{name: every_other(getattr(path, name)) for name in names})
    assert all(getattr(loose, name).stride() == (2,) for name in names)
    (x_t, u), others = (kernels.flow_path(p, torch.float32) for p in (path, loose))
    assert torch.equal(x_t, others[0]) and torch.equal(u, others[1])
    v, coefficient = torch.randn(2, 6, 10, device=DEVICE), torch.rand(6, device=DEVICE)
    v[1] = v[0]
    losses = [kernels.flow_mse(v[0], u, coefficient), kernels.flow_mse(v[1], every_other(u), every_other(coefficient))]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True)) and torch.equal(v[0], v[1])


def test_no_rows():
    path = make_path(0, 6)
    x_t, u = kernels.flow_path(path, torch.float32)
    assert x_t.shape == u.shape == (0, 6)
    loss, db = kernels.flow_mse(torch.empty(0, 6, device=DEVICE), u, torch.empty(0, device=DEVICE))
    assert loss.shape == (0,) and torch.equal(db.cpu(), torch.zeros(6))

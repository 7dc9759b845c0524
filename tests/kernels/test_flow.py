"""flow_path and flow_mse: the reference's noise, bit for bit up to the logarithm, and the loss on it."""

import hashlib
from dataclasses import replace

import pytest
import torch
from device import DEVICE, DTYPES, assert_as_good, error, kernels, sums

from sfr_kernels.kernels.backend import kernels_of

eager = kernels_of("torch")

from sfr_kernels.kernels.flow import FlowPath
from sfr_kernels.kernels.philox.torch import random_words, to_uniform

SEEDS = (0, -6917529027641081857, 2**63 - 1)  # both halves of the key in use, signs included


def make_path(n, d, dtype=torch.float32, seed=SEEDS[1], source_std=0.7, strided=False, anchors=3) -> FlowPath:
    g = torch.Generator().manual_seed(0)
    targets = torch.randn(anchors, 2 * d if strided else d, generator=g).to(dtype)
    targets = targets[:, ::2] if strided else targets
    anchor, index = (torch.randint(k, (n,), generator=g, dtype=torch.int32) for k in (anchors, 5))
    identity = torch.randint(2**62, (n,), generator=g)
    tensors = (targets, torch.rand(5, generator=g), identity, anchor, index, torch.tensor([seed]))
    return FlowPath(*(t.to(DEVICE) for t in tensors), 1.9, source_std)


def on_cpu(path: FlowPath, dtype=None) -> FlowPath:
    values = [v.cpu() if isinstance(v, torch.Tensor) else v for v in vars(path).values()]
    return FlowPath(values[0].to(dtype or values[0].dtype), *values[1:])


def exact_ends(path: FlowPath):
    """x_0 and x_1 in float64, the noise from the uniform numbers as float32 has them."""
    path = on_cpu(path)
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
        for found, theirs, wanted in zip(
            kernels.flow_path(path, dtype), eager.flow_path(on_cpu(path), dtype), exact, strict=True
        ):
            assert found.dtype == dtype and found.shape == (n, d)
            assert_as_good(found, theirs, wanted)


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
    monkeypatch.setattr(sums, "MAX_PARTS", 4)  # nine rows: three programs of three
    on_device = v.to(DEVICE, copy=True)
    for mine in (on_device, on_device.T.clone().T, torch.cat([on_device, on_device], 1)[:, d:]):  # strided twice
        only, nothing = kernels.flow_mse(mine, u.to(DEVICE))
        assert nothing is None and torch.equal(mine.cpu(), v)
        found = kernels.flow_mse(mine, u.to(DEVICE), coefficient.to(DEVICE))
        assert torch.equal(only, found[0]) and found[0].shape == (n,) and found[1].shape == (d,)
        for ours, eagers, exact in (
            (found[0], loss, e.square().mean(1)),
            (found[1], db, dv.sum(0)),
            (mine, theirs, dv),
        ):
            assert_as_good(ours, eagers, exact)


def test_noise_has_the_same_bits_everywhere():
    """x_t of a case without random inputs: what the interpreter makes is what every GPU has to make."""
    n, d = 40, 384
    targets = (torch.arange(3 * d).view(3, d) * 37 % 101 - 50) / 64
    row = torch.arange(n)
    identity = row * 1234567891011 + 2**33
    times, seed = torch.tensor([0.0, 0.25, 0.9]), torch.tensor(SEEDS[1:2])
    path = FlowPath(targets, times, identity, (row % 3).int(), (row // 3 % 3).int(), seed, 2.0, 0.5)
    path = FlowPath(*(v.to(DEVICE) if torch.is_tensor(v) else v for v in vars(path).values()))
    x_t = kernels.flow_path(path, torch.float32)[0].cpu()
    digest = hashlib.sha256(x_t.numpy().tobytes()).hexdigest()
    assert digest[:16] == "1d13ad4f382367a8", x_t[0, :8].tolist()


def every_other(t: torch.Tensor) -> torch.Tensor:
    """The same values, with a gap behind each."""
    return torch.stack([t, torch.zeros_like(t)], dim=-1).flatten(-2)[..., ::2]


def test_strided_vectors():
    path = make_path(6, 10)
    names = ("times", "noise_id", "anchor", "time_index")
    loose = replace(path, **{name: every_other(getattr(path, name)) for name in names})
    assert all(getattr(loose, name).stride() == (2,) for name in names)
    (x_t, u), others = (kernels.flow_path(p, torch.float32) for p in (path, loose))
    assert torch.equal(x_t, others[0]) and torch.equal(u, others[1])
    v, coefficient = torch.randn(2, 6, 10, device=DEVICE), torch.rand(6, device=DEVICE)
    v[1] = v[0]
    losses = [kernels.flow_mse(v[0], u, coefficient), kernels.flow_mse(v[1], every_other(u), every_other(coefficient))]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True)) and torch.equal(v[0], v[1])
    for function in (
        lambda p: kernels.stratified_times(p.noise_id, p.seed, 7)[1],
        lambda p: kernels.sequence_times(p.noise_id, p.seed),
        lambda p: kernels.sinusoid(p.times, 6, 10.0, torch.float32),
    ):
        assert torch.equal(function(loose), function(path))
    one = torch.tensor(0.3, device=DEVICE).expand(4)
    assert torch.equal(
        kernels.sinusoid(one, 6, 10.0, torch.float32)[3], kernels.sinusoid(one[:1], 6, 10.0, torch.float32)[0]
    )


def test_no_rows():
    path = make_path(0, 6)
    x_t, u = kernels.flow_path(path, torch.float32)
    assert x_t.shape == u.shape == (0, 6)
    loss, db = kernels.flow_mse(torch.empty(0, 6, device=DEVICE), u, torch.empty(0, device=DEVICE))
    assert loss.shape == (0,) and torch.equal(db.cpu(), torch.zeros(6))


@pytest.mark.parametrize("num_times", [1, 7, 256])
@pytest.mark.parametrize("n", [0, 3, 300])
def test_times_are_those_of_the_reference(n, num_times):
    seed = torch.tensor([SEEDS[1]])
    identity = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(n))
    for found, wanted in zip(
        kernels.stratified_times(identity.to(DEVICE), seed.to(DEVICE), num_times),
        eager.stratified_times(identity, seed, num_times),
        strict=True,
    ):
        assert found.dtype == wanted.dtype and torch.equal(found.cpu(), wanted)
    found = kernels.sequence_times(identity.to(DEVICE), seed.to(DEVICE))
    assert torch.equal(found.cpu(), eager.sequence_times(identity, seed))


@pytest.mark.parametrize("size", [1, 2, 3, 34, 384, 1030])  # one frequency, odd ones, more than one block
def test_sinusoid(size):
    times = torch.cat([torch.tensor([0.0, 1.0]), torch.rand(6, generator=torch.Generator().manual_seed(0))])
    exact = eager.sinusoid(times.double(), size, 1000.0, torch.float64)
    found = kernels.sinusoid(times.to(DEVICE), size, 1000.0, torch.float32)
    # the angle is taken in float64 here: closer than float32, where a thousand radians cost four digits
    assert error(found, exact) <= 2.0**-22 * max(1.0, exact.norm().item())

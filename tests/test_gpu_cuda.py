"""The kernels of csrc/ on NVIDIA GPUs: clusters, another device, another stream, and what they cost to launch."""

import pytest
import torch
from test_gpu import CONFIG, inputs, loss_and_leaves

from sfr_kernels import flow_matching_loss
from sfr_kernels.kernels.backend import unavailable
from sfr_kernels.kernels.softmax_xent import softmax_xent
from sfr_kernels.kernels.softmax_xent.cuda import cluster_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(unavailable("cuda") is not None, reason=f"cuda: {unavailable('cuda')}"),
]
OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)


def losses(device: str) -> list[torch.Tensor]:
    loss, leaves = loss_and_leaves(inputs(torch.bfloat16, device), backend="cuda")
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device_while_the_first_is_current():
    first, second = map(losses, ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in second)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


def test_a_side_stream_is_the_one_that_is_worked_on():
    """A kernel that went to another stream would read the logits before they are there."""
    source = torch.randn(2048, 32768, device="cuda")
    labels = torch.zeros(2048, dtype=torch.int64, device="cuda")
    wanted, _ = softmax_xent("torch", source.clone(), labels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for cluster in sorted({0, cluster_for(source)}):
        with torch.cuda.stream(side):
            logits = torch.full_like(source, torch.nan)
            torch.cuda._sleep(10**8)
            logits.copy_(source)
            loss, _ = softmax_xent("cuda", logits, labels, cluster=cluster)
            found = loss.clone()
        side.synchronize()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_side_stream_gives_the_same_bits():
    wanted = losses("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = losses("cuda")
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(OLD, reason="needs clusters (sm_90)")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 256000])
def test_rows_held_by_clusters(vocab, dtype):
    """Many more rows than clusters, at the sizes of real vocabularies; some rows wider than eight blocks hold."""
    g = torch.Generator("cuda").manual_seed(0)
    wide = (3 * torch.randn(300, -(-vocab // 64) * 64, device="cuda", generator=g)).to(dtype)
    logits = wide[:, :vocab]
    labels = torch.randint(vocab, (300,), device="cuda", generator=g)
    cluster = cluster_for(logits)
    assert cluster or logits[0].nbytes > 2**19
    exact, mine, theirs = logits.double(), wide.clone()[:, :vocab], logits.clone()
    (wanted, _), (eager_loss, _) = (softmax_xent("torch", x, labels) for x in (exact, theirs))
    loss, _ = softmax_xent("cuda", mine, labels)
    for ours, other, true in ((loss, eager_loss, wanted), (mine, theirs, exact)):
        assert (ours.double() - true).norm() <= 1.5 * (other.double() - true).norm() + 2.0**-22 * true.norm()
    again = wide.clone()[:, :vocab]
    repeated, _ = softmax_xent("cuda", again, labels)
    assert torch.equal(loss, repeated) and torch.equal(mine, again)


def test_no_triton_kernel_is_launched():
    hidden, _, head, rows, targets = inputs(torch.bfloat16, "cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        flow_matching_loss(hidden, head, rows, targets, seed=1, config=CONFIG, backend="cuda").backward()
        torch.cuda.synchronize()
    names = {event.name for event in record.events()}
    assert any("sfr::" in name for name in names), names
    assert not any(name.endswith("_kernel") and "::" not in name for name in names), names  # as Triton's are called

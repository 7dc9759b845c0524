"""On an NVIDIA GPU: no waiting for the device, graphs, compilation, memory, and sizes past 2³¹.

Values and gradients are judged in test_gpu_errors.py, those of each kernel in tests/kernels.
"""

from dataclasses import replace

import pytest
import torch
from cases import SEED

from sfr_kernels import SFRConfig, SupervisedRows, VelocityHead, flow_matching_loss, linear_cross_entropy, sfr_loss
from sfr_kernels.kernels.backend import kernels_of, unavailable
from sfr_kernels.kernels.flow import FlowPath

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

KERNELS = [b for b in ("triton", "cuda") if unavailable(b) is None]
CONFIG = SFRConfig(width=48, stride=8, min_tokens=4, segment_tokens=16)
H, V, D = 72, 331, 34


def inputs(dtype, device, batch=4, length=60, hidden_size=H, vocab=V, target_size=D, config=CONFIG):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(vocab, (batch, length), generator=generator)
    labels[:, : length // 4] = -100
    labels[batch // 2, length // 2 :] = -100
    rows = SupervisedRows.from_labels(labels, config)
    shapes = (batch, length, hidden_size), (vocab, hidden_size)
    hidden, weight = (torch.randn(s, generator=generator) / 3 for s in shapes)
    targets = torch.nn.functional.normalize(torch.randn(rows.num_anchors, target_size, generator=generator), dim=1)
    torch.manual_seed(0)
    head = VelocityHead.from_config(config, hidden_size, None if config.loss == "mtp" else target_size)
    torch.nn.init.normal_(head.output_proj.weight, std=0.1)
    leaves = [t.to(device, dtype).requires_grad_() for t in (hidden, weight)]
    return *leaves, head.to(device, dtype), rows.to(device), targets.to(device)


@pytest.mark.parametrize("backend", [*KERNELS, "torch"])
@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "mtp"])
def test_a_step_never_waits_for_the_device(loss, backend):
    config = replace(CONFIG, loss=loss, mtp_tokens=2)
    hidden, weight, head, rows, targets = inputs(torch.float32, "cuda", config=config)
    targets = rows.labels if loss == "mtp" else targets
    options = dict(config=config, backend=backend)
    for step in range(2):  # the first compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            sfr_loss(hidden, weight, head, rows, targets, seed=step, **options).loss.backward()
            on_cpu = dict(seed=torch.tensor([step]), normalizer=torch.tensor(20.0))
            sfr_loss(hidden, weight, head, rows, targets, **on_cpu, **options).loss.backward()
            linear_cross_entropy(hidden, weight, rows, backend=backend).backward()
            if loss != "mtp":
                flow_matching_loss(hidden, head, rows, targets, seed=step, **options).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_rows_of_the_collator_come_without_a_wait():
    rows = SupervisedRows.from_labels(torch.randint(V, (4, 60)), CONFIG).pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows.to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", KERNELS)
def test_a_captured_graph_draws_fresh_noise_at_each_replay(backend):
    hidden, _, head, rows, targets = inputs(torch.bfloat16, "cuda")
    seed, normalizer = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.tensor(50.0, device="cuda")
    wanted = [hidden, *head.parameters()]

    def step():
        options = dict(seed=seed, config=CONFIG, normalizer=normalizer, backend=backend)
        loss = flow_matching_loss(hidden, head, rows, targets, **options)
        return loss, torch.autograd.grad(loss, wanted)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grads = step()
    found = []
    for value in (5, 6, 5):
        seed.fill_(value)
        graph.replay()
        found.append([loss.clone(), *(g.clone() for g in grads)])
        exact = step()
        assert torch.equal(found[-1][0], exact[0])
        assert all(torch.equal(a, b) for a, b in zip(found[-1][1:], exact[1], strict=True))
    assert found[0][0] != found[1][0] and torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic):
    def step(hidden, weight, head, rows, targets, seed):
        return sfr_loss(hidden, weight, head, rows, targets, seed=seed, config=CONFIG).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for length in (60, 68):
        results = []
        for function in (step, compiled):
            arguments = inputs(torch.bfloat16, "cuda", length=length)
            loss = function(*arguments, torch.tensor([length], device="cuda"))
            grads = torch.autograd.grad(loss, [*arguments[:2], *arguments[2].parameters()])
            results.append([loss.detach(), *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


def loss_and_leaves(arguments, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    hidden, weight, head, *_ = arguments
    return sfr_loss(*arguments, seed=3, config=CONFIG, **options).loss, [hidden, weight, *head.parameters()]


def test_a_second_backward_and_an_upstream_gradient():
    loss, leaves = loss_and_leaves(inputs(torch.bfloat16, "cuda"))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    fourfold = torch.autograd.grad(loss, leaves, torch.full_like(loss, 4.0), retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(4 * a, b) for a, b in zip(first, fourfold, strict=True))  # a power of two rounds nothing


@pytest.mark.parametrize("needed", range(1, 8))
def test_every_combination_of_gradients_wanted(needed):
    arguments = inputs(torch.bfloat16, "cuda")
    loss, leaves = loss_and_leaves(arguments)
    full = torch.autograd.grad(loss, leaves)
    for k, t in enumerate(leaves):
        t.requires_grad_(bool(needed >> min(k, 2) & 1))
    wanted = [(t, g) for t, g in zip(leaves, full, strict=True) if t.requires_grad]
    found = torch.autograd.grad(loss_and_leaves(arguments)[0], [t for t, _ in wanted])
    for mine, (_, grad) in zip(found, wanted, strict=True):
        # another choice of GEMM may round another way
        torch.testing.assert_close(mine, grad, rtol=2e-2, atol=1e-2 * grad.abs().max().item())
    with torch.no_grad():
        assert not loss_and_leaves(arguments)[0].requires_grad


def needs(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_past_two_to_the_31(backend, large):
    """The last rows of a large tensor are those of a small one with the same identities."""
    needs(24)
    kernels = kernels_of(backend)
    n, d, last = 2**21 + 2**12, 1024, 64  # n · d = 2³¹ + 2²²
    device = torch.device("cuda")
    zeros = torch.zeros(n, dtype=torch.int32, device=device)
    identity = torch.arange(n, device=device)
    targets, times = torch.randn(1, d, device=device), torch.tensor([0.3], device=device)
    path = FlowPath(targets, times, identity, zeros, zeros, torch.tensor([SEED], device=device), 2.0, 1.0)
    tail = path._replace(noise_id=identity[-last:], anchor=zeros[-last:], time_index=zeros[-last:])
    x_t, u = kernels.flow_path(path, torch.bfloat16)
    ends = kernels.flow_path(tail, torch.bfloat16)
    assert all(torch.equal(whole[-last:], end) for whole, end in zip((x_t, u), ends, strict=True))

    gamma, beta = torch.randn(2, d, device=device)
    small = x_t[-last:].clone()
    out, mean, rstd = kernels.norm_act(x_t, gamma, beta, residual=x_t)
    wanted, small_mean, small_rstd = kernels.norm_act(small, gamma, beta, residual=small)
    assert torch.equal(out[-last:], wanted)
    dy, *_ = kernels.norm_act_backward(out, x_t, gamma, beta, mean, rstd, dy=out)
    assert torch.equal(dy[-last:], kernels.norm_act_backward(wanted, small, gamma, beta, small_mean, small_rstd)[0])

    coefficient = torch.rand(n, device=device)
    loss, _ = kernels.flow_mse(x_t, u, coefficient)
    small_loss, _ = kernels.flow_mse(small, ends[1], coefficient[-last:])
    assert torch.equal(loss[-last:], small_loss) and torch.equal(x_t[-last:], small)
    factor = torch.tensor(0.5, device=device)
    token_row = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=device)  # reversed
    scattered = kernels.scatter_rows(x_t, factor, token_row, torch.bfloat16)
    assert torch.equal(scattered[-1], x_t[0] * 0.5) and torch.equal(scattered[0], x_t[-1] * 0.5)

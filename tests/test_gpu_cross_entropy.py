"""On an NVIDIA GPU: the cross-entropy of a linear layer at its size, its memory, its checks and its process groups."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from cases import make_case, small_config
from test_gpu import KERNELS, needs

from benchmarks.timing import allocated
from sfr_kernels import SupervisedRows, linear_cross_entropy
from sfr_kernels.kernels.softmax_xent import softmax_xent

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("backend", KERNELS)
def test_a_call_with_more_than_two_to_the_31_logits_at_once(backend, large):
    """The last rows of a large call are those of a small one."""
    needs(16)
    n, vocab, last = 17000, 128256, 8
    g = torch.Generator("cuda").manual_seed(0)
    labels = torch.randint(vocab, (n,), device="cuda", generator=g)
    logits = torch.randn(n, vocab, dtype=torch.bfloat16, device="cuda", generator=g)
    small = logits[-last:].clone()
    (loss, _), (wanted, _) = (softmax_xent(backend, z, labels[-len(z) :]) for z in (logits, small))
    assert torch.equal(loss[-last:], wanted) and torch.equal(logits[-last:], small)
    del logits
    hidden = torch.randn(n, 64, dtype=torch.bfloat16, device="cuda", generator=g)
    weight = torch.randn(vocab, 64, dtype=torch.bfloat16, device="cuda", generator=g) / 8
    results = []
    for rows in (slice(None), slice(n - last, None)):
        h = hidden[rows].clone().requires_grad_()
        loss = linear_cross_entropy(h, weight, labels[rows], reduction="none", chunk_rows=n, backend=backend)
        (grad,) = torch.autograd.grad(loss.sum(), h)
        results.append((loss[-last:].detach(), grad[-last:]))
    for found, alone in zip(*results, strict=True):  # cuBLAS may take another kernel for another shape
        torch.testing.assert_close(found.float(), alone.float(), rtol=2e-2, atol=2e-2)


# Options, a frozen head or not, and the most bytes beyond the returned gradients, in units of the weight's own.
MEMORY = {
    "trained, one chunk": ({}, False, 4096, 2.5),
    "trained, chunks": ({}, False, 6000, 2.5),
    "frozen": ({}, True, 4096, 0.5),
    "small": (dict(chunk_rows=256, accum_dtype=torch.bfloat16), False, 6000, 0.3),
    "row losses": (dict(reduction="none"), False, 6000, 2.5),
}


@pytest.mark.parametrize("options, frozen, n, most", MEMORY.values(), ids=MEMORY.keys())
def test_peak_memory_in_units_of_the_weight(options, frozen, n, most):
    hidden_size, vocab = 2048, 65536
    hidden = torch.randn(n, hidden_size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(vocab, hidden_size, dtype=torch.bfloat16, device="cuda") / 45
    weight.requires_grad_(not frozen)
    labels = torch.randint(vocab, (n,), device="cuda")
    labels[: n // 4] = -100
    wanted = [t for t in (hidden, weight) if t.requires_grad]

    def run():
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, **options).sum(), wanted)

    run()  # workspaces of cuBLAS
    _, peak, grads = allocated(run, weight.device)
    given = sum(g.numel() * g.element_size() for g in grads)
    unit = weight.numel() * weight.element_size()
    assert peak - given <= most * unit, f"{(peak - given) / unit:.2f} units"


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_little_memory_costs_a_rounding_for_every_chunk(backend):
    hidden, weight = torch.randn(600, 256, device="cuda"), torch.randn(4096, 256, device="cuda") / 16
    labels = torch.randint(4096, (600,), device="cuda")
    found = []
    for dtype, options in ((torch.float64, {}), (torch.bfloat16, {}), (torch.bfloat16, MEMORY["small"][0])):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (hidden, weight)]
        of = "reference" if dtype == torch.float64 else backend
        loss = linear_cross_entropy(*leaves, labels, backend=of, **options)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for exact, whole, little in zip(*found, strict=True):
        error, bound = ((t.double() - exact).norm() for t in (little, whole))
        assert error <= 3 * bound + 2**-8 * exact.norm() / 8


def test_a_label_outside_the_vocabulary():
    hidden = torch.randn(4, 8, device="cuda")
    weight, labels = torch.randn(16, 8, device="cuda"), torch.tensor([0, 1, 16, -100], device="cuda")
    with pytest.raises(ValueError, match="got 16"):
        linear_cross_entropy(hidden, weight, labels, debug=True)
    # without debug the device itself stops, and with it the process
    script = (
        "import torch; from sfr_kernels import linear_cross_entropy\n"
        "hidden, weight = torch.randn(4, 8, device='cuda'), torch.randn(16, 8, device='cuda')\n"
        "linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 16, -100], device='cuda')).item()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "assert" in (done.stdout + done.stderr).lower()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_process_of_a_group_has_the_whole_vocabulary(backend, tmp_path):
    case = make_case(small_config())
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        results = []
        for options in (dict(process_group=dist.group.WORLD), {}):
            hidden, weight = (t.to("cuda", torch.float32).requires_grad_() for t in (case.hidden, case.weight))
            labels = case.labels.cuda()
            options |= dict(shift=True, label_smoothing=0.1, return_stats=True, backend=backend)
            loss, stats = linear_cross_entropy(hidden, weight, labels, **options)
            results.append([loss.detach(), *torch.autograd.grad(loss, [hidden, weight]), *stats])
        for mine, wanted in zip(*results, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_by_labels_and_by_rows(dtype):
    """With the backend that `auto` takes."""
    case = make_case(small_config())
    hidden, weight = (t.to("cuda", dtype).requires_grad_() for t in (case.hidden, case.weight))
    loss = linear_cross_entropy(hidden, weight, case.labels.cuda(), shift=True)
    loss.backward()
    by_rows = linear_cross_entropy(hidden, weight, SupervisedRows.from_labels(case.labels).to("cuda"))
    torch.testing.assert_close(by_rows, loss, rtol=1e-6, atol=0)
    wanted = linear_cross_entropy(case.hidden, case.weight, case.labels, shift=True)
    torch.testing.assert_close(loss.cpu().double(), wanted, rtol=2e-2, atol=1e-3)

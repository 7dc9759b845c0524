"""The torch backend on an NVIDIA GPU: values, gradients, and no waiting for the device."""

import pytest
import torch

from sfr_kernels import SFRConfig, SupervisedRows, VelocityHead, sfr_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CONFIG = SFRConfig(width=48, stride=8, min_tokens=4, segment_tokens=16)
H, V, D = 72, 331, 34


def inputs(dtype, device):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (4, 60), generator=generator)
    labels[:, :17] = labels[2] = -100
    rows = SupervisedRows.from_labels(labels, CONFIG)
    hidden, weight = (torch.randn(s, generator=generator) / 3 for s in ((4, 60, H), (V, H)))
    targets = torch.nn.functional.normalize(torch.randn(rows.num_anchors, D, generator=generator), dim=1)
    torch.manual_seed(0)
    head = VelocityHead.from_config(CONFIG, H, D)
    torch.nn.init.normal_(head.output_proj.weight, std=0.1)
    leaves = [t.to(device, dtype).requires_grad_() for t in (hidden, weight)]
    return *leaves, head.to(device, dtype), rows.to(device), targets.to(device)


def gradients(dtype, device, backend):
    hidden, weight, head, rows, targets = inputs(dtype, device)
    out = sfr_loss(hidden, weight, head, rows, targets, seed=3, config=CONFIG, backend=backend)
    out.loss.backward()
    return [
        t.detach().double().cpu() for t in (out.loss, hidden.grad, weight.grad, *(p.grad for p in head.parameters()))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_further_from_float64_than_eager_torch(dtype):
    """The composites may err half again as much as the reference run in the same dtype on the same device."""
    exact = gradients(torch.float64, "cpu", "reference")
    eager_run, our_run = (gradients(dtype, "cuda", backend) for backend in ("reference", "torch"))
    for wanted, eager, ours in zip(exact, eager_run, our_run, strict=True):
        floor = 2e-6 * wanted.abs().max()
        assert (ours - wanted).norm() <= 1.5 * (eager - wanted).norm() + floor


def test_a_step_never_waits_for_the_device():
    hidden, weight, head, rows, targets = inputs(torch.float32, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sfr_loss(hidden, weight, head, rows, targets, seed=3, config=CONFIG).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""What the flow loss keeps alive, by the allocator's own account, which a CPU keeps as well as a GPU does."""

import pytest
import torch
import triton
from cases import make_case, small_config
from device import BACKEND, DEVICE, ON_GPU, sums

from benchmarks.timing import allocated
from sfr_kernels import flow_matching_loss


@pytest.mark.skipif(
    BACKEND == "triton" and not ON_GPU and not triton.__version__.startswith("3.6."),
    reason="later interpreters allocate tensors of their own",
)
@pytest.mark.parametrize("num_layers", [2, 3])
def test_forward_leaves_gradients_alone_and_needs_eight_buffers(num_layers, monkeypatch):
    monkeypatch.setattr(sums, "MAX_PARTS", 4)  # as few beside these rows as 512 beside thousands
    labels = torch.randint(17, (2, 60), generator=torch.Generator().manual_seed(0))
    labels[:, :20] = -100
    width, hidden_size = 64, 256
    # one time, since the interpreter keeps arguments of its last launches, and those of times are 4 M d numbers
    config = small_config(width=width, num_layers=num_layers, num_times=1)
    case = make_case(config, labels=labels, hidden_size=hidden_size, target_size=width)
    dtype = torch.float32  # the CPU converts 16-bit factors in buffers of its own
    hidden = case.hidden.to(DEVICE, dtype).requires_grad_()
    head, rows, targets = case.head.to(DEVICE, dtype), case.rows.to(DEVICE), case.targets.to(DEVICE)
    n = rows.num_flow
    dh = n * hidden_size * dtype.itemsize
    parameters = sum(p.numel() * (dtype.itemsize if p.dim() == 2 else 4) for p in head.parameters())

    def call():
        return flow_matching_loss(hidden, head, rows, targets, seed=1, config=config, backend=BACKEND)

    if ON_GPU:
        call()  # whatever cuBLAS makes once
    kept, peak, loss = allocated(call, torch.device(DEVICE))
    buffer = n * width * dtype.itemsize
    small = 4 * 2**10  # statistics, times and the like
    assert loss.requires_grad
    assert dh + parameters <= kept <= dh + parameters + small, "more than the gradients is alive after forward"
    assert peak <= dh + parameters + 8 * buffer

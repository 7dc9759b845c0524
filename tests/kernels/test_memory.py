"""What the flow loss keeps alive, by the allocator's own account, which a CPU keeps as well as a GPU does."""

import pytest
import torch
import triton
from cases import make_case, small_config
from device import BACKEND, DEVICE, ON_GPU, few_row_blocks
from marks import long

from benchmarks.timing import allocated
from sfr_kernels import flow_matching_loss

# Length, width and hidden size; in 16 bit the CPU would convert factors in buffers of its own. On the CPU one time,
# since the interpreter keeps arguments of its last launches, and those of times are 4 M d numbers. Beside the gradients
# and the buffers: statistics, times and the like.
if ON_GPU:
    (LENGTH, WIDTH, HIDDEN), DTYPE, NUM_TIMES, SMALL = (2048, 1024, 2048), torch.bfloat16, 256, 2**20
else:
    (LENGTH, WIDTH, HIDDEN), DTYPE, NUM_TIMES, SMALL = (60, 64, 256), torch.float32, 1, 4 * 2**10


@pytest.mark.skipif(
    BACKEND == "triton" and not ON_GPU and not triton.__version__.startswith("3.6."),
    reason="later interpreters allocate tensors of their own",
)
@pytest.mark.parametrize("num_layers", [2, *long(3)])
def test_forward_leaves_gradients_alone_and_needs_eight_buffers_and_the_normalised_rows(num_layers, monkeypatch):
    if not ON_GPU:
        few_row_blocks(monkeypatch)  # as few beside these rows as hundreds beside thousands
    labels = torch.randint(17, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    labels[:, : LENGTH // 3] = -100
    config = small_config(width=WIDTH, num_layers=num_layers, num_times=NUM_TIMES)
    case = make_case(config, labels=labels, hidden_size=HIDDEN, target_size=WIDTH)
    hidden = case.hidden.to(DEVICE, DTYPE).requires_grad_()
    head, rows, targets = case.head.to(DEVICE, DTYPE), case.rows.to(DEVICE), case.targets.to(DEVICE)
    dh = rows.num_flow * HIDDEN * DTYPE.itemsize
    parameters = sum(p.numel() * (DTYPE.itemsize if p.dim() == 2 else 4) for p in head.parameters())

    def call():
        return flow_matching_loss(hidden, head, rows, targets, seed=1, config=config, backend=BACKEND)

    if ON_GPU:
        call()  # whatever cuBLAS makes once
    kept, peak, loss = allocated(call, torch.device(DEVICE))
    assert loss.requires_grad
    assert dh <= kept <= dh + parameters + SMALL, "more than the gradients is alive after forward"
    normalised = dh  # of the same size
    assert peak <= dh + normalised + parameters + 8 * rows.num_flow * WIDTH * DTYPE.itemsize

"""With odd V, H, d and D no product sees a row that does not start on 16 bytes, in any dtype."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sfr_kernels import SFRConfig, SupervisedRows, VelocityHead, flow_matching_loss, linear_cross_entropy, sfr_loss
from sfr_kernels.kernels import empty_rows
from sfr_kernels.ops.velocity_head import _velocity_head, velocity_head_backward

V, H, D, SIZE = 331, 37, 51, 13
PRODUCTS = (torch.mm, torch.addmm, torch.Tensor.mm, torch.Tensor.addmm_, torch.Tensor.__matmul__)


class Products(TorchFunctionMode):
    """Notes every matrix that goes into a product, or out of it."""

    def __init__(self):
        self.strides = []
        super().__init__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in PRODUCTS:
            for x in (*args, *(kwargs or {}).values(), out):
                if isinstance(x, Tensor) and x.dim() == 2:
                    self.strides.append((max(x.stride()) * x.element_size() % 16, x.data_ptr() % 16))
        return out


def problem(dtype):
    g = torch.Generator().manual_seed(0)
    config = SFRConfig(width=D, stride=2, min_tokens=1, segment_tokens=3, num_times=7)
    labels = torch.randint(V, (2, 12), generator=g)
    labels[:, :3] = -100
    rows = SupervisedRows.from_labels(labels, config)
    head = VelocityHead(H, SIZE, width=D).to(dtype)
    torch.nn.init.normal_(head.output_proj.weight, std=0.1, generator=g)
    hidden, weight = torch.randn(24, H, generator=g), torch.randn(V, H, generator=g) / 6
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    targets = torch.nn.functional.normalize(torch.randn(rows.num_anchors, SIZE, generator=g))
    return hidden, weight, head, rows, targets, dict(seed=0, config=config), labels.flatten()


CALLS = {
    "linear_cross_entropy": lambda h, w, head, rows, targets, more, y: linear_cross_entropy(h, w, y),
    "in chunks, float32 logits": lambda h, w, head, rows, targets, more, y: linear_cross_entropy(
        h, w, y, chunk_rows=5, logits_dtype=torch.float32
    ),
    "flow_matching_loss": lambda h, w, head, rows, targets, more, y: flow_matching_loss(h, head, rows, targets, **more),
    "sfr_loss": lambda h, w, head, rows, targets, more, y: sfr_loss(h, w, head, rows, targets, **more).loss,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", CALLS)
def test_every_product_sees_aligned_rows(call, dtype):
    arguments = problem(dtype)
    with Products() as seen:
        CALLS[call](*arguments).backward()
    assert len(seen.strides) > 8 and set(seen.strides) == {(0, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_and_so_do_those_of_the_head_alone(dtype):
    """Its operators by themselves: autograd would hide the backward from what looks on."""
    hidden, _, head, *_ = problem(dtype)
    h, params, index = hidden.detach(), [p.detach() for p in head.parameters()], torch.zeros(24, dtype=torch.int32)
    with Products() as seen:
        v, *saved = _velocity_head(
            h, torch.zeros(24, SIZE, dtype=dtype), torch.rand(2), index, params, 1.0, 1.0, True, "torch"
        )
        velocity_head_backward._init_fn(v, h, v, index, params, saved, 1.0, 1.0, True, True, "torch")
    assert len(seen.strides) > 40 and set(seen.strides) == {(0, 0)}
    assert head(torch.zeros(24, SIZE), torch.rand(24), hidden).is_contiguous()


def test_room_for_rows():
    for width, dtype, stride in (
        (50257, torch.bfloat16, 50304),
        (50264, torch.bfloat16, 50264),  # a multiple of 16 bytes needs no room between the rows
        (50257, torch.float32, 50304),
        (1, torch.float64, 64),
    ):
        x = empty_rows(3, width, dtype, torch.device("cpu"))
        assert x.shape == (3, width) and x.stride() == (stride, 1)

"""What the losses cost: multiplications, tensors, bytes and alignment, counted on the CPU."""

import pytest
import torch
from cases import IGNORE, LEAVES, LOSSES, assert_same, decoder_case, evaluate, losses, our_entropy
from operations import Operations

from benchmarks.timing import allocated
from sfr_kernels import LoRA, linear_cross_entropy
from sfr_kernels.kernels import empty_rows
from sfr_kernels.ops import chunks
from sfr_kernels.ops.autograd import Inputs, Need
from sfr_kernels.ops.chunks import LogitLoss, chunk_rows_for, product_blocks, run_chunks
from sfr_kernels.ops.numerics import product_into

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(*sizes, dtype=torch.float32, **options):
    """A decoder's labels, and leaves in `dtype`."""
    case = decoder_case(*sizes, **options)
    x = case.inputs(dtype)
    x.labels = case.labels
    return x


def test_chunk_rows_are_the_documented_function():
    bf16, fp32 = torch.bfloat16, torch.float32
    # trained head: one chunk while n · itemsize ≤ 4 H, which is n ≤ 2 H in 16 bit and n ≤ H in 32
    assert chunk_rows_for(8192, 4096, bf16, True) == 8192
    assert chunk_rows_for(4096, 4096, fp32, True) == 4096
    # beyond that equal chunks of at most 1.4 H rows
    assert chunk_rows_for(8193, 4096, bf16, True) == 4097
    assert chunk_rows_for(11469, 4096, bf16, True) == 3823
    assert chunk_rows_for(8192, 2048, bf16, True) == 2731
    assert chunk_rows_for(5735, 4096, fp32, True) == 2868
    # float16 has an accumulator in any case
    assert chunk_rows_for(8192, 4096, torch.float16, True) == 4096
    # frozen head: at most H / 2 rows
    assert chunk_rows_for(4096, 4096, bf16, False) == 2048
    assert chunk_rows_for(2049, 4096, bf16, False) == 1025
    # never fewer than 1024 without need
    assert chunk_rows_for(1000, 64, bf16, True) == 1000
    assert chunk_rows_for(2048, 64, bf16, False) == 1024
    assert chunk_rows_for(0, 64, bf16, True) == 1
    # on a CPU equal chunks of at most 512
    assert [chunk_rows_for(n, 4096, fp32, True, on_cpu=True) for n in (0, 512, 1025)] == [1, 512, 342]


PRODUCTS = {  # what needs a gradient, and how many of the three products that takes
    "everything": (("hidden", "weight"), 3),
    "frozen head": (("hidden",), 2),
    "frozen trunk": (("weight",), 2),
    "nothing": ((), 1),
}


@pytest.mark.parametrize("needed, products", PRODUCTS.values(), ids=PRODUCTS.keys())
@pytest.mark.parametrize("options", [{}, dict(return_stats=True, chunk_rows=7)])
@pytest.mark.parametrize("used", [0.0, 0.1, 1.0])
def test_only_the_products_that_are_needed_of_rows_that_are_not_ignored(needed, products, options, used):
    x = inputs((8, 32), hidden_size=16, vocab=64, used=used)
    for name in LEAVES:
        getattr(x, name).requires_grad_(name in needed)
    with Operations() as operations:
        out = linear_cross_entropy(x.hidden, x.weight, x.labels, **options)
    n = int((x.labels != IGNORE).sum())
    assert operations.flops == products * 2 * n * 16 * 64
    assert operations.made(x.weight.shape) == ("weight" in needed)
    assert (out[0] if options else out).requires_grad == bool(needed)


def test_the_joint_op_multiplies_what_its_parts_do_and_gathers_once():
    seen = []
    for name in ("cross-entropy of rows", "flow: flow, default", "sfr: flow, default"):
        case = LOSSES[name].case(length=60)
        x = case.inputs()
        with Operations() as operations:
            LOSSES[name].ours(case)(x).backward()
        seen.append(operations)
    cross_entropy, flow, joint = seen
    assert joint.flops == cross_entropy.flops + flow.flops
    n, tokens, width = len(case.rows), case.labels.numel(), case.hidden.shape[-1]
    # the gathered rows, and the one buffer of their gradients; each part alone writes the latter over the former
    assert joint.made((n, width)) == 2
    scattered = [operations.made((tokens, width)) for operations in seen]
    assert scattered == [scattered[0]] * 3  # once each


ODD = dict(length=14, vocab=251, hidden_size=37, target_size=13)


@losses("cross-entropy", "row losses", "default", "mtp", without=["cka", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_product_sees_aligned_rows(name, dtype):
    """With odd V, H, d and D no row of a matrix would start on 16 bytes by itself."""
    loss = LOSSES[name]
    case = loss.case(config=loss.config | dict(width=51), **ODD)
    options = {} if name.startswith("flow") else dict(chunk_rows=5)
    with Operations() as seen:
        loss.ours(case, **options)(case.inputs(dtype)).backward()
    assert len(seen.offsets) > 8 and set(seen.offsets) == {(0, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_product_of_an_adapter_sees_aligned_rows(dtype):
    """Of those that the operator makes; the one with A, outside, has the rows that its caller gives it."""
    h, weight, low, up = (torch.randn(size, dtype=dtype) for size in ((14, 37), (251, 37), (14, 3), (251, 3)))
    logits = LogitLoss(torch.arange(14), chunk_rows=5)
    with Operations() as seen:
        run_chunks("torch", Inputs(h, weight, None, low, up), logits, Need(True, True, True, True, True), torch.float32)
    assert len(seen.offsets) > 8 and set(seen.offsets) == {(0, 0)}


@pytest.mark.parametrize("needed", ["down", "up", "hidden", ""])
def test_an_adapter_costs_its_own_products_alone(needed):
    """And none where no gradient is asked for: A's and B's are products of rank r."""
    x = inputs((8, 32), hidden_size=16, vocab=64, used=0.5)
    x.down, x.up = torch.randn(3, 16), torch.randn(64, 3)
    for name in (*LEAVES, "down", "up"):
        getattr(x, name).requires_grad_(name == needed)
    flops = []
    for lora in (None, LoRA(x.down, x.up)):
        with Operations() as operations:
            loss = linear_cross_entropy(x.hidden, x.weight, x.labels, lora=lora)
        flops.append(operations.flops)
    n, tokens, rank = int((x.labels != IGNORE).sum()), 8 * 32, 3
    of_b = dict(down=2, hidden=2, up=2).get(needed, 1)  # the logits, and the gradient of low or of B
    assert flops[1] - flops[0] == 2 * rank * (tokens * 16 + of_b * n * 64)
    assert loss.requires_grad == bool(needed)


def test_room_for_rows():
    for width, dtype, stride in (
        (50257, torch.bfloat16, 50304),
        (50264, torch.bfloat16, 50264),  # a multiple of 16 bytes needs no room between the rows
        (50257, torch.float32, 50304),
        (1, torch.float64, 64),
    ):
        x = empty_rows(3, width, dtype, torch.device("cpu"))
        assert x.shape == (3, width) and x.stride() == (stride, 1)


def test_the_weight_is_cast_once_under_autocast():
    x = inputs((8, 32), hidden_size=16, vocab=64)
    counts = []
    for chunk_rows in (7, 1000):
        with Operations() as operations, torch.autocast("cpu", dtype=torch.bfloat16):
            linear_cross_entropy(x.hidden, x.weight, x.labels, chunk_rows=chunk_rows)
        counts.append(operations.made(x.weight.shape))
    assert counts == [2, 2]  # the weight in 16 bit, and its gradient


def test_products_are_split_at_row_counts_that_are_known_to_be_slow():
    def sizes(rows):
        return [block.stop - block.start for block in product_blocks(rows)]

    assert sizes(1) == [1] and sizes(2048) == [2048] and sizes(8192) == [8192] and sizes(100_000) == [100_000]
    assert sizes(4096) == [2048, 2048] and sizes(2049) == [1152, 897] and sizes(8191) == [2048, 2048, 2048, 2047]
    assert sizes(0) == []


def test_split_products_are_those_of_the_whole(monkeypatch):
    case, made = decoder_case((1, 2100), hidden_size=6, vocab=11, used=1.0), []
    run = our_entropy(case, chunk_rows=2100)

    def noted(out, *arguments, **options):
        made.append(len(out))
        return product_into(out, *arguments, **options)

    monkeypatch.setattr(chunks, "product_into", noted)
    found = evaluate(run, case.inputs())
    assert made == [11, 1152, 948]  # dW, and dh in two parts; with a bias the logits are made elsewhere
    monkeypatch.setattr(chunks, "_PRODUCT_ROWS", 10**6)
    assert_same(found, evaluate(run, case.inputs()), rtol=1e-12)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_backward_makes_no_second_gradient_of_the_weight(retain, upstream):
    """Unless the graph is kept for another backward, the one that forward left is scaled where it is."""
    x = inputs((8, 16), hidden_size=64, vocab=512)
    with Operations() as forward:
        loss = linear_cross_entropy(x.hidden, x.weight, x.labels)
    assert forward.made(x.weight.shape) == 1
    with Operations() as backward:
        torch.autograd.grad(loss, [x.hidden, x.weight], torch.tensor(upstream), retain_graph=retain)
    assert (backward.made(x.weight.shape) > 0) == retain


MEMORY = {
    "one chunk": dict(chunk_rows=4096),
    "chunks": dict(chunk_rows=1024),
    "frozen head": dict(chunk_rows=1024, frozen=True),
    "row losses": dict(chunk_rows=1024, reduction="none"),
    "statistics": dict(chunk_rows=1024, return_stats=True),
    "every option": dict(chunk_rows=1024, softcap=9.0, label_smoothing=0.1, z_loss=0.01, logit_scale=0.5),
    "adapter": dict(chunk_rows=1024, frozen=True, rank=8),
    "wide logits": dict(chunk_rows=1024, dtype=torch.bfloat16, logits_dtype=torch.float32, softcap=9.0),
}


@pytest.mark.parametrize("options", MEMORY.values(), ids=MEMORY.keys())
def test_no_peak_above_a_chunk_of_logits(options):
    n, hidden_size, vocab = 4096, 32, 8192
    options = dict(options)
    x = inputs((1, n), hidden_size, vocab, used=1.0, dtype=options.pop("dtype", torch.float32))
    x.weight.requires_grad_(not options.pop("frozen", False))
    wanted = [t for t in (x.hidden, x.weight) if t.requires_grad]
    if rank := options.pop("rank", 0):
        options["lora"] = LoRA(*(torch.randn(s, requires_grad=True) for s in ((rank, hidden_size), (vocab, rank))))
        wanted += options["lora"][:2]

    def run():
        out = linear_cross_entropy(x.hidden, x.weight, x.labels, **options)
        loss = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(loss.sum(), wanted)

    _, peak, grads = allocated(run, x.weight.device)
    given = sum(g.numel() * g.element_size() for g in grads)
    chunk = options["chunk_rows"] * vocab * (8 if "logits_dtype" in options else 4)  # in 16 bit, too, to be multiplied
    blocks = 6 * 2**22  # what the torch kernels have of a few rows at a time
    rows = 4 * n * hidden_size * 4
    assert peak <= given + chunk + blocks + rows
    if options["chunk_rows"] < n:
        assert peak < n * vocab * 4  # the logits of all rows were never there


def test_default_chunks_keep_within_the_documented_multiples_of_the_weight():
    """Peak bytes beyond the returned gradients: 2.5 times the weight's for a trained head, half for a frozen one."""
    hidden_size, vocab = 4096, 128256
    weight = vocab * hidden_size * 2
    for dtype in (torch.bfloat16, torch.float16):
        for n in (1, 1024, 4096, 5734, 5735, 8192, 8193, 16384, 50000):
            rows = chunk_rows_for(n, hidden_size, dtype, True)
            # float32 where it is a sum over chunks, instead of the one in 16 bit that is returned
            hidden = torch.empty(0, hidden_size, dtype=dtype)
            wide = LogitLoss(hidden).dweight_dtype(n, hidden) == torch.float32
            assert rows * vocab * 2 + wide * weight <= 2.5 * weight
            assert chunk_rows_for(n, hidden_size, dtype, False) * vocab * 2 <= 0.5 * weight

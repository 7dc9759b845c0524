"""What the cross-entropy of a linear layer costs: multiplications, tensors and bytes, counted on the CPU."""

import pytest
import torch
from cases import make_case, small_config
from decoder_cases import IGNORE, LEAVES, again, make
from operations import Operations

from sfr_kernels.kernels.backend import kernels_of

kernels = kernels_of("torch")

from benchmarks.timing import allocated
from sfr_kernels import flow_matching_loss, linear_cross_entropy, sfr_loss
from sfr_kernels.ops import chunks
from sfr_kernels.ops.chunks import chunk_rows_for, dweight_dtype_for, product_blocks
from sfr_kernels.ops.numerics import product_into

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("dtype, logits_dtype", [(torch.float32, None), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype, logits_dtype, reduction):
    n, hidden_size, vocab, chunk = 4096, 8, 1024, 64
    x = make((4, n // 4), hidden_size, vocab, dtype, used=0.9)
    with Operations() as produced:
        options = dict(chunk_rows=chunk, logits_dtype=logits_dtype, reduction=reduction, label_smoothing=0.1)
        loss = linear_cross_entropy(x.hidden, x.weight, x.labels, softcap=5.0, z_loss=0.1, **options)
        loss.sum().backward()
    largest = max(torch.Size(s).numel() for s in produced.shapes)
    assert largest == max(chunk * vocab, n * hidden_size, vocab * hidden_size)
    assert x.weight.grad is not None and len(produced.shapes) > 64 * 10  # the mode saw every chunk


def test_a_frozen_head_has_no_gradient_buffer():
    x = make((8, 16), hidden_size=64, vocab=512, dtype=torch.float32)
    for trained in (True, False):
        x.weight.requires_grad_(trained)
        with Operations() as produced:
            linear_cross_entropy(x.hidden, x.weight, x.labels, chunk_rows=16).backward()
        assert (produced.made(x.weight.shape) > 0) == trained


def test_ignored_rows_are_never_multiplied():
    for used in (0.0, 0.1, 1.0):
        x = make((8, 32), hidden_size=16, vocab=64, dtype=torch.float32, used=used)
        with Operations() as operations:
            linear_cross_entropy(x.hidden, x.weight, x.labels).backward()
        n = int((x.labels != IGNORE).sum())
        assert operations.flops == 3 * 2 * n * 16 * 64  # logits, dh, dW


PRODUCTS = {  # what needs a gradient, and how many of the three products that takes
    "everything": (("hidden", "weight"), 3),
    "frozen head": (("hidden",), 2),
    "frozen trunk": (("weight",), 2),
    "nothing": ((), 1),
}


@pytest.mark.parametrize("needed, products", PRODUCTS.values(), ids=PRODUCTS.keys())
@pytest.mark.parametrize("options", [{}, dict(return_stats=True, chunk_rows=7)])
def test_only_the_products_that_are_needed(needed, products, options):
    x = make((8, 32), hidden_size=16, vocab=64, dtype=torch.float32)
    for name in LEAVES:
        getattr(x, name).requires_grad_(name in needed)
    with Operations() as operations:
        out = linear_cross_entropy(x.hidden, x.weight, x.labels, **options)
    n = int((x.labels != IGNORE).sum())
    assert operations.flops == products * 2 * n * 16 * 64
    loss = out[0] if options else out
    assert loss.requires_grad == bool(needed)


def test_the_joint_op_multiplies_what_its_parts_do_and_gathers_once(monkeypatch):
    case = make_case(small_config(), length=60)
    parts, scattered, scatter = [], [], kernels.scatter_rows
    monkeypatch.setattr(leaves, "scatter_rows", lambda *a: scattered.append(1) or scatter(*a))
    for run in (
        lambda x: linear_cross_entropy(x.hidden, x.weight, case.rows, bias=x.bias),
        lambda x: flow_matching_loss(x.hidden, x.head, case.rows, case.targets, seed=1, config=case.config),
        lambda x: (
            sfr_loss(x.hidden, x.weight, x.head, case.rows, case.targets, seed=1, config=case.config, bias=x.bias).loss
        ),
    ):
        with Operations() as seen:
            run(case.inputs()).backward()
        parts.append(seen)
    cross_entropy, flow, joint = parts
    assert joint.flops == cross_entropy.flops + flow.flops
    n, width = len(case.rows), case.hidden.shape[-1]
    # the gathered rows, and the one buffer of their gradients; each part alone writes the latter over the former
    assert joint.made((n, width)) == 2
    assert scattered == [1, 1, 1]  # once each


def test_the_weight_is_cast_once_under_autocast():
    x = make((8, 32), hidden_size=16, vocab=64, dtype=torch.float32)
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
    x = make((1, 2100), hidden_size=6, vocab=11, used=1.0)
    x.labels[:] = x.labels.clamp(min=0)

    def run():
        y = again(x, torch.float64)
        loss = linear_cross_entropy(y.hidden, y.weight, y.labels, bias=y.bias, chunk_rows=2100)
        loss.backward()
        return [loss.detach(), *(getattr(y, name).grad for name in LEAVES)]

    made = []
    monkeypatch.setattr(
        chunks, "product_into", lambda out, *a, **k: made.append(len(out)) or product_into(out, *a, **k)
    )
    found = run()
    assert made == [11, 1152, 948]  # dW, and dh in two parts; with a bias the logits are made elsewhere
    monkeypatch.setattr(chunks, "_PRODUCT_ROWS", 10**6)
    for mine, whole in zip(found, run(), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_backward_makes_no_second_gradient_of_the_weight(retain, upstream):
    """Unless the graph is kept for another backward, the one that forward left is scaled where it is."""
    x = make((8, 16), hidden_size=64, vocab=512, dtype=torch.float32)
    with Operations() as forward:
        loss = linear_cross_entropy(x.hidden, x.weight, x.labels)
    assert forward.made(x.weight.shape) == 1
    factor = torch.tensor(upstream)
    with Operations() as backward:
        found = torch.autograd.grad(loss, [x.hidden, x.weight], factor, retain_graph=retain)
    assert (backward.made(x.weight.shape) > 0) == retain
    repeated = linear_cross_entropy(x.hidden, x.weight, x.labels)
    kept = torch.autograd.grad(repeated, [x.hidden, x.weight], factor, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


MEMORY = {
    "one chunk": dict(chunk_rows=4096),
    "chunks": dict(chunk_rows=1024),
    "frozen head": dict(chunk_rows=1024, frozen=True),
    "row losses": dict(chunk_rows=1024, reduction="none"),
    "statistics": dict(chunk_rows=1024, return_stats=True),
    "every option": dict(chunk_rows=1024, softcap=9.0, label_smoothing=0.1, z_loss=0.01, logit_scale=0.5),
}


@pytest.mark.parametrize("options", MEMORY.values(), ids=MEMORY.keys())
def test_no_peak_above_a_chunk_of_logits(options):
    n, hidden_size, vocab = 4096, 32, 8192
    x = make((1, n), hidden_size, vocab, torch.float32, used=1.0)
    options = dict(options)
    x.weight.requires_grad_(not options.pop("frozen", False))
    wanted = [t for t in (x.hidden, x.weight) if t.requires_grad]

    def run():
        out = linear_cross_entropy(x.hidden, x.weight, x.labels, **options)
        loss = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(loss.sum(), wanted)

    kept, peak, grads = allocated(run, x.weight.device)
    given = sum(g.numel() * g.element_size() for g in grads)
    chunk = options["chunk_rows"] * vocab * 4
    blocks = 6 * 2**22  # what the torch leaf has of a few rows at a time
    rows = 4 * n * hidden_size * 4
    assert kept <= given + 2**12
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
            wide = dweight_dtype_for(n, hidden_size, dtype, dtype, 0, None) == torch.float32
            assert rows * vocab * 2 + wide * weight <= 2.5 * weight
            assert chunk_rows_for(n, hidden_size, dtype, False) * vocab * 2 <= 0.5 * weight

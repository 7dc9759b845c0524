"""Cross-entropy over a process group that has the vocabulary in parts: the values and gradients of the whole one.

Each test's processes are started once and run every check of this file: starting them is what takes time.
"""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import assert_as_good_as_eager, assert_same, evaluate
from decoder_cases import IGNORE, OPTIONS, again, make, oracle

from sfr_kernels import LinearCrossEntropy, SupervisedRows, linear_cross_entropy

SPLITS = {3: (13, 1, 23)}  # classes of each process; all of them 37
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def shard_of(x: SimpleNamespace, rank: int, sizes) -> SimpleNamespace:
    """What one process has of a problem: fresh leaves, weight and bias cut."""
    y, start = again(x, x.hidden.dtype), sum(sizes[:rank])
    y.weight, y.bias = (t.detach()[start : start + sizes[rank]].clone().requires_grad_() for t in (y.weight, y.bias))
    y.sharded = dict(process_group=dist.group.WORLD, vocab_start=start)
    y.part = slice(start, start + sizes[rank])
    return y


def ours(y: SimpleNamespace, bias=True, labels=None, **options) -> dict[str, torch.Tensor]:
    labels = y.labels if labels is None else labels
    leaves = SimpleNamespace(hidden=y.hidden, weight=y.weight, bias=y.bias)

    def run(_):
        loss = linear_cross_entropy(y.hidden, y.weight, labels, bias=y.bias if bias else None, **options, **y.sharded)
        return loss if loss.dim() == 0 else (loss * y.row_weight).sum()

    return evaluate(run, leaves)


def cut(found: dict[str, torch.Tensor], part: slice) -> dict[str, torch.Tensor]:
    return found | {name: found[name][part] for name in ("weight", "bias")}


def everywhere(t: torch.Tensor) -> list[torch.Tensor]:
    """The tensor of every process."""
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return parts


@check
def a_part_without_any_probability(rank, sizes):
    """Classes that only pad the vocabulary, and so have a bias of −∞."""
    x = make()
    labels = torch.where(x.labels == IGNORE, IGNORE, x.labels % sizes[0])
    with torch.no_grad():
        x.bias[sizes[0] :] = -torch.inf
    y = shard_of(x, rank, sizes)
    loss, stats = linear_cross_entropy(y.hidden, y.weight, labels, bias=y.bias, return_stats=True, **y.sharded)
    wanted, whole = linear_cross_entropy(x.hidden, x.weight, labels, bias=x.bias, return_stats=True)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(stats.entropy, whole.entropy)


@check
def every_option_in_float64(rank, sizes):
    x = make()
    y = shard_of(x, rank, sizes)
    for options in OPTIONS.values():
        if "ignore_index" in options:
            continue
        options = options | {name: x.row_weight for name in options if name == "row_weight"}
        for chunk_rows in (None, 4):
            found = ours(y, chunk_rows=chunk_rows, **options)
            assert_same(found, cut(oracle(x, **options), y.part), rtol=1e-9)
            for t in (found["value"], found["hidden"]):  # every process has the same bits
                assert all(torch.equal(t, other) for other in everywhere(t))


@check
def as_good_as_eager_in_16_bit(rank, sizes):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = make((5, 41), hidden_size=64, vocab=37, dtype=dtype)
        y = shard_of(x, rank, sizes)
        options = dict(softcap=4.0, label_smoothing=0.1, z_loss=0.01)
        exact, eager = oracle(again(x, torch.float64), **options), oracle(x, **options)
        names = ("value", "hidden")  # those of the part of one class are too few numbers to be statistics
        mine, eager, exact = ({name: r[name] for name in names} for r in (ours(y, **options), eager, exact))
        assert mine["hidden"].dtype == dtype
        assert_as_good_as_eager(mine, eager, exact, k=1.2)


@check
def reductions_shift_and_rows(rank, sizes):
    x = make()
    y = shard_of(x, rank, sizes)
    weigh = x.row_weight.flatten().double()
    exact = oracle(x, lambda rows: (rows * weigh).sum())
    assert_same(ours(y, reduction="none"), cut(exact, y.part), rtol=1e-9)
    assert_same(ours(y, reduction="sum"), cut(oracle(x, torch.Tensor.sum), y.part), rtol=1e-9)
    loss = linear_cross_entropy(y.hidden, y.weight, y.labels, bias=y.bias, **y.sharded)
    leaves, upstream = [y.hidden, y.weight, y.bias], torch.tensor(4.0, dtype=torch.float64)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    fourfold = torch.autograd.grad(loss, leaves, upstream)
    assert all(torch.equal(4 * a, b) for a, b in zip(first, fourfold, strict=True))
    shifted = torch.tensor([[*row[1:], IGNORE] for row in x.labels.tolist()])
    exact = cut(oracle(x, labels=shifted), y.part)
    assert_same(ours(y, shift=True), exact, rtol=1e-9)
    assert_same(ours(y, labels=SupervisedRows.from_labels(x.labels)), exact, rtol=1e-9)


@check
def frozen_parts_and_no_rows(rank, sizes):
    x = make()
    y = shard_of(x, rank, sizes)
    exact = cut(oracle(x), y.part)
    y.weight.requires_grad_(False)
    y.bias.requires_grad_(False)
    torch.testing.assert_close(ours(y)["hidden"], exact["hidden"], rtol=1e-9, atol=1e-14)
    with torch.no_grad():
        assert not linear_cross_entropy(y.hidden, y.weight, y.labels, **y.sharded).requires_grad
    nothing = ours(y, labels=torch.full_like(y.labels, IGNORE))
    assert nothing["value"] == 0 and not nothing["hidden"].any()


@check
def statistics_of_the_whole_vocabulary(rank, sizes):
    x = make()
    y = shard_of(x, rank, sizes)
    module = LinearCrossEntropy(return_stats=True, chunk_rows=5, **y.sharded)
    _, found = module(y.hidden, y.weight, y.labels)
    _, wanted = linear_cross_entropy(x.hidden, x.weight, x.labels, return_stats=True)
    for mine, whole in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-10, atol=0)


@check
def a_large_common_offset_costs_no_digit(rank, sizes):
    g = torch.Generator().manual_seed(0)
    x = make()
    x.hidden, x.weight = (torch.randint(-8, 9, size, generator=g) / 8 for size in ((40, 6), (37, 6)))
    x.bias = torch.full((37,), 1e4)
    x.labels = torch.randint(0, 37, (40,), generator=g)
    x.row_weight = torch.ones(40)
    y = shard_of(x, rank, sizes)
    for options in ({}, dict(label_smoothing=0.1)):
        exact = oracle(again(x, torch.float64), torch.Tensor.sum, bias=False, **options)
        found = ours(y, reduction="none", **options)
        for name in ("value", "hidden"):
            torch.testing.assert_close(found[name].double(), exact[name], rtol=1e-6, atol=2e-6)


@check
def traced_whole(rank, sizes):
    x = make()
    y = shard_of(x, rank, sizes)
    group, start = y.sharded.values()

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, y.labels, process_group=group, vocab_start=start)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(y.hidden, y.weight), [y.hidden, y.weight]) for f in (loss, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@check
def wrong_labels_and_parts_are_errors_in_every_process(rank, sizes):
    x = make()
    y = shard_of(x, rank, sizes)
    with pytest.raises(ValueError, match=r"labels .* 37 is on 0"):
        ours(y, labels=torch.full_like(y.labels, 37))
    y.sharded["vocab_start"] = 0  # all claim to be the first
    with pytest.raises(ValueError, match="vocab_start"):
        ours(y)
    with pytest.raises(ValueError, match="reference"):
        ours(y, backend="reference")
    with pytest.raises(ValueError, match=r"class_weight .* process_group"):
        ours(y, class_weight=torch.ones(len(y.weight)))


@check
def a_dtensor_is_refused_with_advice(rank, sizes):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    x = make()
    mesh = init_device_mesh("cpu", (len(sizes),))
    weight = distribute_tensor(x.weight.detach(), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"weight is a DTensor.*process_group"):
        linear_cross_entropy(x.hidden, weight, x.labels)


def work(rank: int, sizes, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(sizes))
    try:
        for function in CHECKS:
            dist.barrier()
            function(rank, sizes)
        dist.barrier()  # nobody hangs up while others still listen
    except BaseException as error:
        raise RuntimeError(f"{function.__name__} in process {rank}") from error
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("processes", SPLITS)
def test_a_vocabulary_in_parts(processes, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    mp.spawn(work, args=(SPLITS[processes], str(tmp_path / "store")), nprocs=processes)

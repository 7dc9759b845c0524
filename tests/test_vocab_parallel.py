"""Cross-entropy over a process group that has the vocabulary in parts: the values and gradients of the whole one.

Each test's processes are started once and run every check of this file: starting them is what takes time.
"""

import os
from dataclasses import replace

import pytest
import test_linear_cross_entropy as whole
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import (
    IGNORE,
    LossCase,
    assert_as_good_as_eager,
    assert_same,
    decoder_case,
    evaluate,
    our_entropy,
    with_adapters,
)
from torch import Tensor

from sfr_kernels import LinearCrossEntropy, LoRA, SupervisedRows

SIZES = (13, 1, 23)  # classes of each process; all of them 37
PARTS = ("weight", "bias", "up", "up_2")
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def part_of(case: LossCase, classes: slice) -> LossCase:
    """What one process has of a case: the parts of its classes, and how it says so."""
    sharded = dict(process_group=dist.group.WORLD, vocab_start=classes.start)
    parts = {name: t[classes] for name in PARTS if (t := getattr(case, name)) is not None}
    return replace(case, **parts, options=case.options | sharded)


def ours(case: LossCase, classes: slice, *dtype, **options) -> dict[str, Tensor]:
    return whole.ours(part_of(case, classes), *dtype, **options)


def exact(case: LossCase, classes: slice, *dtype, **options) -> dict[str, Tensor]:
    """The reference of the whole vocabulary, with the gradients of a part."""
    found = whole.exact(case, *dtype, **options)
    return found | {name: found[name][classes] for name in PARTS if name in found}


def with_statistics(case: LossCase, **options) -> tuple:
    module = LinearCrossEntropy(return_stats=True, **case.options | options)
    return module(case.hidden, case.weight, case.labels, case.bias)


@check
def a_part_without_any_probability(classes, sizes):
    """Classes that only pad the vocabulary, and so have a bias of −∞."""
    case = decoder_case()
    case.labels = torch.where(case.labels == IGNORE, IGNORE, case.labels % sizes[0])
    case.bias[sizes[0] :] = -torch.inf
    (loss, stats), (wanted, of_whole) = map(with_statistics, (part_of(case, classes), case))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(stats.entropy, of_whole.entropy)


@check
def every_option_in_float64(classes, sizes):
    for options in whole.OPTIONS.values():
        if "ignore_index" in options:
            continue
        case = whole.with_options(decoder_case(), options)
        for chunk_rows in (None, 4):
            found = ours(case, classes, chunk_rows=chunk_rows)
            assert_same(found, exact(case, classes), rtol=1e-9)
            for t in (found["value"], found["hidden"]):  # every process has the same bits
                others = [torch.empty_like(t) for _ in sizes]
                dist.all_gather(others, t.contiguous())
                assert all(torch.equal(t, other) for other in others)


@check
def adapters_that_are_spread_with_their_layer(classes, sizes):
    for options in (dict(), dict(reduction="none"), dict(chunk_rows=4, label_smoothing=0.1)):
        case = replace(with_adapters(decoder_case()), options=options)
        wanted = exact(replace(case, options={k: v for k, v in options.items() if k != "chunk_rows"}), classes)
        found = ours(case, classes)
        assert found["down"].any() and found["up_2"].any()
        assert_same(found, wanted, rtol=1e-9)


@check
def as_good_as_eager_in_16_bit(classes, sizes):
    case = decoder_case((5, 41), hidden_size=64, vocab=37)
    case.options = dict(softcap=4.0, label_smoothing=0.1, z_loss=0.01)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        results = ours(case, classes, dtype), whole.eager(case, dtype), exact(case, classes, dtype)
        assert results[0]["hidden"].dtype == dtype
        # those of the part of one class are too few numbers to be statistics
        assert_as_good_as_eager(*({name: r[name] for name in ("value", "hidden")} for r in results), k=1.2)


@check
def reductions_shift_and_rows(classes, sizes):
    case = decoder_case()
    assert_same(ours(case, classes, reduction="sum"), exact(case, classes, reduction="sum"), rtol=1e-9)
    part = part_of(case, classes)
    x = part.inputs()
    leaves, loss = [x.hidden, x.weight, x.bias], our_entropy(part)(x)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    fourfold = torch.autograd.grad(loss, leaves, torch.tensor(4.0, dtype=torch.float64))
    assert all(torch.equal(4 * a, b) for a, b in zip(first, fourfold, strict=True))
    wanted = exact(case, classes, shift=1)
    assert_same(ours(case, classes, shift=True), wanted, rtol=1e-9)
    case.rows = SupervisedRows.from_labels(case.labels)
    assert_same(ours(case, classes, of_rows=True), wanted, rtol=1e-9)


@check
def frozen_parts_and_no_rows(classes, sizes):
    case = decoder_case()
    part, wanted = part_of(case, classes), exact(case, classes)
    x = part.inputs()
    x.weight.requires_grad_(False)
    x.bias.requires_grad_(False)
    torch.testing.assert_close(evaluate(our_entropy(part), x)["hidden"], wanted["hidden"], rtol=1e-9, atol=1e-14)
    with torch.no_grad():
        assert not our_entropy(part)(x).requires_grad
    nothing = ours(replace(case, labels=torch.full_like(case.labels, IGNORE)), classes)
    assert nothing["value"] == 0 and not nothing["hidden"].any()


@check
def statistics_of_the_whole_vocabulary(classes, sizes):
    case = decoder_case()
    (_, found), (_, wanted) = with_statistics(part_of(case, classes), chunk_rows=5), with_statistics(case)
    for mine, of_whole in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, of_whole, rtol=1e-10, atol=0)


@check
def a_large_common_offset_costs_no_digit(classes, sizes):
    case = whole.offset_case()
    for options in (dict(reduction="none"), dict(reduction="none", label_smoothing=0.1)):
        found, wanted = ours(case, classes, torch.float32, **options), exact(case, classes, bias=False, **options)
        for name in ("value", "hidden"):
            torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-6, atol=2e-6)


@check
def traced_whole(classes, sizes):
    part = part_of(decoder_case(), classes)
    torch._dynamo.reset()
    compiled = torch.compile(our_entropy(part), fullgraph=True, backend="aot_eager")
    found, wanted = (evaluate(f, part.inputs()) for f in (compiled, our_entropy(part)))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@check
def wrong_labels_and_parts_are_errors_in_every_process(classes, sizes):
    case = decoder_case()
    with pytest.raises(ValueError, match=r"labels .* 37 is on 0"):
        ours(replace(case, labels=torch.full_like(case.labels, 37)), classes)
    with pytest.raises(ValueError, match="vocab_start"):  # all claim to be the first
        ours(case, classes, vocab_start=0)
    with pytest.raises(ValueError, match="reference"):
        ours(case, classes, backend="reference")
    with pytest.raises(ValueError, match=r"class_weight .* process_group"):
        ours(case, classes, class_weight=torch.ones(len(case.weight[classes]), dtype=torch.float32))
    weight = case.weight[classes]
    dropping = LoRA(weight.new_ones(2, weight.shape[1]), weight.new_ones(len(weight), 2), dropout=0.1)
    with pytest.raises(ValueError, match=r"lora\.dropout must be 0 with process_group"):
        ours(case, classes, lora=dropping)


@check
def a_dtensor_is_refused_with_advice(classes, sizes):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    case = decoder_case()
    case.weight = distribute_tensor(case.weight, init_device_mesh("cpu", (len(sizes),)), [Shard(0)])
    with pytest.raises(TypeError, match=r"weight is a DTensor.*process_group"):
        LinearCrossEntropy()(case.hidden, case.weight, case.labels)


def work(rank: int, sizes, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(sizes))
    try:
        for function in CHECKS:
            dist.barrier()
            function(slice(sum(sizes[:rank]), sum(sizes[: rank + 1])), sizes)
        dist.barrier()  # nobody hangs up while others still listen
    except BaseException as error:
        raise RuntimeError(f"{function.__name__} in process {rank}") from error
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_a_vocabulary_in_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    mp.spawn(work, args=(SIZES, str(tmp_path / "store")), nprocs=len(SIZES))

"""Every kernel configuration compiles for every supported chip, without a GPU: no spill, and shared memory that fits;
and no batch makes another.

The launchers themselves say what they would launch: they are run on small CPU tensors with the launch recorded instead.
"""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton")
from ahead_of_time import compiled, in_file, recorded, variant  # noqa: E402
from check.experiments import TILES, WARPS  # noqa: E402
from check.fused_output import fused_output  # noqa: E402
from check.one_read import one_read  # noqa: E402
from sass import resources  # noqa: E402

from sfr_kernels.kernels.backend import kernels_of  # noqa: E402

kernels = kernels_of("triton")
from sfr_kernels.leaves.triton import index_sum  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from sfr_kernels.kernels import empty_rows
from sfr_kernels.kernels.flow import FlowPath  # noqa: E402

if not isinstance(kernels.flow_path.__globals__["_flow_path_kernel"], JITFunction):
    pytest.skip("the interpreter has nothing to compile", allow_module_level=True)

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
HALF, FLOAT = torch.bfloat16, torch.float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Whole 16-byte accesses at every width of block; one width that no vector divides, and one wider than any block.
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ODD, WIDE = 777, 12288
CPU = torch.device("cpu")


def flow(width: int, targets=FLOAT, source_std=1.0) -> FlowPath:
    n = 3
    index = torch.zeros(n, dtype=torch.int32)
    e = empty_rows(2, width, targets, CPU)
    return FlowPath(
        e, torch.zeros(5), torch.zeros(n, dtype=torch.int64), index, index, torch.zeros(1).long(), 2.0, source_std
    )


def flow_calls(width: int, dtype: torch.dtype, **options):
    kernels.flow_path(flow(width, **options), dtype)
    v = empty_rows(3, width, dtype, CPU)
    for coefficient in (None, torch.zeros(3)):
        kernels.flow_mse(v, v, coefficient)


def norm_calls(width: int, dtype: torch.dtype, vectors: torch.dtype):
    y, gamma, table = empty_rows(3, width, dtype, CPU), torch.zeros(width, dtype=vectors), torch.zeros(5, width)
    index, stats = torch.zeros(3, dtype=torch.int32), torch.zeros(3)
    for bias, residual in product((False, True), repeat=2):
        kernels.norm_act(
            y, gamma, gamma, residual=y if residual else None, **dict(row_bias=table, row_index=index) if bias else {}
        )
    kernels.norm_act_backward(y, y, gamma, gamma, stats, stats)
    for size in (5, 256):
        kernels.norm_act_backward(y, y, gamma, gamma, stats, stats, row_index=index, num_bias=size)


def scale_calls(width: int, dtype: torch.dtype, out: torch.dtype):
    x, factor = torch.zeros(3, width, dtype=dtype), torch.zeros(())
    kernels.scale(x, factor, out)
    kernels.scale_(x, factor)
    kernels.scatter_rows(empty_rows(3, width, dtype, CPU), factor, torch.zeros(7, dtype=torch.int32), out)


def split_calls(dtype: torch.dtype):
    x, z = torch.zeros(10, 1024), torch.zeros(5, 1024, dtype=dtype)
    for rows, gate in product((5, 10), (None, z)):
        kernels.split(x[:rows], 5, dtype, gate)


def time_calls(width: int, dtype: torch.dtype):
    kernels.sinusoid(torch.zeros(5), width, 1000.0, dtype)
    kernels.stratified_times(torch.zeros(3).long(), torch.zeros(1).long(), 256)
    kernels.sequence_times(torch.zeros(3).long(), torch.zeros(1).long())


def strided_calls(dtype: torch.dtype):
    """Columns that lie apart: every access is of one number."""
    y = torch.zeros(3, 2 * ODD, dtype=dtype)[:, ::2]
    gamma, index, stats = y[0].contiguous(), torch.zeros(3, dtype=torch.int32), torch.zeros(3)
    kernels.norm_act(y, gamma, gamma, residual=y)
    kernels.norm_act_backward(y, y, gamma, gamma, stats, stats, dy=y)
    kernels.flow_mse(y, y, stats)
    for size in (5, 256, 2 * index_sum.FEW):
        index_sum.sum_by_index(y, index, size)


def cross_entropy_calls(logits: torch.Tensor):
    labels, weight = torch.zeros(2).long(), torch.zeros(2)
    everything = dict(softcap=3.0, logit_scale=0.5, label_smoothing=0.1, z_loss=0.1)
    for row_weight, options in product((None, weight), ({}, everything)):
        kernels.softmax_xent(logits, labels, row_weight, **options)
    for options in (dict(need_grad=False), dict(need_stats=True), dict(softcap=3.0), dict(label_smoothing=0.1)):
        kernels.softmax_xent(logits, labels, **options)
    kernels.softmax_xent(logits, labels, weight, need_grad=False, need_stats=True, **everything)
    squash = dict(softcap=3.0, logit_scale=0.5)
    for stats, options in product((False, True), ({}, dict(need_rest=True, **squash))):
        kernels.softmax_partials(logits, labels, need_stats=stats, **options)
    for row_weight, options in product((None, weight), ({}, dict(label_smoothing=0.1, **squash))):
        kernels.softmax_gradient(logits, labels, row_weight, weight, weight, torch.zeros(()), **options)


def fused_output_calls(dtype: torch.dtype):
    a = torch.zeros(3, 1024, dtype=dtype)
    for tile in TILES.values():
        fused_output(a, torch.zeros(1024, 1024, dtype=dtype), a[0], a, torch.zeros(3), tile)


def one_read_calls(dtype: torch.dtype):
    for warps in WARPS.values():
        one_read(torch.zeros(2, 32000, dtype=dtype), torch.zeros(2).long(), warps)


def all_calls():
    fused_output_calls(HALF)
    if triton.__version__.startswith("3.6."):  # of an experiment: a later compiler holds more in registers, and spills
        one_read_calls(HALF)
    for vocab, dtype in product((16, 32000, 50257, 128256), DTYPES):  # a vocabulary of any size, and popular ones
        cross_entropy_calls(empty_rows(2, vocab, dtype, CPU))
    for vocab, dtype in (*product((331,), DTYPES), (50257, HALF)):  # rows that no vector fits
        cross_entropy_calls(torch.zeros(2, vocab, dtype=dtype))
    for dtype in DTYPES:
        strided_calls(dtype)
        index_sum.sum_by_index(torch.zeros(3, 1024, dtype=dtype), torch.zeros(3, dtype=torch.int32), 2 * index_sum.FEW)
    for width, dtype in [*product(WIDTHS, [HALF]), *product((1024, ODD, WIDE), DTYPES)]:
        flow_calls(width, dtype)
        norm_calls(width, dtype, dtype)
        scale_calls(width, dtype, dtype)
        time_calls(width, dtype)
    for targets in DTYPES:
        flow_calls(1024, HALF, targets=targets, source_std=0.0)
        flow_calls(1024, HALF, targets=targets)
    norm_calls(1024, HALF, FLOAT)
    for dtype in DTYPES:
        split_calls(dtype)
        scale_calls(1024, dtype, FLOAT)
        scale_calls(1024, FLOAT, dtype)


@pytest.fixture(scope="module")
def launches():
    """One of each variant."""
    with recorded() as made:
        all_calls()
    return list({variant(launch): launch for launch in made}.values())


# What reads and writes rows, 16 bytes a thread at once also where the width is odd and the starts alone are aligned.
MOVERS = {"_softmax_xent_kernel", "_softmax_gradient_kernel", "_norm_act_kernel", "_norm_act_backward_kernel"}
MOVERS |= {"_flow_mse_kernel", "_flow_path_kernel"}


@pytest.mark.parametrize("capability", SHARED)
def test_every_configuration_compiles_without_a_spill(launches, capability):
    def judge(launch):
        result = compiled(launch, capability)
        wide = {kind for kind in ("ld", "st") if re.search(rf"\b{kind}\.global\S*\.v4\.b32", result.asm["ptx"])}
        (used,) = in_file(result.asm["cubin"], resources).values()
        return launch, used, result.metadata.shared, wide

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(judge, launches))
    assert len(rows) > 100
    assert len({launch[0].__name__ for launch, *_ in rows}) >= 15  # every kernel of the package
    ragged = set()
    for (kernel, _, meta), used, shared, wide in rows:
        name = f"{kernel.__name__} {meta}"
        assert used["STACK"] == 0, f"{name} keeps {used['STACK']} bytes on the stack of sm_{capability}"
        assert shared <= SHARED[capability], f"{name} wants {shared} bytes of shared memory"
        if kernel.__name__ in MOVERS and "ragged" in (meta.get("ACCESS"), meta.get("ROWS")):
            ragged.add(kernel.__name__)
            wanted = {"ld", "st"} if meta.get("NEED_GRAD", True) else {"ld"}
            assert wanted <= wide, f"{name} moves its rows one number at a time"
    assert ragged == MOVERS


def batch_calls(n: int, first: int):
    """Every leaf on n rows, of larger tensors from their row `first` on; of even widths and of odd ones."""
    rows = slice(first, first + n)
    index, weight = torch.zeros(first + n, dtype=torch.int32)[rows], torch.zeros(first + n)[rows]
    identity, seed, factor = torch.zeros(first + n).long()[rows], torch.zeros(1).long(), torch.zeros(())
    for width, vocab in ((48, 4096), (35, 331)):
        x = empty_rows(first + n, width, HALF, CPU)[rows]
        path = FlowPath(torch.zeros(2, width), torch.zeros(5), identity, index, index, seed, 2.0, 1.0)
        kernels.flow_path(path, HALF)
        for coefficient in (None, weight):
            kernels.flow_mse(x, x, coefficient)
        kernels.norm_act(x, x[0], x[0], row_bias=torch.zeros(256, width), row_index=index)
        kernels.norm_act(x, x[0], x[0], residual=x)
        kernels.norm_act_backward(x, x, x[0], x[0], weight, weight)
        for size in (8, 256, 2 * index_sum.FEW):
            kernels.norm_act_backward(x, x, x[0], x[0], weight, weight, row_index=index, num_bias=size)
        kernels.scatter_rows(x, factor, index, HALF)
        kernels.scale_(kernels.scale(x.contiguous(), factor, HALF), factor)
        logits = empty_rows(first + n, vocab, HALF, CPU)[rows]
        kernels.softmax_xent(logits, identity, weight)
        kernels.softmax_partials(logits, identity)
        kernels.softmax_gradient(logits, identity, weight, weight, weight, factor)
    kernels.stratified_times(identity, seed, 256)
    kernels.sequence_times(identity, seed)


def test_no_batch_compiles_what_the_first_has_not():
    """Counts of rows that are 1, multiples of 16 or neither, and slices that start anywhere."""
    draw = random.Random(0)
    batches = [(1, 0), (2, 1), (16, 3), (48, 16), *((draw.randint(1, 600), draw.randint(0, 40)) for _ in range(45))]
    with recorded() as made:
        batch_calls(37, 0)
        wanted = {variant(launch) for launch in made}
        for n, first in batches:
            made.clear()
            batch_calls(n, first)
            more = {variant(launch) for launch in made} - wanted
            assert not more, f"{n} rows from row {first} on compile {more}"

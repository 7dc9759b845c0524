"""Every kernel configuration compiles for every supported chip, without a GPU: no spill, and shared memory that fits.

The launchers themselves say what they would launch: they are run on small CPU tensors with the launch recorded instead.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.check.ahead_of_time import compiled, in_file, recorded  # noqa: E402
from benchmarks.check.fused_output import TILES, fused_output  # noqa: E402
from benchmarks.check.one_read import WARPS, one_read  # noqa: E402
from benchmarks.check.sass import resources  # noqa: E402
from sfr_kernels.leaves import FlowPath  # noqa: E402
from sfr_kernels.leaves import triton as leaves  # noqa: E402
from sfr_kernels.leaves.triton import column_sum  # noqa: E402

if not isinstance(leaves.flow_path.__globals__["_flow_path_kernel"], JITFunction):
    pytest.skip("the interpreter has nothing to compile", allow_module_level=True)

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
HALF, FLOAT = torch.bfloat16, torch.float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Whole 16-byte accesses at every width of block; one width that no vector divides, and one wider than any block.
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ODD, WIDE = 777, 12288


def flow(width: int, targets=FLOAT, source_std=1.0) -> FlowPath:
    n = 3
    index = torch.zeros(n, dtype=torch.int32)
    e = torch.zeros(2, width, dtype=targets)
    return FlowPath(
        e, torch.zeros(5), torch.zeros(n, dtype=torch.int64), index, index, torch.zeros(1).long(), 2.0, source_std
    )


def flow_calls(width: int, dtype: torch.dtype, **options):
    leaves.flow_path(flow(width, **options), dtype)
    v = torch.zeros(3, width, dtype=dtype)
    for coefficient in (None, torch.zeros(3)):
        leaves.flow_mse(v, v, coefficient)


def norm_calls(width: int, dtype: torch.dtype, vectors: torch.dtype):
    y, gamma, table = torch.zeros(3, width, dtype=dtype), torch.zeros(width, dtype=vectors), torch.zeros(5, width)
    index, stats = torch.zeros(3, dtype=torch.int32), torch.zeros(3)
    for bias, residual in product((False, True), repeat=2):
        leaves.norm_act(
            y, gamma, gamma, residual=y if residual else None, **dict(row_bias=table, row_index=index) if bias else {}
        )
    leaves.norm_act_backward(y, y, gamma, gamma, stats, stats)
    leaves.norm_act_backward(y, y, gamma, gamma, stats, stats, row_index=index, num_bias=5)


def scale_calls(width: int, dtype: torch.dtype, out: torch.dtype):
    x, factor = torch.zeros(3, width, dtype=dtype), torch.zeros(())
    leaves.scale(x, factor, out)
    leaves.scale_(x, factor)
    leaves.scatter_rows(x, factor, torch.zeros(7, dtype=torch.int32), out)


def split_calls(dtype: torch.dtype):
    x, z = torch.zeros(10, 1024), torch.zeros(5, 1024, dtype=dtype)
    for rows, gate in product((5, 10), (None, z)):
        leaves.split(x[:rows], 5, dtype, gate)


def time_calls(width: int, dtype: torch.dtype):
    leaves.sinusoid(torch.zeros(5), width, 1000.0, dtype)
    leaves.stratified_times(torch.zeros(3).long(), torch.zeros(1).long(), 256)
    leaves.sequence_times(torch.zeros(3).long(), torch.zeros(1).long())


def cross_entropy_calls(vocab: int, dtype: torch.dtype):
    logits, labels, weight = torch.zeros(2, vocab, dtype=dtype), torch.zeros(2).long(), torch.zeros(2)
    everything = dict(softcap=3.0, logit_scale=0.5, label_smoothing=0.1, z_loss=0.1)
    for row_weight, options in product((None, weight), ({}, everything)):
        leaves.softmax_xent(logits, labels, row_weight, **options)
    for options in (dict(need_grad=False), dict(need_stats=True), dict(softcap=3.0), dict(label_smoothing=0.1)):
        leaves.softmax_xent(logits, labels, **options)
    leaves.softmax_xent(logits, labels, weight, need_grad=False, need_stats=True, **everything)
    squash = dict(softcap=3.0, logit_scale=0.5)
    for stats, options in product((False, True), ({}, dict(need_rest=True, **squash))):
        leaves.softmax_partials(logits, labels, need_stats=stats, **options)
    for row_weight, options in product((None, weight), ({}, dict(label_smoothing=0.1, **squash))):
        leaves.softmax_gradient(logits, labels, row_weight, weight, weight, torch.zeros(()), **options)


def fused_output_calls(dtype: torch.dtype):
    a = torch.zeros(3, 1024, dtype=dtype)
    for tile in TILES:
        fused_output(a, torch.zeros(1024, 1024, dtype=dtype), a[0], a, torch.zeros(3), tile)


def one_read_calls(dtype: torch.dtype):
    for warps in WARPS:
        one_read(torch.zeros(2, 32000, dtype=dtype), torch.zeros(2).long(), warps)


def row_calls():
    for dtype in DTYPES:
        flow_calls(1024, dtype)
        norm_calls(1024, dtype, dtype)


def all_calls():
    fused_output_calls(HALF)
    if triton.__version__.startswith("3.6."):  # of an experiment: a later compiler holds more in registers, and spills
        one_read_calls(HALF)
    for vocab, dtype in product((16, 331, 32000, 50257, 128256), DTYPES):  # a vocabulary of any size, and popular ones
        cross_entropy_calls(vocab, dtype)
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
def configurations():
    with pytest.MonkeyPatch.context() as patch, recorded() as found:
        for parts in (2, 512):  # two rows a program, as thousands of rows have, and one, which is a constant
            patch.setattr(column_sum, "MAX_PARTS", parts)
            all_calls() if parts == 2 else row_calls()
    return found


@pytest.mark.parametrize("capability", SHARED)
def test_every_configuration_compiles_without_a_spill(configurations, capability):
    def judge(item):
        (name, config), kernel = item
        result = compiled(kernel, config, capability)
        (used,) = in_file(result.asm["cubin"], resources).values()
        return name, dict(config[1]), used["STACK"], result.metadata.shared

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(judge, configurations.items()))
    assert len(rows) > 100
    assert len({name for name, *_ in rows}) >= 15  # every kernel of the package
    for name, constants, stack, shared in rows:
        assert stack == 0, f"{name} {constants} keeps {stack} bytes on the stack of sm_{capability}"
        assert shared <= SHARED[capability], f"{name} {constants} wants {shared} bytes of shared memory"

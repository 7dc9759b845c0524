"""Every kernel configuration compiles for every supported chip, without a GPU: no spill, and shared memory that fits;
and no batch makes another.

The launchers themselves say what they would launch: they are run on small CPU tensors with the launch recorded instead.
"""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter has nothing to compile", allow_module_level=True)

from ahead_of_time import compiled, in_file, recorded, variant  # noqa: E402
from check.experiments import NOISE, POLICIES, TILES, WARPS  # noqa: E402
from check.experiments import kernels as experiment  # noqa: E402
from check.fused_output import fused_output  # noqa: E402
from check.one_read import one_read  # noqa: E402
from sass import resources  # noqa: E402

from sfr_kernels import kernels as package  # noqa: E402
from sfr_kernels.kernels import empty_rows  # noqa: E402
from sfr_kernels.kernels.backend import kernels_of  # noqa: E402
from sfr_kernels.kernels.flow import FlowPath  # noqa: E402
from sfr_kernels.kernels.sums.triton import MAX_ONE_HOT, sum_by_index  # noqa: E402

kernels = kernels_of("triton")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
HALF, FLOAT = torch.bfloat16, torch.float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Whole 16-byte accesses at every width of block; one width that no vector divides, and one wider than any block.
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ODD, WIDE = 777, 12288
CPU, SEED, FACTOR = torch.device("cpu"), torch.zeros(1, dtype=torch.int64), torch.zeros(())
BATCH = 3, 0  # rows, and which of a larger tensor's is their first


def rows_of(batch: tuple[int, int], width: int | None = None, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    """(n, width) as the losses keep them, or (n,)."""
    n, first = batch
    whole = torch.zeros(first + n, dtype=dtype) if width is None else empty_rows(first + n, width, dtype, CPU)
    return whole[first:]


def flow_calls(width: int, dtype: torch.dtype, batch=BATCH, targets=FLOAT, source_std=1.0):
    index, identity = (rows_of(batch, dtype=kind) for kind in (torch.int32, torch.int64))
    e = empty_rows(2, width, targets, CPU)
    kernels.flow_path(FlowPath(e, torch.zeros(5), identity, index, index, SEED, 2.0, source_std), dtype)
    v = rows_of(batch, width, dtype)
    for coefficient in (None, rows_of(batch)):
        kernels.flow_mse(v, v, coefficient)


def norm_calls(width: int, dtype: torch.dtype, vectors: torch.dtype, batch=BATCH, sizes=(5, 256)):
    y, gamma, table = rows_of(batch, width, dtype), torch.zeros(width, dtype=vectors), torch.zeros(5, width)
    index, stats = rows_of(batch, dtype=torch.int32), rows_of(batch)
    for bias, residual in product((False, True), repeat=2):
        kernels.norm_act(
            y, gamma, gamma, residual=y if residual else None, **dict(row_bias=table, row_index=index) if bias else {}
        )
    kernels.norm_act_backward(y, y, gamma, gamma, stats, stats)
    for size in sizes:
        kernels.norm_act_backward(y, y, gamma, gamma, stats, stats, row_index=index, num_bias=size)


def scale_calls(width: int, dtype: torch.dtype, out: torch.dtype, batch=BATCH):
    x = rows_of(batch, width, dtype)
    kernels.scale(x.contiguous(), FACTOR, out)
    kernels.scale_(x.contiguous(), FACTOR)
    kernels.scatter_rows(x, FACTOR, rows_of(batch, dtype=torch.int32), out)


def time_calls(width: int, dtype: torch.dtype, batch=BATCH):
    identity = rows_of(batch, dtype=torch.int64)
    kernels.sinusoid(torch.zeros(5), width, 1000.0, dtype)
    kernels.stratified_times(identity, SEED, 256)
    kernels.sequence_times(identity, SEED)


def strided_calls(dtype: torch.dtype):
    """Columns that lie apart: every access is of one number."""
    y = torch.zeros(3, 2 * ODD, dtype=dtype)[:, ::2]
    gamma, index, stats = y[0].contiguous(), torch.zeros(3, dtype=torch.int32), torch.zeros(3)
    kernels.norm_act(y, gamma, gamma, residual=y)
    kernels.norm_act_backward(y, y, gamma, gamma, stats, stats, dy=y)
    kernels.flow_mse(y, y, stats)
    for size in (5, 256, 2 * MAX_ONE_HOT):
        sum_by_index(y, index, size)


def cross_entropy_calls(logits: torch.Tensor, batch=(2, 0)):
    labels, weight = rows_of(batch, dtype=torch.int64), rows_of(batch)
    everything = dict(softcap=3.0, logit_scale=0.5, label_smoothing=0.1, z_loss=0.1)
    for row_weight, options in product((None, weight), ({}, everything)):
        kernels.softmax_xent(logits, labels, row_weight, **options)
    for options in (dict(need_grad=False), dict(need_stats=True), dict(softcap=3.0), dict(label_smoothing=0.1)):
        kernels.softmax_xent(logits, labels, **options)
    kernels.softmax_xent(logits, labels, weight, need_grad=False, need_stats=True, **everything)
    cap = dict(softcap=3.0, logit_scale=0.5)
    for stats, options in product((False, True), ({}, dict(need_rest=True, **cap))):
        kernels.softmax_partials(logits, labels, need_stats=stats, **options)
    for row_weight, options in product((None, weight), ({}, dict(label_smoothing=0.1, **cap))):
        kernels.softmax_gradient(logits, labels, row_weight, weight, weight, FACTOR, **options)


def all_calls():
    a, x, z = (torch.zeros(rows, 1024, dtype=dtype) for rows, dtype in ((3, HALF), (10, FLOAT), (5, FLOAT)))
    for tile in TILES.values():
        fused_output(a, torch.zeros(1024, 1024, dtype=HALF), a[0], a, torch.zeros(3), tile)
    index, identity = rows_of(BATCH, dtype=torch.int32), rows_of(BATCH, dtype=torch.int64)
    path = FlowPath(x, torch.zeros(5), identity, index, index, SEED, 2.0, 1.0)
    for name in NOISE:
        experiment(name).flow_path(path, HALF)
    for name in POLICIES:
        experiment(name).softmax_xent(empty_rows(2, 128256, HALF, CPU), index.long())
    # an experiment that spills with a later compiler, which holds more in registers
    for warps in WARPS.values() if triton.__version__.startswith("3.6.") else ():
        one_read(torch.zeros(2, 32000, dtype=HALF), torch.zeros(2).long(), warps)
    for vocab, dtype in product((16, 32000, 50257, 128256), DTYPES):  # a vocabulary of any size, and popular ones
        cross_entropy_calls(empty_rows(2, vocab, dtype, CPU))
    for vocab, dtype in (*product((331,), DTYPES), (50257, HALF)):  # rows that no vector fits
        cross_entropy_calls(torch.zeros(2, vocab, dtype=dtype))
    for width, dtype in [*product(WIDTHS, [HALF]), *product((1024, ODD, WIDE), DTYPES)]:
        flow_calls(width, dtype)
        norm_calls(width, dtype, dtype)
        scale_calls(width, dtype, dtype)
        time_calls(width, dtype)
    norm_calls(1024, HALF, FLOAT)
    for dtype in DTYPES:
        strided_calls(dtype)
        sum_by_index(torch.zeros(3, 1024, dtype=dtype), torch.zeros(3, dtype=torch.int32), 2 * MAX_ONE_HOT)
        for source_std in (0.0, 1.0):
            flow_calls(1024, HALF, targets=dtype, source_std=source_std)
        for rows, gate in product((5, 10), (None, z.to(dtype))):
            kernels.split(x[:rows], 5, dtype, gate)
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
    files = Path(package.__file__).parent.glob("*/triton.py")
    declared = {name for file in files for name in re.findall(r"^@kernel\ndef (\w+)", file.read_text(), re.MULTILINE)}
    assert len(declared) > 10 and declared <= {launch[0].__name__ for launch, *_ in rows}
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


def batch_calls(*batch: int):
    """Every kernel on rows of even widths and of odd ones."""
    for width, vocab in ((48, 4096), (35, 331)):
        flow_calls(width, HALF, batch)
        norm_calls(width, HALF, HALF, batch, sizes=(8, 256, 2 * MAX_ONE_HOT))
        scale_calls(width, HALF, HALF, batch)
        time_calls(width, HALF, batch)
        cross_entropy_calls(rows_of(batch, vocab, HALF), batch)


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

"""What every hot kernel is in machine code for sm_90, without a GPU.

    python tests/machine_code.py            prints the table
    python tests/machine_code.py --write    keeps it in benchmarks/results and writes it into csrc/README.md

`SOURCES` says which kernels: in bf16, vectors and targets too, as the kernels' benchmarks call them, with rows of 1024
numbers or 128256 logits. Where a kernel was changed, adapt its line. A pattern that finds no kernel, or several, is an
error that names what there is.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sass
import torch

from sfr_kernels.atomic import write_atomically
from sfr_kernels.kernels import build
from sfr_kernels.kernels.flow import FlowPath

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/machine-code-sm90.json"
README, BEGIN, END = ROOT / "csrc/README.md", "<!-- machine code -->", "<!-- /machine code -->"
ROWS, WIDTH, VOCAB, CLUSTER = 8192, 1024, 128256, 4
# of an H100: multiprocessors, schedulers in each, Hz, bytes a second of a copy; MUFU takes a scheduler's unit 8 cycles
PROCESSORS, SCHEDULERS, CLOCK, COPY, MUFU = 132, 4, 1.755e9, 3.0e12, 8
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 228 * 1024  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that each block costs


@dataclass(frozen=True)
class Source:
    """A kernel, and what its code does not say."""

    pattern: str  # finds one name: of CUDA demangled, of Triton the function's
    bytes: int  # that memory must move, a number
    threads: int = 0  # a block; of Triton's, known once it is compiled, as is the next
    shared: int = 0  # bytes a block beside what is declared
    copied: int = 0  # bytes that a block has under way at a time by asynchronous copies
    writes: int = 1  # 16-byte stores for 8 numbers
    loops: bool = True  # False: a thread has 16 bytes of each operand, and goes once through the kernel
    accesses: tuple[int, int] | None = None  # 16-byte loads and stores of the path to count; None: the most there are
    launch: Callable[[object], object] | None = None  # of Triton's kernels


HALF = torch.bfloat16
X, VECTOR, STATS = torch.zeros(ROWS, WIDTH, dtype=HALF), torch.zeros(WIDTH, dtype=HALF), torch.zeros(ROWS)
INDEX, LABELS, FACTOR = torch.zeros(ROWS, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), torch.zeros(())
LOGITS, TABLE = torch.zeros(2, VOCAB, dtype=HALF), torch.zeros(256, WIDTH)
PATH = FlowPath(X[:16], TABLE[:, 0], INDEX.long(), INDEX, INDEX, LABELS[:1], 2.0, 1.0)
SLICE = -(-VOCAB // CLUSTER) * 2  # bytes of a row that a block of a cluster holds
MAILBOX = 6192  # sizeof(Mailbox) in softmax_xent.cu
T = "__nv_bfloat16"
SOURCES = {
    "softmax_xent, cluster":
        Source(rf"cluster_kernel<{T}, 8, false, false>", 4, 512, shared=2 * SLICE + MAILBOX, copied=SLICE),
    "softmax_xent, two passes": Source(rf"softmax_xent_kernel<{T}, true, false, false>", 4, 1024),
    "softmax_xent, Triton": Source("_softmax_xent_kernel", 4, launch=lambda k: k.softmax_xent(LOGITS, LABELS)),
    "flow_path": Source(rf"flow_path_kernel<{T}, {T}, 8, true>", 4, 128, writes=2),
    "flow_path, Triton":
        Source("_flow_path_kernel", 4, writes=2, loops=False, launch=lambda k: k.flow_path(PATH, HALF)),
    "flow_mse": Source(rf"flow_mse_kernel<{T}, 8, true>", 6, 128),
    "flow_mse, Triton": Source("_flow_mse_kernel", 6, launch=lambda k: k.flow_mse(X, X, STATS)),
    "norm_act, row bias": Source(rf"norm_act_kernel<{T}, {T}, 8, true>", 6, 128, writes=2, accesses=(3, 2)),
    "norm_act, row bias, Triton": Source(
        "_norm_act_kernel", 6, writes=2, loops=False,
        launch=lambda k: k.norm_act(X, VECTOR, VECTOR, row_bias=TABLE, row_index=INDEX),
    ),
    "norm_act, residual": Source(rf"norm_act_kernel<{T}, {T}, 8, true>", 6, 128, accesses=(2, 1)),
    "norm_act, residual, Triton":
        Source("_norm_act_kernel", 6, loops=False, launch=lambda k: k.norm_act(X, VECTOR, VECTOR, residual=X)),
    "norm_act_backward": Source(rf"norm_act_backward_kernel<{T}, {T}, 8, true, true>", 6, 128),
    "norm_act_backward, Triton": Source(
        "_norm_act_backward_kernel", 6, launch=lambda k: k.norm_act_backward(X, X, VECTOR, VECTOR, STATS, STATS)
    ),
    "scale": Source(rf"scale_kernel<{T}, {T}, true>", 4, 256),
    "scale, Triton": Source("_scale_kernel", 4, loops=False, launch=lambda k: k.scale(X, FACTOR, HALF)),
    "scatter_rows": Source(rf"scatter_rows_kernel<{T}, {T}, true>", 4, 256, loops=False, accesses=(1, 1)),
    "scatter_rows, Triton":
        Source("_scatter_rows_kernel", 4, loops=False, launch=lambda k: k.scatter_rows(X, FACTOR, INDEX, HALF)),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A pass over the numbers: a loop, or the whole kernel; for 8 numbers of a thread."""

    does: str
    instructions: float
    mufu: float
    calls: int  # places where it may take the slow path of a division, root or the like
    loads: int  # of 16 bytes under way at a time, a thread


@dataclass(frozen=True)
class Kernel:
    registers: int
    shared: int  # bytes a block, with RESERVED
    stack: int  # bytes a thread: what it spills
    blocks: int  # on a multiprocessor at a time
    in_flight: int  # bytes a multiprocessor has under way at a time
    bound: float  # a copy's time over that of issuing its instructions: below 1, they and not memory decide
    parts: list[Part]


def blocks_of(registers: int, threads: int, shared: int) -> int:
    """Blocks on a multiprocessor of sm_90: a warp's registers come in 256s from its scheduler's quarter of them."""
    warps = -(-threads // 32)
    per_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps
    return min(BLOCKS, THREADS // (warps * 32), by_registers, SHARED // (-(-shared // 128) * 128))


def _does(piece: sass.Piece) -> str:
    if "LDGSTS" in piece.kinds:
        return "copies"
    return "reads and writes" if piece.loads and piece.stores else "writes" if piece.stores else "reads"


def judged(name: str, source: Source, code: list[sass.Instruction], used: dict[str, int]) -> Kernel:
    try:
        pieces = sass.loops(code, source.accesses) if source.loops else [sass.body(code, source.accesses)]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not any(piece.moves for piece in pieces):
        raise ValueError(f"{name}: no {'loop' if source.loops else 'path'} of it moves 16 bytes at a time")
    parts = []
    for piece in pieces:
        eights = piece.stores / source.writes or piece.loads
        count = len(piece.path) / eights, piece.count("MUFU") / eights
        parts.append(Part(_does(piece), *(round(x, 1) for x in count), piece.calls, piece.in_flight))
    shared = source.shared + max(
        RESERVED, used["SHARED"]
    )  # which has what is reserved in it where the file has shared memory at all
    blocks = blocks_of(used["REG"], source.threads, shared)
    under_way = blocks * (source.copied or source.threads * 16 * max(part.loads for part in parts))
    cycles = sum(max(part.instructions, MUFU * part.mufu) for part in parts) / 8 / 32  # of a scheduler, a number
    seconds = cycles / (PROCESSORS * SCHEDULERS * CLOCK)
    bound = round(source.bytes / COPY / seconds, 2)
    return Kernel(used["REG"], shared, used["STACK"] + used["LOCAL"], blocks, under_way, bound, parts)


def cuda_kernels(library: Path) -> dict[str, Kernel]:
    """What the library has for sm_90. ValueError that names what there is, where a pattern does not find one."""
    used = sass.resources(library, "-arch", "sm_90")
    names = dict(zip(sass.demangled(list(used)), used, strict=True))
    found = {}
    for name, source in SOURCES.items():
        if source.launch is None:
            matches = [k for k in names if re.search(source.pattern, k)]
            if len(matches) != 1:
                kernel = source.pattern.split("<")[0]
                there = "\n".join(sorted(matches or [k for k in names if kernel in k] or names))
                raise ValueError(f"{name}: {source.pattern!r} should find one kernel, not {len(matches)}, of\n{there}")
            found[name] = names[matches[0]]
    code = sass.listings(library, "-arch", "sm_90", "-fun", ",".join(sorted(set(found.values()))))
    return {name: judged(name, SOURCES[name], code[k], used[k]) for name, k in found.items()}


def triton_kernels() -> dict[str, Kernel]:
    import ahead_of_time

    from sfr_kernels.kernels.backend import kernels_of

    kernels, found = kernels_of("triton"), {}
    for name, source in SOURCES.items():
        if source.launch is None:
            continue
        with ahead_of_time.recorded() as launched:
            source.launch(kernels)
        matches = [launch for launch in launched if launch[0].__name__ == source.pattern]
        if len(matches) != 1:
            there = ", ".join(kernel.__name__ for kernel, *_ in launched)
            raise ValueError(f"{name}: {source.pattern} should be launched once, not {len(matches)} times, of {there}")
        result = ahead_of_time.compiled(matches[0], 90)
        cubin, made = result.asm["cubin"], result.metadata
        (code,), (used,) = (ahead_of_time.in_file(cubin, f).values() for f in (sass.listings, sass.resources))
        found[name] = judged(name, replace(source, threads=32 * made.num_warps, shared=made.shared), code, used)
    return found


def versions() -> dict[str, str]:
    """nvcc's and Triton's, as far as code depends on them."""
    import triton

    text = subprocess.run([build.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return dict(nvcc=re.search(r"release ([\d.]+)", text)[1], triton=triton.__version__)


def measured() -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as work:
        library = Path(work) / build.NAME
        build.compile_library(build.sources(), library, "9.0", build.nvcc(), Path(work))
        found = cuda_kernels(library) | triton_kernels()
    return {name: asdict(found[name]) for name in SOURCES}


def merged(known: dict, kernels: dict[str, dict], versions: dict[str, str]) -> dict:
    """The record with `kernels` as what is now; what was first known of a kernel stays as what was before."""
    before = known.get("before", {})
    return dict(versions=versions, before={name: before.get(name, now) for name, now in kernels.items()}, now=kernels)


def table(record: dict) -> str:
    """In Markdown: before → now, or one of them where they are the same."""

    def cell(name: str, show: Callable[[dict], str]) -> str:
        before, now = (show(record[when][name]) for when in ("before", "now"))
        return now if before == now else f"{before} → {now}"

    def parts(show: Callable[[dict], str]) -> Callable[[dict], str]:
        return lambda kernel: " + ".join(show(part) for part in kernel["parts"])

    columns: dict[str, Callable[[dict], str]] = {
        "a pass": parts(lambda p: p["does"]),
        "instructions": parts(lambda p: f"{p['instructions']:g}"),
        "of them MUFU": parts(lambda p: f"{p['mufu']:g}"),
        "slow paths": parts(lambda p: str(p["calls"])),
        "loads in flight": parts(lambda p: str(p["loads"])),
        "registers": lambda k: str(k["registers"]),
        "shared, B": lambda k: str(k["shared"]),
        "stack, B": lambda k: str(k["stack"]),
        "blocks": lambda k: str(k["blocks"]),
        "in flight, KiB": lambda k: f"{k['in_flight'] / 1024:.0f}",
        "bound": lambda k: f"{k['bound']:.0%}",
    }
    lines = [["kernel", *columns], ["---", "---", *["---:"] * (len(columns) - 1)]]
    lines += [[name, *(cell(name, show) for show in columns.values())] for name in record["now"]]
    made = "nvcc {nvcc}, Triton {triton}".format(**record["versions"])
    return "\n".join([f"With {made}:", "", *(f"| {' | '.join(line)} |" for line in lines)])


def with_table(text: str, record: dict) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="machine_code", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the result file and csrc/README.md")
    options = parser.parse_args(argv)
    try:
        known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
        record = merged(known, measured(), versions())
    except (RuntimeError, ValueError) as error:
        print(f"machine_code: {error}", file=sys.stderr)
        return 2
    print(table(record))
    if options.write:
        write_atomically(RESULT, (json.dumps(record, indent=1) + "\n").encode())
        write_atomically(README, with_table(README.read_text(), record).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""csrc/ without a GPU: emulated on the CPU against the oracle, compiled for every chip without a spill, and loaded."""

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import emulation
import pytest
import sass
import torch

from sfr_kernels.kernels import build, cuda
from sfr_kernels.kernels.backend import kernels_of
from sfr_kernels.kernels.flow import cuda as flow
from sfr_kernels.kernels.flow import one_call as flow_loss
from sfr_kernels.kernels.norm_act import cuda as norm_act
from sfr_kernels.kernels.scale import cuda as scale
from sfr_kernels.kernels.softmax_xent import cuda as softmax_xent
from sfr_kernels.kernels.softmax_xent import torch as eager
from sfr_kernels.kernels.sums import cuda as sums

ROOT = Path(__file__).resolve().parents[1]
emulated_only = pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing() or "")


@pytest.fixture
def loaded(emulated, monkeypatch):
    """The kernels, emulated."""
    monkeypatch.setattr(cuda, "_library", cuda.Library(emulated))
    return kernels_of("cuda")


@pytest.mark.slow
@emulated_only
@pytest.mark.parametrize("marks, least", [("not long", 300), pytest.param("long", 20, marks=pytest.mark.long)])
def test_the_kernels_tests_on_emulated_kernels(emulated, marks, least):
    tests = Path(__file__).parent
    environment = os.environ | {
        "SFR_TEST_KERNELS": "cuda",
        build.LIBRARY_VARIABLE: str(emulated),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tests), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, "kernels"]
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout.splitlines()[-1])
    assert passed and int(passed[1]) > least, done.stdout[-2000:]


EVERY_OPTION = dict(softcap=3.0, logit_scale=0.7, label_smoothing=0.1, z_loss=0.02)


@emulated_only
@pytest.mark.parametrize(
    "cluster, dtype, options",
    [
        *((cluster, torch.float32, options) for cluster in (1, 2, 8) for options in ({}, EVERY_OPTION)),
        (2, torch.bfloat16, EVERY_OPTION),  # the 16-bit formats differ where they are read and written alone
        (8, torch.float16, EVERY_OPTION),
    ],
)
def test_a_row_held_by_a_cluster(loaded, cluster, dtype, options):
    """Fewer columns than threads, slices of unequal size, and more rows than clusters, in turn in both buffers; with
    two passes as well. No row is a multiple of 16 bytes: what lies between rows is neither read nor written."""
    for vocab, n in ((13, 9), (8357, 5)):
        g = torch.Generator().manual_seed(0)
        logits = (3 * torch.randn(n, vocab, generator=g)).to(dtype)
        labels, weight = torch.randint(vocab, (n,), generator=g), torch.rand(n, generator=g)
        labels[0], labels[-1] = 0, vocab - 1
        exact, theirs = logits.double(), logits.clone()
        wanted, stats = eager.softmax_xent(exact, labels, weight, need_stats=True, **options)
        eager_loss, _ = eager.softmax_xent(theirs, labels, weight, **options)
        for blocks in (cluster, 0):
            wide = torch.full((n, vocab + 3), torch.nan, dtype=dtype)
            mine = wide[:, :vocab].copy_(logits)
            loss, found = loaded.softmax_xent(mine, labels, weight, need_stats=True, cluster=blocks, **options)
            for ours, other, true in ((loss, eager_loss, wanted), (mine, theirs, exact)):
                error, bound = ((x.double() - true).norm() for x in (ours, other))
                assert error <= 1.5 * bound + 2.0**-22 * true.norm()
            torch.testing.assert_close(found.lse.double(), stats.lse, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(found.entropy.double(), stats.entropy, rtol=2e-5, atol=2e-6)
            assert torch.equal(found.correct, found.predicted == labels)
            assert wide[:, vocab:].isnan().all()
    loss, _ = loaded.softmax_xent(torch.zeros(3, 16), torch.tensor([0, -1, 16]), cluster=cluster, **options)
    assert loss.isnan().tolist() == [False, True, True]


@emulated_only
def test_the_halves_of_rows_that_are_no_multiple_of_16_bytes(loaded):
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 1021, generator=g)
    labels = torch.tensor([0, 1020, -1])
    mine = torch.full((3, 1024), torch.nan)
    view = mine[:, :1021].copy_(logits)
    found = loaded.softmax_partials(view, labels, need_rest=True, need_stats=True)
    wanted = eager.softmax_partials(logits, labels, need_rest=True, need_stats=True)
    for values, same in zip(found, wanted, strict=True):
        torch.testing.assert_close(values, same, rtol=2e-6, atol=1e-6)
    rest = wanted.top, 1 / wanted.total, torch.tensor(0.1 / 1021)
    loaded.softmax_gradient(view, labels, None, *rest, label_smoothing=0.1)
    eager.softmax_gradient(logits, labels, None, *rest, label_smoothing=0.1)
    torch.testing.assert_close(view, logits, rtol=2e-6, atol=1e-8)
    assert mine[:, 1021:].isnan().all()


# File, what stands there, and what is put there, in which PLANTED says whether this is the fault: each must be found.
SOFTMAX = "softmax_xent.cu"
FAULTS = {
    "a deadlock": ("reduce.cuh", " __syncthreads();\n#pragma", " if (!PLANTED || lane == 0) __syncthreads();\n#pragma"),
    "a read past the end": ("types.cuh", "i < width ? row[", "i < width + 4096 * PLANTED ? row["),
    "an access that is not aligned": ("scale.cu", "(sfr::aligned(x, 16, 16)", "(PLANTED || sfr::aligned(x, 16, 16)"),
    "a copy not waited for": (SOFTMAX, " wait_for_all", " if (!PLANTED) wait_for_all"),
    "a block that has not begun": (SOFTMAX, " cluster_sync();", " if (!PLANTED) cluster_sync();"),
    "a block that has ended": (
        SOFTMAX, "const int at = column_of(label, begin",
        "if (PLANTED && !need_grad && next >= n && rank) return;\nconst int at = column_of(label, begin",
    ),
    "sums not waited for": (SOFTMAX, " wait_for_bytes(", " if (!PLANTED) wait_for_bytes("),
    "the wrong phase of a barrier": (SOFTMAX, "turn >> 1 & 1", "(PLANTED ? turn : turn >> 1) & 1"),
    "a byte more than is expected": (SOFTMAX, "(EXTRA ? 24 : 8) + 8", "(EXTRA ? 24 : 8) + 8 - PLANTED"),
    "sums overwritten too early": (SOFTMAX, "mailbox.messages[parity]", "mailbox.messages[PLANTED ? 0 : parity]"),
    "a row claimed twice": (SOFTMAX, "next = 2 * clusters", "next = (PLANTED ? 1 : 2) * clusters"),
}  # fmt: skip
RUN = ("norm_act.cu", "scale.cu", "softmax_xent.cu")  # what the following calls


def _run_fault(path: Path, fault: int) -> None:
    """LayerNorm of rows that end where memory does, and rows of logits held by clusters."""
    os.environ["SFR_PLANTED"] = str(fault)
    cuda._library, kernels = cuda.Library(path), kernels_of("cuda")
    page = mmap.PAGESIZE
    room = mmap.mmap(-1, 3 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + 2 * page), ctypes.c_size_t(page), 0) == 0
    y = torch.frombuffer(room, dtype=torch.float32, count=2 * page // 4)[-997:].view(1, 997)
    kernels.norm_act(y, torch.ones(997), torch.zeros(997))
    kernels.scale(torch.ones(99)[1:], torch.ones(()), torch.float32)
    for need_grad in (True, False):
        logits, labels = torch.randn(7, 4488), torch.zeros(7, dtype=torch.int64)
        theirs = logits.clone()
        expected, _ = eager.softmax_xent(theirs, labels, need_grad=need_grad)
        loss, _ = kernels.softmax_xent(logits, labels, cluster=2, need_grad=need_grad)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(logits, theirs)


@emulated_only
def test_faults_do_not_pass(emulated, tmp_path):
    folder = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", folder)
    for number, (name, found, planted) in enumerate(FAULTS.values(), 1):
        text = (folder / name).read_text()
        assert found in text
        (folder / name).write_text(text.replace(found, planted.replace("PLANTED", f"(sfr_planted == {number})")))
    with open(folder / "device.cuh", "a") as file:
        file.write('#include <stdlib.h>\ninline const int sfr_planted = atoi(getenv("SFR_PLANTED"));\n')
    path = emulation.compile_emulation(tmp_path, folder, built=emulated.parent, changed=RUN)
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    passed = []
    for number, fault in enumerate([None, *FAULTS]):
        process = context.Process(target=_run_fault, args=(path, number))
        process.start()
        process.join(120)
        assert process.exitcode is not None, f"{fault}: it hangs"
        passed += [fault] * (process.exitcode == 0)
    assert passed == [None]


def test_signatures_are_those_of_the_sources():
    kinds = {"int64_t": "l", "int": "i", "float": "f", "double": "d"}
    declared, values = {}, {}
    for file in sorted(build.sources().glob("*.cu*")):
        for name, parameters in re.findall(r"SFR_API (\w+)\(([^)]+)\) \{", file.read_text()):
            codes = ("s" if "&" in p else "p" if "*" in p else kinds[p.split()[0]] for p in parameters.split(","))
            declared[name] = "".join(codes)
        values |= re.findall(r"(\w+) = (\d+)", file.read_text())
    assert declared == cuda.SIGNATURES
    copies = {str(dtype).removeprefix("torch.").upper(): number for dtype, number in cuda.DTYPES.items()}
    copies |= {"MOST_GROUPS": sums.MOST_GROUPS, "CHUNK": sums.CHUNK, "MAILBOX_BYTES": softmax_xent._MAILBOX_BYTES}
    assert copies == {name: int(values[name]) for name in copies}


@emulated_only
def test_structures_lie_as_in_the_sources(tmp_path):
    """Their fields have the names, the order, the kinds and the places that the compiler gives those of launchers.h."""
    modules = (flow, flow_loss, norm_act, scale, softmax_xent, sums)
    found = {name: x for m in modules for name, x in vars(m).items() if isinstance(x, type(ctypes.Structure))}
    assert {*found} == {*re.findall(r"\bstruct (\w+) \{", (build.sources() / "launchers.h").read_text())}
    kinds = {ctypes.c_void_p: "pointer", ctypes.c_int64: "integral", ctypes.c_int: "integral"}
    lines = [f"#include <{name}>" for name in ("launchers.h", "type_traits", "stddef.h")]
    for name, structure in found.items():
        fields = ", ".join(field for field, _ in structure._fields_)
        lines.append(f"void all_fields(sfr::{name} &all) {{ auto &[{fields}] = all; }}")
        lines.append(f'static_assert(sizeof(sfr::{name}) == {ctypes.sizeof(structure)}, "{name}");')
        for field, kind in structure._fields_:
            at, size = (getattr(getattr(structure, field), what) for what in ("offset", "size"))
            there = f"offsetof(sfr::{name}, {field}) == {at} && sizeof(sfr::{name}::{field}) == {size}"
            same = f"std::is_{kinds.get(kind, 'floating_point')}<decltype(sfr::{name}::{field})>::value"
            lines.append(f'static_assert({there} && {same}, "{name}.{field}");')
    file = tmp_path / "layout.cpp"
    file.write_text("\n".join(lines))
    command = emulation.command_of(build.sources(), "-fsyntax-only", str(file))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.slow
@pytest.mark.parametrize("chips", ["9.0", pytest.param(build.ARCHITECTURES, marks=pytest.mark.long)])
def test_every_kernel_compiles_without_a_spill(compiled, chips):
    """The hot loops read and write 16 bytes at a time; no driver is needed to load."""
    library = compiled(chips)
    assert library.stat().st_size < 16 * 2**20
    bodies = sass.listings(library, "-arch", "sm_90")

    def accesses(name: str) -> set[str]:
        """Which of a kernel's loads, stores and copies are of 16 bytes."""
        code = [i for function, body in bodies.items() if name in function for i in body]
        assert code, name
        return {i.kind for i in code if i.wide}

    half = "I13__nv_bfloat16"
    for kernel in ("softmax_xent_kernel", "norm_act_kernel", "norm_act_backward_kernel", "flow_mse_kernel"):
        assert accesses(f"{kernel}{half}") >= {"LDG", "STG"}, kernel
    assert "STG" in accesses(f"flow_path_kernel{half}")
    assert accesses(f"cluster_kernel{half}") >= {"LDGSTS", "LDS"}
    assert accesses(f"cluster_kernel{half}") & {"STG", "ST"}
    library = cuda.Library(library)
    assert not library.emulated
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"sfr_philox: .*CUDA error"):
            library.philox(None, None, None, 1, 0, 1, None)

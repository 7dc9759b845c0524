"""How the compiled kernels come about and are found: in the wheel, or built once into the user's cache."""

import _ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import emulation
import pytest
import torch
from setuptools import Distribution, Extension

from sfr_kernels.kernels import backend, build, cuda
from sfr_kernels.kernels.sums.cuda import SumByIndexArguments

ROOT = Path(__file__).resolve().parents[1]
FILES = len(list((ROOT / "csrc").glob("*.cu"))) + 1  # that a build makes, with the library
# In nvcc's place: answers --version, and puts a library at what follows -o, slowly; or fails.
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "release 13.0" && exit
{body}
while [ "$1" != -o ]; do shift; done
echo built >> {log}
sleep 0.2
cp {library} "$2"
"""


forget = build.find.cache_clear  # as another process would, which then looks for the library anew


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No packaged library, and a cache of its own."""
    monkeypatch.setattr(build, "PACKAGED", tmp_path / "none")
    monkeypatch.setenv("SFR_KERNELS_CACHE", str(tmp_path / "my $cache"))  # a folder may have a space in its name
    for name in (build.LIBRARY_VARIABLE, "TORCH_CUDA_ARCH_LIST", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    forget()
    backend._missing.cache_clear()
    monkeypatch.setattr(cuda, "_library", None)
    yield tmp_path
    forget()
    backend._missing.cache_clear()


def stub(folder: Path, code: int = 0) -> Path:
    """A library whose every launcher returns `code`."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    names = "".join(f"int {name}() {{ return {code}; }}\n" for name in cuda.SIGNATURES)
    source = folder / "stub.c"
    text = 'const char *sfr_error(int code) { return "no kernel image"; }\nint sfr_cluster_code() { return 0; }\n'
    source.write_text(text + names)
    out = folder / "stub.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(out)], check=True)
    return out


@pytest.fixture
def compiler(clean, monkeypatch):
    """A stand-in for nvcc, where CUDA_HOME points; its log has a line for each file it made."""
    home = clean / "cuda/bin"
    home.mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(home.parent))

    def make(body: str = "") -> Path:
        log = clean / "log"
        log.touch()
        (home / "nvcc").write_text(NVCC.format(body=body, log=log, library=stub(clean)))
        (home / "nvcc").chmod(0o755)
        return log

    return make


def launch(found: cuda.Library) -> None:
    found.scale(None, 0, None, None, 0, 0, 1, None)


def in_a_process(statement: str, **options) -> subprocess.Popen:
    """Runs it where `build` is imported and no library is packaged."""
    script = "from sfr_kernels.kernels import build; from pathlib import Path; build.PACKAGED = Path('none'); "
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script + statement]
    return subprocess.Popen(command, env=environment, stderr=subprocess.STDOUT, **options)


def test_built_once_into_the_cache_and_found_again(compiler, clean, capsys, monkeypatch):
    log = compiler()
    first = build.find()
    assert first.is_relative_to(clean / "my $cache") and log.read_text().count("built") == FILES
    assert f"compiling the CUDA kernels for {build.ARCHITECTURES}" in capsys.readouterr().err
    assert sorted(p.name for p in first.parent.iterdir()) == [build.NAME, build.NAME + ".sha256", "lock"]  # no more
    forget()
    # one that was built into an image, say, for another user
    monkeypatch.setattr(build.fcntl, "flock", lambda *_: pytest.fail("nothing is to be written"))
    assert build.find() == first and log.read_text().count("built") == FILES
    launch(cuda.library())


def test_the_key_is_sources_compiler_and_architecture(compiler, clean, monkeypatch):
    compiler()
    found = [build.find()]

    def find_again():
        forget()
        found.append(build.find())

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    find_again()
    nvcc, copy = clean / "cuda/bin/nvcc", shutil.copytree(ROOT / "csrc", clean / "csrc")
    nvcc.write_text(nvcc.read_text().replace("13.0", "13.1"))
    find_again()
    monkeypatch.setattr(build, "sources", lambda: copy)
    for name in ("reduce.cuh", "scale.cu", "launchers.h"):
        (copy / name).write_text((copy / name).read_text() + "//\n")
        find_again()
    assert len(set(found)) == 6


def test_two_processes_at_once_build_one_library(compiler, clean):
    log = compiler()
    both = [in_a_process("print('found', build.find())", stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate(timeout=120)[0] for p in both]
    assert all(p.returncode == 0 for p in both)
    assert len({re.search("found (.*)", text)[1] for text in outputs}) == 1
    assert log.read_text().count("built") == FILES
    assert sum("compiling" in text for text in outputs) == 1


def test_a_builder_that_was_killed_leaves_no_lock(compiler, clean):
    compiler(body=f"touch {clean}/began; sleep 60")
    process = in_a_process("build.find()", start_new_session=True)
    while not (clean / "began").exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.kill()
    process.wait()
    os.killpg(process.pid, signal.SIGKILL)  # what it has started
    compiler()
    assert build.find().is_file()


def test_a_failing_compiler_is_quoted_and_a_cache_that_cannot_be_written_named(compiler, clean, monkeypatch):
    compiler(body="echo 'softmax_xent.cu(12): error: no such thing' >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"compiling the CUDA kernels failed(.|\n)*no such thing"):
        build.find()
    (clean / "file").touch()
    monkeypatch.setenv("SFR_KERNELS_CACHE", str(clean / "file" / "cache"))
    with pytest.raises(RuntimeError, match=r"cannot be kept in .*SFR_KERNELS_CACHE"):
        build.find()


@pytest.mark.parametrize("change", ["cut", "empty", "flipped", "no checksum"])
def test_a_corrupt_library_is_built_anew(compiler, change):
    log = compiler()
    path = build.find()
    whole = path.read_bytes()
    flipped = bytes([*whole[:5000], whole[5000] ^ 1, *whole[5001:]])
    if change == "no checksum":
        build._checksum_of(path).unlink()
    else:
        path.write_bytes({"cut": whole[:1000], "empty": b"", "flipped": flipped}[change])
    forget()
    assert build.find().read_bytes() == whole and log.read_text().count("built") == 2 * FILES
    launch(cuda.library())


def test_another_file_is_refused(clean, monkeypatch):
    (clean / "text.so").write_text("text")
    for file, words in (
        (clean / "none.so", "is no file"),
        (clean / "text.so", r"text\.so cannot be loaded .*remove the file"),
        (_ctypes.__file__, "is not a library of these CUDA kernels"),
    ):
        monkeypatch.setenv(build.LIBRARY_VARIABLE, str(file))
        forget()
        with pytest.raises(RuntimeError, match=words):
            cuda.library()


def test_a_library_of_other_sources_or_for_another_gpu_is_refused(clean, monkeypatch):
    library = cuda.Library(stub(clean, code=209))
    with pytest.raises(RuntimeError, match=r"sfr_scale: no kernel image .*209.*TORCH_CUDA_ARCH_LIST"):
        launch(library)
    monkeypatch.setitem(cuda.SIGNATURES, "sfr_new", "p")
    with pytest.raises(RuntimeError, match="other sources: it lacks sfr_new"):
        cuda.Library(library.path)


def test_a_name_that_is_no_field_of_a_structure_is_an_error():
    assert SumByIndexArguments(n=3, x=5).width == 0
    with pytest.raises(AttributeError, match="col"):
        SumByIndexArguments(col=1)


def test_without_nvcc_the_backend_says_so(clean, monkeypatch):
    monkeypatch.setattr(build, "nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="no nvcc"):
        build.find()
    assert "no nvcc" in backend.unavailable("cuda")
    monkeypatch.setattr(build, "sources", lambda: None)
    assert "without its CUDA kernels" in build.missing()


@pytest.mark.parametrize("text", ["9", "sm_90", "9.0b", "9.0+SASS", "Hopper"])
def test_architectures_that_are_none(text):
    with pytest.raises(ValueError, match=f"TORCH_CUDA_ARCH_LIST .*{re.escape(text)}"):
        build.generated_code(f"8.0 {text}")


def test_architectures_become_options():
    assert build.generated_code("8.0;9.0a+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module; its `command_in(folder)` builds there."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("SFR_BUILD_CUDA", "0")
    spec.loader.exec_module(module)

    def command_in(folder: Path):
        extension = Extension("sfr_kernels.kernels.libsfr", [])
        command = module.BuildKernels(Distribution(dict(ext_modules=[extension])))
        command.build_lib, command.build_temp = str(folder), str(folder)
        command.ensure_finalized()
        return command

    module.command_in = command_in
    return module


@pytest.mark.parametrize("choice, there, expected", [
    ("auto", True, True), ("auto", False, False), ("0", True, False), ("1", True, True),
    ("1", False, RuntimeError), ("yes", True, ValueError),
])  # fmt: skip
def test_setup_builds_where_it_is_asked_to(choice, there, expected, setup, monkeypatch):
    monkeypatch.setenv("SFR_BUILD_CUDA", choice)
    monkeypatch.setattr(setup.build, "nvcc", lambda: "nvcc" if there else None)
    if isinstance(expected, bool):
        assert setup.wanted() is expected
    else:
        with pytest.raises(expected, match="SFR_BUILD_CUDA"):
            setup.wanted()


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_an_nvcc_that_fails_is_fatal_only_where_it_is_asked_for(choice, setup, monkeypatch, tmp_path):
    def fail(*arguments):
        raise RuntimeError("nvcc fatal: Unsupported gpu architecture")

    monkeypatch.setattr(setup.build, "compile_library", fail)
    monkeypatch.setenv("SFR_BUILD_CUDA", choice)
    kind, raised = (RuntimeError, pytest.raises) if choice == "1" else (UserWarning, pytest.warns)
    with raised(kind, match="Unsupported gpu"):
        setup.command_in(tmp_path).run()


@pytest.mark.parametrize("editable", [True, False])
def test_an_editable_install_leaves_the_kernels_to_the_first_call(editable, setup, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(setup.build, "compile_library", lambda *arguments: made.append(arguments))
    command = setup.command_in(tmp_path)
    command.editable_mode = editable
    command.run()
    assert len(made) == (not editable)


@pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing() or "")
def test_the_backend_serves_the_cpu_where_its_kernels_are_emulated(emulated, clean, monkeypatch):
    """And only where the environment names the emulation."""
    with pytest.raises(RuntimeError, match="backend='cuda' cannot serve a tensor on cpu"):
        backend.resolve_backend("cuda", torch.device("cpu"), torch.float32)
    monkeypatch.setenv(build.LIBRARY_VARIABLE, str(emulated))
    forget()
    assert backend.resolve_backend("cuda", torch.device("cpu"), torch.float32) == "cuda"
    with pytest.raises(RuntimeError, match="not float64"):
        backend.resolve_backend("cuda", torch.device("cpu"), torch.float64)

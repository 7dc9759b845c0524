"""Where the compiled kernels are: in the package, or in the user's cache, where they are built at first use if there is
nvcc. setup.py builds with the same function.

    TORCH_CUDA_ARCH_LIST          architectures, as torch's extensions take them; else 8.0, 9.0 with PTX, and 10.0
    SFR_KERNELS_CUDA_LIBRARY      a library to use instead of any other
    SFR_KERNELS_CACHE             the folder of the cache
"""

import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY_VARIABLE = "SFR_KERNELS_CUDA_LIBRARY"
# No kernel needs what 9.0a or 10.0a alone have, and code for those runs on no newer chip.
ARCHITECTURES = "8.0 9.0+PTX 10.0"
NAME = "libsfr.so"
PACKAGED = Path(__file__).with_name(NAME)
_HERE = Path(__file__).resolve()
# Files that make noise: products and sums are rounded apart, so that its bits are those of the other backends.
_UNCONTRACTED = ("flow_path", "times")


def sources() -> Path | None:
    """The folder of the kernel files: beside the package in a checkout, in it where it is installed."""
    places = (_HERE.parents[2] / "csrc", _HERE.parents[1] / "csrc")
    return next((p for p in places if (p / "softmax_xent.cu").is_file()), None)


def nvcc() -> str | None:
    homes = filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))
    folders = [*(os.path.join(home, "bin") for home in homes), os.environ.get("PATH", os.defpath)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def built() -> Path | None:
    """The library that is there without compiling anything."""
    if given := os.environ.get(LIBRARY_VARIABLE):
        return Path(given).resolve()
    return PACKAGED if PACKAGED.is_file() else None


def missing() -> str | None:
    """Why there can be no library here, or None."""
    if built() is not None:
        return None
    if sources() is None:
        return "it was installed without its CUDA kernels"
    if nvcc() is None:
        return "it was installed without compiled CUDA kernels, and there is no nvcc to compile them"
    return None


def generated_code(architectures: str) -> list[str]:
    """nvcc's options for a list such as "8.0 9.0a+PTX". ValueError for what is no architecture."""
    options = []
    for entry in filter(None, re.split(r"[\s;,]+", architectures)):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must be like '8.0 9.0a+PTX', got {entry!r} in it")
        number = match[1] + match[2]
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def compile_library(
    folder: Path, out: Path, architectures: str, compiler: str, work: Path, *, strict: bool = True
) -> None:
    """Compiles every file of `folder` in `work`, all at once where there are processors, and links `out`.

    Only what has changed since the last time, where ninja is installed. RuntimeError with the compiler's words if it
    fails; a spilled register and a warning are failures if `strict`.
    """
    flags = [
        "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--cudart=static", *generated_code(architectures),
    ]  # fmt: skip
    if strict:
        flags += ["-Xcompiler=-Wall,-Werror", "-Werror=all-warnings", "-Xptxas=-warn-spills,-Werror"]
    work.mkdir(parents=True, exist_ok=True)
    commands, objects = [], []
    for file in sorted(folder.glob("*.cu")):
        extra = ["--fmad=false"] if file.stem in _UNCONTRACTED else []
        objects.append(work / f"{file.stem}.o")
        depend = ["-MD", "-MF", f"{objects[-1]}.d"]
        commands.append([compiler, *flags, *extra, *depend, "-c", str(file), "-o", str(objects[-1])])
    link = [compiler, "-shared", "--cudart=static", *map(str, objects), "-o", str(out)]
    if ninja := shutil.which("ninja"):
        _write_ninja_file(work, commands, link)
        _run([ninja, "-C", str(work)])
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    _run(link)


def _write_ninja_file(work: Path, commands: list[list[str]], link: list[str]) -> None:
    def escape(text: str) -> str:
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def line(command: list[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    lines = ["rule run", "  command = $line", "  depfile = $out.d", "  deps = gcc", "rule link", "  command = $line"]
    for command in commands:
        lines += [f"build {escape(command[-1])}: run {escape(command[-3])}", f"  line = {line(command)}"]
    objects = " ".join(escape(command[-1]) for command in commands)
    lines += [f"build {escape(link[-1])}: link {objects}", f"  line = {line(link)}"]
    (work / "build.ninja").write_text("\n".join(lines) + "\n")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling the CUDA kernels failed: {' '.join(command)}\n{done.stdout}{done.stderr}")


@functools.cache
def find() -> Path:
    """The library of this installation; built if there is none. RuntimeError that says what to do, if that fails."""
    if (found := built()) is not None:
        if not found.is_file():
            raise RuntimeError(f"{LIBRARY_VARIABLE}={found} is no file")
        return found
    if reason := missing():
        raise RuntimeError(f"the cuda backend is not usable: {reason}")
    return _cached(sources(), nvcc())


def _cached(folder: Path, compiler: str) -> Path:
    import torch

    own = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ARCHITECTURES
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or own
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(f"{version}\n{architectures}\n{platform.machine()} {platform.libc_ver()}".encode())
    for file in [_HERE, *sorted(f for f in folder.iterdir() if f.suffix in (".cu", ".cuh", ".h"))]:
        key.update(file.name.encode() + file.read_bytes())
    home = os.environ.get("SFR_KERNELS_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sfr_kernels"
    )
    out = Path(home) / "cuda" / key.hexdigest()[:20] / NAME
    if _is_whole(out):  # in a folder that may be another user's
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time; one that ends lets the next in
            if not _is_whole(out):
                where = f"for {architectures}, once, into {out.parent}"
                print(f"sfr_kernels: compiling the CUDA kernels {where}", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory(dir=out.parent) as work:
                    made = Path(work) / NAME
                    # not strict: a spill on a chip that nobody has tried costs time, its failure all of the backend
                    compile_library(folder, made, architectures, compiler, Path(work), strict=False)
                    _checksum_of(made).write_text(_digest(made))
                    for file in (_checksum_of(made), made):
                        os.replace(file, out.parent / file.name)
    except OSError as error:
        raise RuntimeError(
            f"the CUDA kernels cannot be kept in {out.parent} ({error}): set SFR_KERNELS_CACHE to a folder that can be "
            "written"
        ) from error
    return out


def _checksum_of(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_whole(library: Path) -> bool:
    """Loading a part of a library would end the process."""
    checksum = _checksum_of(library)
    return library.is_file() and checksum.is_file() and checksum.read_text() == _digest(library)

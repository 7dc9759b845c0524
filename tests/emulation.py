"""csrc/ compiled for the CPU: the same files, with g++, emulation.h and emulation.cpp in the place of nvcc and CUDA."""

import importlib.util
import shutil
import subprocess
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "csrc"
FLAGS = ["-x", "c++", "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DSFR_EMULATION"]


def headers() -> Path | None:
    """CUDA's headers: those of nvcc, else those that Triton brings along."""
    found = []
    if nvcc := shutil.which("nvcc"):
        text = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", "none"], capture_output=True, text=True).stderr
        found += [Path(part.strip('"')[2:]) for part in text.split() if part.startswith(('"-I', "-I"))]
    if spec := importlib.util.find_spec("triton"):
        found.append(Path(spec.origin).parent / "backends/nvidia/include")
    return next((folder for folder in found if (folder / "cuda_fp16.h").is_file()), None)


def missing() -> str | None:
    if shutil.which("g++") is None:
        return "needs g++"
    return None if headers() else "needs CUDA's headers, from nvcc or Triton"


def command_of(sources: Path, *arguments: str) -> list[str]:
    """The compiler's, for what includes files of `sources`."""
    return ["g++", *FLAGS, *(f"-I{folder}" for folder in (HERE, sources, headers())), *arguments]


def compile_emulation(
    folder: Path, sources: Path = SOURCES, *, built: Path | None = None, changed: Collection[str] = ()
) -> Path:
    """A library of every kernel in `folder`; where kernel files have `changed`, with what was `built` of the others."""

    def compile_one(file: Path) -> str:
        if built is not None and file.name not in changed:
            return str(built / f"{file.stem}.o")
        out = str(folder / f"{file.stem}.o")
        command = command_of(sources, "-c", str(file), "-o", out)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    with ThreadPoolExecutor(2) as pool:
        # what has changed first: of a function that several files have from a header, the linker takes the first
        files = [*sources.glob("*.cu"), HERE / "emulation.cpp"]
        files.sort(key=lambda file: (file.name not in changed, file.name))
        objects = list(pool.map(compile_one, files))
    out = folder / "libemulated.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(out)], check=True)
    return out

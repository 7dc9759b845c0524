"""Builds the CUDA kernels of csrc/ into the package; metadata lives in pyproject.toml.

    SFR_BUILD_CUDA=auto   if nvcc is there (the default)
    SFR_BUILD_CUDA=1      or fail
    SFR_BUILD_CUDA=0      never

Architectures: TORCH_CUDA_ARCH_LIST, else those of kernels/build.py. The kernels are called through ctypes and link
neither torch nor Python: one wheel serves every version of both, with a driver that knows nvcc's CUDA version.
"""

import importlib.util
import os
import shutil
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("build", ROOT / "sfr_kernels/kernels/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def wanted() -> bool:
    choice = os.environ.get("SFR_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise ValueError(f"SFR_BUILD_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "1" and build.nvcc() is None:
        raise RuntimeError("SFR_BUILD_CUDA=1, but there is no nvcc on PATH or under CUDA_HOME")
    return choice != "0" and build.nvcc() is not None


class BuildKernels(build_ext):
    def run(self):
        if not self.editable_mode:  # there, the first call compiles the sources as they then are
            super().run()

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")[:-1], build.NAME)

    def build_extension(self, extension):
        out = Path(self.get_ext_fullpath(extension.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or build.ARCHITECTURES
        try:
            build.compile_library(ROOT / "csrc", out, architectures, build.nvcc(), ROOT / "build" / "kernels")
        except RuntimeError as error:  # an nvcc that is too old, say
            if os.environ.get("SFR_BUILD_CUDA") == "1":
                raise
            warnings.warn(f"installed without compiled CUDA kernels: {error}", stacklevel=2)


class WithSources(build_py):
    """Puts csrc/ into the package, so that it can be compiled at first use, and benchmarks/, so that it can be run."""

    def run(self):
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "sfr_kernels"
            without = shutil.ignore_patterns("results", "__pycache__")  # which are a checkout's
            for folder in ("csrc", "benchmarks"):
                shutil.rmtree(package / folder, ignore_errors=True)  # of an earlier build
                shutil.copytree(ROOT / folder, package / folder, ignore=without)


class AnyPython(bdist_wheel):
    """Of this platform, if kernels are in it, and for every Python."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return ("py3", "none", platform)


setup(
    ext_modules=[Extension("sfr_kernels.kernels.libsfr", [])] if wanted() else [],
    cmdclass={"build_ext": BuildKernels, "build_py": WithSources, "bdist_wheel": AnyPython},
)

"""Where a result comes from: the device and its clocks, the versions, the revision."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from sfr_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("triton", "numpy", "transformers", "sentence-transformers", "peft", "liger-kernel", "cut-cross-entropy",
            "quack-kernels")  # fmt: skip
CLOCKS = dict(sm_mhz="clocks.sm", memory_mhz="clocks.mem", max_sm_mhz="clocks.max.sm",
              max_memory_mhz="clocks.max.mem", power_limit_w="power.limit")  # fmt: skip


def described(device: torch.device) -> dict:
    """Device, versions, revision and date, as a result file has them. Of a copy without .git the revision is what
    SFR_KERNELS_REVISION says it is a copy of."""
    sha, modified = os.environ.get("SFR_KERNELS_REVISION"), None
    if (ROOT / ".git").exists():
        sha = _output("git", "rev-parse", "HEAD")
        modified = bool(_output("git", "status", "--porcelain", "--untracked-files=no")) if sha else None
    versions = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)
    there = {d.name.lower().replace("_", "-"): d.version for d in reversed([*metadata.distributions()])}
    versions |= {name.removesuffix("-kernels").replace("-", "_"): there.get(name) for name in PACKAGES}
    return dict(date=datetime.now(UTC).isoformat(timespec="seconds"), version=__version__, revision=sha,
                modified=modified, device=device_of(device), versions=versions)  # fmt: skip


def device_of(device: torch.device) -> dict:
    """Name, capability, memory, driver and clocks; of a CPU its name and threads."""
    if device.type == "cuda":
        it = torch.cuda.get_device_properties(device)
        found = dict(name=it.name, capability=f"{it.major}.{it.minor}", memory_bytes=it.total_memory)
        found |= dict(driver=_query("driver_version"), clocks=clocks())
    else:
        info = Path("/proc/cpuinfo")
        name = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.M)
        name = name[1].strip() if name else platform.processor() or platform.machine()
        found = dict(name=name, capability=None, memory_bytes=None, driver=None, clocks=None)
    return found | dict(kind=device.type, threads=torch.get_num_threads())


def clocks() -> dict[str, float | None] | None:
    """What the GPU runs at this moment, and what it may; None where nvidia-smi does not say."""
    line = _query(",".join(CLOCKS.values()))
    numbers = [float(text) if re.fullmatch(r"\s*[\d.]+\s*", text) else None for text in (line or "").split(",")]
    return dict(zip(CLOCKS, numbers, strict=False)) if line else None


def _query(fields: str) -> str | None:
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    line = _output("nvidia-smi", f"--id={index}", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return line.splitlines()[0].strip() if line else None


def _output(*command: str) -> str | None:  # what it prints, None if it is not there or fails
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

"""Where a result comes from: the device and its clocks, the versions, the revision."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# distributions by the names that people import
PACKAGES = {
    "triton": "triton", "transformers": "transformers", "sentence_transformers": "sentence-transformers",
    "peft": "peft", "liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
}  # fmt: skip
_CLOCKS = dict(
    sm_mhz="clocks.sm", memory_mhz="clocks.mem", max_sm_mhz="clocks.max.sm", max_memory_mhz="clocks.max.mem",
    power_limit_w="power.limit",
)  # fmt: skip


def device_of(device: torch.device) -> dict:
    """Name, capability, memory and driver; of a CPU its name and threads."""
    found = dict(name=cpu_name(), kind="cpu", capability=None, memory_bytes=None, driver=None, clocks=None)
    found["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= dict(name=properties.name, kind="cuda", capability=f"{properties.major}.{properties.minor}")
        found |= dict(memory_bytes=properties.total_memory, driver=_query("driver_version"), clocks=clocks())
    return found


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def clocks() -> dict[str, float] | None:
    """What the GPU runs at this moment, and what it may; None where nvidia-smi does not say."""
    line = _query(",".join(_CLOCKS.values()))
    if line is None:
        return None
    found = {}
    for name, text in zip(_CLOCKS, line.split(","), strict=False):
        try:
            found[name] = float(text)
        except ValueError:  # "[N/A]"
            found[name] = None
    return found


def _query(fields: str) -> str | None:
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    line = output("nvidia-smi", f"--id={index}", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return line.splitlines()[0].strip() if line else None


def versions() -> dict[str, str | None]:
    found = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)
    return found | {name: version(distribution) for name, distribution in PACKAGES.items()}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def revision() -> dict:
    """The revision of the checkout, and whether tracked files differ from it. Of a copy without .git, what
    SFR_KERNELS_REVISION says it is a copy of; else None."""
    if not (ROOT / ".git").exists():
        return dict(revision=os.environ.get("SFR_KERNELS_REVISION"), modified=None)
    sha = output("git", "rev-parse", "HEAD")
    modified = bool(output("git", "status", "--porcelain", "--untracked-files=no")) if sha else None
    return dict(revision=sha, modified=modified)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def output(*command: str) -> str | None:
    """What a command prints, None if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

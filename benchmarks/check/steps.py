"""Commands that a check runs beside its own measurements: each has a limit of time, and says how it ended."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sfr_kernels.ops.dispatch import unavailable

ROOT = Path(__file__).resolve().parents[2]


class Step:
    """A command that has been started, in a process group of its own. Its output goes to a file, so that nothing waits
    for a reader."""

    def __init__(self, name: str, command: list[str], **environment: str):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.name, self.started = name, time.monotonic()
        self.log = tempfile.NamedTemporaryFile(prefix="sfr-step-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def finish(self, deadline: float, *, live: bool = False) -> dict:
        """Waits until `deadline` (of time.monotonic), then stops it. The output is shown as it comes, or else at the
        end and only if the command failed. Returns an entry for a result file."""
        text, in_time = "", True
        with open(self.log.name, errors="replace") as file:
            while True:
                done = self.process.poll() is not None
                new = file.read()
                text += new
                if live and new:
                    print(new, end="", flush=True)
                if done:
                    break
                if time.monotonic() > deadline:
                    in_time = False
                    self.stop()
                time.sleep(0.05)
        code, seconds = self.process.returncode, time.monotonic() - self.started
        lines = [line for line in text.splitlines() if line.strip()]
        detail = lines[-1].strip() if lines else "no output"
        detail = detail if in_time else f"stopped after {seconds:.0f} s, its last line: {detail}"
        if code and not live:
            print(text, end="", flush=True)
        self.log.close()
        return dict(name=self.name, ok=code == 0, exit_code=code, seconds=round(seconds, 1), detail=detail)

    def stop(self) -> None:
        """Ends the command and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def gpu_tests() -> list[tuple[str, list[str], dict[str, str]]]:
    """pytest commands and their environments: the tests marked `gpu`, in the files that have any (others may need
    packages that a GPU machine lacks), and those of each backend's kernels, which run natively where there is a GPU."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    marked = [str(f.relative_to(ROOT)) for f in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu" in f.read_text()]
    steps = [("GPU tests", [*pytest, "-m", "gpu", *marked], {})]
    for backend in ("triton", "cuda"):
        if unavailable(backend) is None:
            steps.append((f"{backend} kernels", [*pytest, "tests/triton_leaves"], {"SFR_TEST_LEAVES": backend}))
    return steps

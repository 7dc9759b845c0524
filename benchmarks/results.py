"""Result files: what one run measured, and where; and tables made from them.

    python -m benchmarks.results benchmarks/results/FILE.json

A file is rewritten whole after each row, into a temporary file that then takes its place: a run that is killed leaves
what it had.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from .peers import COMPILED, EAGER

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"


def environment(device: torch.device) -> dict:
    """Where and when: the device, the versions, the revision."""
    found = dict(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=platform.processor() or platform.machine(),
        capability=None,
        driver=None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda,
        revision=_output("git", "rev-parse", "HEAD"),
        modified=None,
    )
    if found["revision"]:
        found["modified"] = bool(_output("git", "status", "--porcelain", "--untracked-files=no"))
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.splitlines()[0] if driver else None
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, None if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class ResultFile:
    """The JSON file of one run, on disk from the first row on."""

    def __init__(self, folder: Path, name: str, device: torch.device):
        self.content = dict(name=name, environment=environment(device), steps=[], rows=[])
        where = re.sub(r"[^a-z0-9]+", "-", self.content["environment"]["device"].lower()).strip("-")
        when = re.sub(r"[-:]|\+.*", "", self.content["environment"]["date"])
        self.path = folder / f"{name}-{where}-{when}.json"

    def add(self, kind: str, entry: dict) -> None:  # kind: "steps" or "rows"
        self.content[kind].append(entry)
        write(self.path, self.content)


def write(path: Path, content: dict) -> None:
    """All of it or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(as_json(content))
        os.chmod(temporary, 0o644)  # mkstemp gives the file to its owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def as_json(content: dict) -> str:
    """Strict JSON, an entry of a list on each line."""

    def dump(value) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"
        return json.dumps(value, allow_nan=False)

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {dump(value)}" for key, value in content.items()) + "\n}\n"


def read(path: Path) -> dict:
    return json.loads(Path(path).read_text())


COLUMNS = (
    "op", "shape", "dtype", "candidate", "error", "eager's", "of bound", "worst at", "ms", "spread", "issue ms",
    "graph ms", "floor ms", "of floor", "eager / it", "compiled / it", "peer / it", "extra MiB", "buffers", "lm_heads",
    "",
)  # fmt: skip


def cells(row: dict, peers: dict[str, float]) -> list[str]:
    """A row as the table shows it; what was not measured stays empty. peers: milliseconds of the published ways."""

    def number(value, form: str) -> str:
        return "" if value is None else format(value, form)

    def ratio(above, below, form: str) -> str:
        return format(above / below, form) if above and below else ""

    worst = row.get("errors", {}).get(row.get("worst"), {})
    ms, graph, floor, extra = (row.get(key) for key in ("ms", "graph_ms", "floor_ms", "extra_bytes"))
    return [
        row["op"],
        row["label"],
        row["dtype"],
        row["candidate"],
        number(worst.get("ours"), ".1e"),
        number(worst.get("eager"), ".1e"),
        number(worst.get("ratio"), ".2f"),
        row.get("worst") or "",
        number(ms, ".3f"),
        number(row.get("spread_ms"), ".3f"),
        number(row.get("issue_ms"), ".3f"),
        number(graph, ".3f"),
        number(floor, ".3f"),
        " / ".join(filter(None, [ratio(floor, ms, ".0%"), ratio(floor, graph, ".0%")])),
        ratio(peers.get(EAGER), ms, ".2f"),
        ratio(peers.get(COMPILED), ms, ".2f"),
        "" if row.get("peer") else ratio(peers.get("fastest"), ms, ".2f"),
        "" if extra is None else f"{extra / 2**20:.0f}",
        number(row.get("extra_buffers"), ".1f"),
        number(row.get("weight_units"), ".2f"),
        "ok" if row["ok"] else "FAILED",
    ]


def table(rows: list[dict]) -> str:
    """The rows as a markdown table, its columns lined up; those that are empty throughout are left out."""

    def problem(row):
        return row["op"], row["label"], row["dtype"]

    peers = {}
    for row in rows:
        if row["candidate"] in (EAGER, COMPILED) and row.get("ms"):
            peers.setdefault(problem(row), {})[row["candidate"]] = row["ms"]
        if row.get("peer") and row.get("ms"):
            known = peers.setdefault(problem(row), {})
            known["fastest"] = min(row["ms"], known.get("fastest", row["ms"]))
    body = [list(COLUMNS), *(cells(row, peers.get(problem(row), {})) for row in rows)]
    kept = [i for i in range(len(COLUMNS)) if any(line[i] for line in body[1:])]
    widths = [max(len(line[i]) for line in body) for i in kept]
    lines = ["| " + " | ".join(line[i].ljust(w) for i, w in zip(kept, widths, strict=True)) + " |" for line in body]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


LEGEND = """\
error, eager's: relative L2 error against float64 of the output that comes nearest to its bound ("worst at"), and that
of eager torch in the same dtype; "of bound" must not exceed 1. ms: median of forward + backward, launched, cold L2;
spread: between the quartiles; issue ms: what the launches cost the CPU; graph ms: the same call in a CUDA graph.
of floor: the time of the matrix products alone over ms / over graph ms. eager / it, compiled / it: how many times as
long the published loss takes; peer / it: the fastest peer. extra: peak memory beyond inputs and gradients; the same in
buffers of (n, max(d, D)), and in lm_head weights."""


def render(content: dict) -> str:
    """Where it ran, the steps, and the table."""
    e = content["environment"]
    parts = [("driver", e["driver"]), ("CUDA", e["cuda"]), ("torch", e["torch"]), ("triton", e["triton"])]
    versions = ", ".join(f"{name} {value}" for name, value in [*parts, ("Python", e["python"])] if value)
    revision = f"revision {e['revision'][:12]}{' with changes' if e['modified'] else ''}, " if e["revision"] else ""
    lines = [f"{e['device']}, {versions}, {revision}{e['date']}"]
    for step in content["steps"]:
        lines.append(f"{step['name']}: {'ok' if step['ok'] else 'FAILED'}, {step['seconds']:.0f} s: {step['detail']}")
    failed = [
        f"FAILED: {row['op']} {row['label']} {row['dtype']}, {row['candidate']}: {row['failure']}"
        for row in content["rows"]
        if not row["ok"]
    ]
    return "\n".join([*lines, "", table(content["rows"]), "", LEGEND, *failed])


if __name__ == "__main__":
    print(*(render(read(Path(name))) for name in sys.argv[1:]), sep="\n\n")

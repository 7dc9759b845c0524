"""Files of the check on a GPU: what one run found, and where; and tables made from them.

    python -m benchmarks.check.results benchmarks/results/FILE.json

A file is rewritten whole after each row, into a temporary file that then takes its place: a run that is killed leaves
what it had.
"""

import json
import re
import sys
from pathlib import Path

import torch

from sfr_kernels.atomic import write_atomically

from ..harness.as_json import as_json
from ..harness.environment import ROOT, device_of, now, revision, versions

FOLDER = ROOT / "benchmarks" / "results"


def environment(device: torch.device) -> dict:
    """Where and when: the device, the versions, the revision."""
    where = device_of(device)
    kept = {name: where[name] for name in ("capability", "driver")} | dict(device=where["name"])
    return dict(date=now(), **kept, **versions(), **revision())


class ResultFile:
    """The JSON file of one run, on disk from the first row on."""

    def __init__(self, folder: Path, name: str, device: torch.device):
        self.content = dict(name=name, environment=environment(device), steps=[], rows=[])
        where = re.sub(r"[^a-z0-9]+", "-", self.content["environment"]["device"].lower()).strip("-")
        when = re.sub(r"[-:]|\+.*", "", self.content["environment"]["date"])
        self.path = folder / f"{name}-{where}-{when}.json"

    def add(self, kind: str, entry: dict) -> None:  # kind: "steps" or "rows"
        self.content[kind].append(entry)
        write_atomically(self.path, as_json(self.content).encode())


def read(path: Path) -> dict:
    return json.loads(Path(path).read_text())


COLUMNS = (
    "op", "shape", "dtype", "candidate", "error", "eager's", "of bound", "worst at", "ms", "spread", "floor ms",
    "of floor", "",
)  # fmt: skip


def cells(row: dict) -> list[str]:
    """A row as the table shows it; what was not measured stays empty."""

    def number(value, form: str) -> str:
        return "" if value is None else format(value, form)

    worst = row.get("errors", {}).get(row.get("worst"), {})
    ms, floor = row.get("ms"), row.get("floor_ms")
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
        number(floor, ".3f"),
        format(floor / ms, ".0%") if floor and ms else "",
        "ok" if row["ok"] else "FAILED",
    ]


def table(rows: list[dict]) -> str:
    """The rows as a markdown table, its columns lined up; those that are empty throughout are left out."""
    body = [list(COLUMNS), *(cells(row) for row in rows)]
    kept = [i for i in range(len(COLUMNS)) if any(line[i] for line in body[1:])]
    widths = [max(len(line[i]) for line in body) for i in kept]
    lines = ["| " + " | ".join(line[i].ljust(w) for i, w in zip(kept, widths, strict=True)) + " |" for line in body]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


LEGEND = """\
error, eager's: relative L2 error against float64 of the output that comes nearest to its bound ("worst at"), and that
of eager torch in the same dtype; "of bound" must not exceed 1. Of the experiments, ms: median, launched, cold L2;
spread: between the quartiles; floor: what cannot be avoided, measured in the same run."""


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

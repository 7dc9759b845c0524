"""A result file, read: the JSON lines that `loop.py` writes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..case import PRODUCTS

KEY, GONE = ["op", "label", "dtype", "provider"], ["failed", "absent", "skipped"]
RESULT = [*KEY, "kind", "ms", "samples_ms", "sizes", "axes", "worth"]
NEEDED = {"run": ["date", "version", "selection", "versions"], "result": RESULT, "failed": [*KEY, "kind", "reason"],
          "absent": [*KEY, "kind", "reason"], "skipped": [*KEY[:3], "reason"], "case": KEY[:3], "end": []}  # fmt: skip
COLUMNS = [*RESULT, "reference", "ratios", "issue_ms", "flops", "traffic", "peak_bytes", "weight_bytes", "held_bytes",
           "goals", "error", "of_bound", "size", "parts", "tokens_per_s", "segments_per_s",
           "of_reference", "low", "high", "of_products"]  # fmt: skip
DRAWS, EFFECTIVE_ROUNDS = 2000, 30  # neighbouring rounds are not independent: no more of them count


@dataclass(frozen=True)
class Results:
    name: str
    run: dict  # the last line of its kind
    facts: dict[str, str | int | None]  # "device", versions, clocks, …
    about: str  # the same in a line
    warnings: list[str]
    complete: bool
    frame: pd.DataFrame  # COLUMNS of every result
    gone: list[dict]  # the lines of GONE, ours first


def read(path: Path | str) -> Results:
    """OSError; ValueError naming the file and the line that is not of a result file."""
    found, run, kind = {}, None, ""
    *lines, _half = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(lines or [""], 1):
        try:
            line = json.loads(text)
            kind, run = line["line"], line if line["line"] == "run" else run
            lacking = {*NEEDED[kind]} - {*line} | {"name", "kind"} - {*run["device"]}
            if lacking or (kind == "result" and not all(ms > 0 for ms in [line["ms"], *(line["samples_ms"] or [0])])):
                raise ValueError(f"lacks {', '.join(sorted(lacking)) or 'times above 0'}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is not one of a result file: {error!r}") from None
        found[tuple(line.get(name) for name in KEY)] = line  # a resumed run's outcome replaces what was there
    results = {key: line for key, line in found.items() if line["line"] == "result"}
    gone = [x for x in found.values() if x["line"] in GONE]
    gone.sort(key=lambda x: (x.get("kind") != "ours", GONE.index(x["line"])))
    frame = pd.DataFrame([_related(*item, results) for item in results.items()], columns=COLUMNS)
    device, is_gpu = run["device"], run["device"]["kind"] == "cuda"
    threads = "" if is_gpu else f", threads: {device.get('threads')}"
    facts = {"device": device["name"] + threads, **run["versions"], **(device.get("clocks") or {})}
    facts |= {"sfr_kernels": run["version"], "revision": run.get("revision"), "selection": run["selection"]}
    about = ", ".join(f"{name} {value}" for name, value in {**facts, "of": run["date"][:10]}.items() if value)
    warnings = [] if is_gpu else ["These are times of a CPU: they say nothing of a GPU."]
    warnings += ["The code had changed since that revision."] * bool(run.get("modified"))
    cut = "the time was up" if any(x["line"] == "skipped" for x in gone) else "the run did not end"
    warnings += [f"Cases are missing: {cut}."] * (kind != "end")
    return Results(Path(path).name, run, facts, about, warnings, kind == "end", frame, gone)


def _related(key: tuple, line: dict, results: dict[tuple, dict]) -> dict:
    """A result beside its case's reference and products, with its worst error over its bound."""
    held = line.get("peak_bytes", math.nan) + line.get("resident_bytes", 0)
    row = {"goals": {}, "parts": {}, "ratios": [], **line, "held_bytes": held}
    if reference := results.get((*key[:3], line.get("reference"))):
        row["ratios"] = [x / y for x, y in zip(line["samples_ms"], reference["samples_ms"], strict=False)]
        row["low"], row["high"] = np.quantile(medians(row["ratios"], np.random.default_rng(0)), (0.005, 0.995))
        row["of_reference"] = np.median(row["ratios"])
    if products := results.get((*key[:3], PRODUCTS)):
        row["of_products"] = np.median(
            [x / y for x, y in zip(line["samples_ms"], products["samples_ms"], strict=False)]
        )
    if errors := line.get("errors"):  # a ratio of null: not finite
        found = [(math.inf if e["ratio"] is None else e["ratio"], e["ours"]) for e in errors.values()]
        row["of_bound"], row["error"] = max(found, key=lambda pair: pair[0])
    return row


def medians(values: list[float], rng: np.random.Generator) -> np.ndarray:  # (DRAWS,): what the median might have been
    return np.median(rng.choice(values, (DRAWS, min(len(values), EFFECTIVE_ROUNDS))), axis=1)

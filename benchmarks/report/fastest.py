"""Which backend `auto` takes for a leaf: the faster one of a result file, written to leaves/fastest.json."""

import json
from pathlib import Path

from sfr_kernels.atomic import write_atomically
from sfr_kernels.leaves import fastest

from .resultfile import load

RIVALS = ("cuda", "triton")


def choices(content: dict) -> list[dict]:
    """For each leaf and size that two backends were measured at: the faster one, by the sum over the shapes. What a
    small call costs is its time on the GPU or on the CPU, whichever is longer."""
    found = {}
    for entry in content["benchmarks"]:
        info, ms = entry["extra_info"], 1e3 * entry["stats"]["median"]
        if "size" in info and info["provider"] in RIVALS:  # leaves alone have one
            ms = max(ms, info["issue_ms"]) if info["size"] == "small" else ms
            of_backend = found.setdefault((info["op"], info["size"]), {}).setdefault(info["provider"], {})
            of_backend[info["label"], info["dtype"]] = ms
    table = []
    for (leaf, size), of_backend in sorted(found.items()):
        both = set.intersection(*(set(times) for times in of_backend.values()))
        if len(of_backend) == len(RIVALS) and both:
            ms = {name: round(sum(times[case] for case in both), 5) for name, times in of_backend.items()}
            table.append(dict(leaf=leaf, size=size, backend=min(ms, key=ms.get), ms=ms))
    return table


def choose(path: Path) -> None:
    """Writes the choices of a result file, in the place of those for the same compute capability. ValueError if it
    was not measured on a GPU."""
    content = load(path)
    capability = content["sfr_kernels"]["device"]["capability"]
    if capability is None:
        raise ValueError(f"{path} was not measured on a GPU")
    new = [dict(capability=capability, **row, origin=Path(path).name) for row in choices(content)]
    kept = [row for row in json.loads(fastest.FILE.read_text()) if row["capability"] != capability]
    rows = ",\n".join(json.dumps(row) for row in kept + new)
    write_atomically(fastest.FILE, f"[\n{rows}\n]\n".encode())

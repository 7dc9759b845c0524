"""Which backend `auto` takes for a kernel, by a result file: CUDA's if it is 5% faster; to kernels/fastest.json."""

import json
from pathlib import Path

from sfr_kernels.atomic import write_atomically
from sfr_kernels.kernels import backend

from .data import read


def choose(path: Path | str) -> None:
    """By the sum over the shapes of both. A small call costs its time on the GPU or the CPU, whichever is longer."""
    results, name = read(path), Path(path).name
    if (capability := results.run["device"].get("capability")) is None:
        raise ValueError(f"{path} was not measured on a GPU")
    frame = results.frame[results.frame["size"].notna()]
    frame = frame.assign(ms=frame.ms.where(frame["size"] != "small", frame[["ms", "issue_ms"]].max(axis=1)))
    both = frame.pivot(index=["op", "size", "label", "dtype"], columns="provider", values="ms")
    both = both.reindex(columns=["cuda", "triton"]).dropna().groupby(level=["op", "size"]).sum().round(5)
    rows = [row for row in json.loads(backend.FASTEST.read_text()) if row["capability"] != capability]
    for (kernel, size), ms in both.iterrows():
        found = "cuda" if ms["cuda"] <= 0.95 * ms["triton"] else "triton"
        rows.append(dict(capability=capability, kernel=kernel, size=size, backend=found, ms=ms.to_dict(), origin=name))
        print(f"{kernel}, {size}: {found} (cuda takes {ms['cuda'] / ms['triton']:.3f} of triton's time)")
    write_atomically(backend.FASTEST, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())

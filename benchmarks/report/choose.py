"""Which backend `auto` takes for a kernel: the faster one of a result file, written to kernels/fastest.json."""

import json
from pathlib import Path

from sfr_kernels.atomic import write_atomically
from sfr_kernels.kernels import backend

from .data import read


def choose(path: Path | str) -> None:
    """By the sum over the shapes of both. A small call costs its time on the GPU or the CPU, whichever is longer."""
    results = read(path)
    if (capability := results.run["device"].get("capability")) is None:
        raise ValueError(f"{path} was not measured on a GPU")
    frame = results.frame[results.frame["size"].notna()]
    frame = frame.assign(ms=frame.ms.where(frame["size"] != "small", frame[["ms", "issue_ms"]].max(axis=1)))
    both = frame.pivot(index=["op", "size", "label", "dtype"], columns="provider", values="ms")
    both = both.reindex(columns=["cuda", "triton"]).dropna().groupby(level=["op", "size"]).sum().round(5)
    rows = [row for row in json.loads(backend.FASTEST.read_text()) if row["capability"] != capability]
    of = dict(capability=capability, origin=results.name)
    for (kernel, size), ms in both.iterrows():
        rows.append(dict(kernel=kernel, size=size, backend=ms.idxmin(), ms=ms.to_dict(), **of))
    write_atomically(backend.FASTEST, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())

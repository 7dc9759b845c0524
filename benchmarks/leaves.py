"""The leaf kernels of each backend beside a copy of the same bytes: `make bench-leaves`.

    python -m benchmarks.leaves [--device cuda|cpu] [--seconds 1] [--out FOLDER]
    python -m benchmarks.leaves --choose RESULT_FILE     # what `auto` takes on such a GPU: leaves/fastest.json
    python -m benchmarks.leaves --readme                 # README's table, from the newest result file of a GPU

Each result is compared with float64 first: it may err half again as much as the torch leaf in the same dtype. Then the
backends and the copy take turns, from a cold L2. `issue ms` is what a call cost the CPU.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sfr_kernels.leaves import FlowPath, fastest
from sfr_kernels.ops.dispatch import leaves, unavailable

from .errors import FACTOR, FLOOR, message
from .problems import Problem, Shape
from .results import FOLDER, ROOT, ResultFile, read
from .speed import measure
from .timing import Candidate, compare

BACKENDS = ("cuda", "triton", "torch")
COPY = "copy"
MARKS = "<!-- leaves -->", "<!-- /leaves -->"
SMALL_FLOW = Shape(2, 512, 4096, 0.75)


@dataclass(frozen=True)
class Case:
    """One leaf at one shape, and what is wanted of the cuda backend there."""

    leaf: str
    n: int
    width: int
    share: float | None = None  # of the copy's bandwidth, at least
    most_ms: float | None = None


def cases(device: torch.device) -> list[Case]:
    if device.type != "cuda":
        return [Case(leaf, 5, 96) for leaf in MAKERS]
    rows = ("flow_path", "norm_act", "norm_act_backward", "flow_mse")
    return [
        *(Case(leaf, n, 1024, 0.8 if n == 8192 else None) for leaf in rows for n in (512, 8192)),
        Case("softmax_xent", 4096, 128256, most_ms=0.85),
        Case("softmax_xent", 4096, 32000, 0.8),
        Case("softmax_xent", 1024, 256000, 0.8),
        Case("softmax_xent", 64, 32000),
    ]


@dataclass
class Work:
    """A call of a leaf on tensors of its own."""

    run: Callable[[object], list[Tensor]]  # of the leaves of a backend; its results
    restore: Callable[[], object]  # puts back what it writes over
    bytes: int
    first: object  # the argument that says in which class of size it is


@dataclass
class Numbers:
    """Where the tensors of a case come from: the same numbers for every dtype, rounded to `rounded` first."""

    n: int
    width: int
    device: torch.device
    rounded: torch.dtype
    dtype: torch.dtype

    def __post_init__(self):
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.wide = torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=self.rounded, device=self.device).normal_(generator=self.generator)
        return drawn.to(self.dtype)

    def integers(self, most: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(most, (self.n,), dtype=dtype, device=self.device, generator=self.generator)

    def path(self) -> FlowPath:
        anchors = max(1, self.n // 32)
        targets = self.normal(anchors, self.width) / self.width**0.5
        anchor, index = (self.integers(k, torch.int32) for k in (anchors, 256))
        times = torch.arange(0.5, 256, device=self.device, dtype=self.wide) / 256
        identity, seed = torch.arange(self.n, device=self.device), torch.ones(1, dtype=torch.int64, device=self.device)
        return FlowPath(targets, times, identity, anchor, index, seed, self.width**0.5, 1.0)


def flow_path(x: Numbers) -> Work:
    path = x.path()
    moved = (x.n + len(path.targets)) * x.width * x.dtype.itemsize
    return Work(lambda k: [k.flow_path(path, x.dtype)], lambda: None, moved, path)


def flow_mse(x: Numbers) -> Work:
    path, source, coefficient = x.path(), x.normal(x.n, x.width), x.normal(x.n).to(x.wide)
    v = source.clone()
    moved = (2 * x.n + len(path.targets)) * x.width * x.dtype.itemsize
    return Work(lambda k: [*k.flow_mse(v, path, coefficient), v], lambda: v.copy_(source), moved, v)


def norm_act(x: Numbers) -> Work:
    y, residual = (x.normal(x.n, x.width) for _ in range(2))
    gamma, beta = x.normal(x.width), x.normal(x.width)
    return Work(lambda k: list(k.norm_act(y, gamma, beta, residual=residual)), lambda: None, 3 * y.nbytes, y)


def norm_act_backward(x: Numbers) -> Work:
    y, dout = (x.normal(x.n, x.width) for _ in range(2))
    gamma, beta = x.normal(x.width), x.normal(x.width)
    mean, rstd = y.to(x.wide).mean(1), y.to(x.wide).var(1, correction=0).add(1e-5).rsqrt()
    dy = torch.empty_like(y)
    return Work(
        lambda k: list(k.norm_act_backward(dout, y, gamma, beta, mean, rstd, dy=dy)), lambda: None, 3 * y.nbytes, dout
    )


def softmax_xent(x: Numbers) -> Work:
    source, labels = x.normal(x.n, x.width), x.integers(x.width, torch.int64)
    logits = source.clone()
    return Work(
        lambda k: [k.softmax_xent(logits, labels)[0], logits], lambda: logits.copy_(source), 2 * logits.nbytes, logits
    )


MAKERS = {f.__name__: f for f in (flow_path, norm_act, norm_act_backward, flow_mse, softmax_xent)}


def wrong(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """What a backend gets wrong at a case of at most 256 rows; None if nothing."""
    found = []
    for name, kind in ((backend, dtype), ("torch", dtype), ("torch", torch.float64)):
        work = MAKERS[case.leaf](Numbers(min(case.n, 256), case.width, device, dtype, kind))
        found.append([t.double() for t in work.run(leaves(name)) if t is not None])
    for number, (ours, eager, exact) in enumerate(zip(*found, strict=True)):
        error, bound = (ours - exact).norm(), FACTOR * (eager - exact).norm() + FLOOR * exact.norm()
        if not error <= bound:
            return f"result {number} errs by {error:.3g}, allowed {bound:.3g}"
    return None


def run(case: Case, backends: list[str], dtype: torch.dtype, device: torch.device, seconds: float) -> list[dict]:
    """The rows of a case: those that are right beside the copy, in turn."""
    work = MAKERS[case.leaf](Numbers(case.n, case.width, device, dtype, dtype))
    size = fastest.size_of(work.first)
    common = dict(op=case.leaf, label=f"n{case.n} w{case.width}", size=size, dtype=str(dtype)[6:], bytes=work.bytes)
    failures, raised = {}, {}
    for backend in backends:
        try:
            failures[backend] = wrong(case, backend, dtype, device)
        except Exception as error:  # one that fails must not hide the others
            failures[backend] = message(error)
    room = torch.empty(2, work.bytes // 2, dtype=torch.uint8, device=device)
    candidates = {COPY: Candidate(lambda: room[0].copy_(room[1]))}
    for backend in backends:
        if failures[backend] is None:
            candidates[backend] = Candidate(partial(work.run, leaves(backend)), work.restore)
    times = compare(candidates, device, seconds, raised)
    failures |= {name: message(error) for name, error in raised.items()}
    found = []
    for backend in backends:
        row = common | dict(candidate=backend, failure=failures[backend], ok=failures[backend] is None)
        if backend in times:
            time, copy = times[backend], times[COPY]
            ms = dict(ms=time.ms, spread_ms=time.spread_ms, issue_ms=time.issue_ms, floor_ms=copy.ms)
            row |= {name: round(value, 5) for name, value in ms.items()} | dict(runs=time.runs)
            row["terabytes_per_second"] = round(work.bytes / time.ms / 1e9, 3)
        if backend == "cuda" and device.type == "cuda":
            row["misses"] = misses(case, row)
        found.append(row)
    return found


def misses(case: Case, row: dict) -> list[str]:
    """What the cuda backend should have reached and did not, or nobody knows."""
    if not row.get("ms"):
        return ["not measured"]
    found = []
    if case.share and row["floor_ms"] < case.share * row["ms"]:
        found.append(f"{row['floor_ms'] / row['ms']:.2f} of the copy's bandwidth, wanted {case.share}")
    if case.most_ms and row["ms"] > case.most_ms:
        found.append(f"{row['ms']:.3f} ms, wanted {case.most_ms}")
    return found


def choices(content: dict) -> list[dict]:
    """For each leaf and size that two backends were measured at: the faster one, by the sum over the shapes. What a
    small call costs is its time on the GPU or on the CPU, whichever is longer."""
    found = {}
    for row in content["rows"]:
        if row["op"] in MAKERS and row["candidate"] in ("cuda", "triton") and row.get("ms"):
            ms = max(row["ms"], row["issue_ms"]) if row["size"] == "small" else row["ms"]
            found.setdefault((row["op"], row["size"]), {}).setdefault(row["candidate"], {})[row["label"]] = ms
    table = []
    for (leaf, size), of_backend in sorted(found.items()):
        both = set.intersection(*(set(times) for times in of_backend.values()))
        if len(of_backend) == 2 and both:
            ms = {name: round(sum(times[label] for label in both), 5) for name, times in of_backend.items()}
            table.append(dict(leaf=leaf, size=size, backend=min(ms, key=ms.get), ms=ms))
    return table


def choose(path: Path) -> None:
    """Writes the choices of a result file into leaves/fastest.json, in the place of those for the same capability."""
    content = read(path)
    capability = content["environment"]["capability"]
    if capability is None:
        raise ValueError(f"{path} was not measured on a GPU")
    new = [dict(capability=capability, **row, origin=Path(path).name) for row in choices(content)]
    kept = [row for row in json.loads(fastest.FILE.read_text()) if row["capability"] != capability]
    fastest.FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept + new) + "\n]\n")


def table() -> str:
    """README's table: backend, leaf and time, from the newest result file of a GPU."""
    files = [f for f in sorted(FOLDER.glob("leaves-*.json")) if read(f)["environment"]["capability"]]
    if not files:
        return "No leaf has been timed on a GPU yet: there is no table to show. `make bench-leaves` makes one."
    newest = max(files, key=lambda f: read(f)["environment"]["date"])
    where, rows = read(newest)["environment"], [r for r in read(newest)["rows"] if r["op"] in MAKERS and r.get("ms")]
    lines = [
        f"{where['device']}, torch {where['torch']}, {where['date'][:10]} (`benchmarks/results/{newest.name}`):",
        "",
    ]
    lines += ["| leaf | shape | dtype | backend | ms | of a copy's bandwidth |", "|---|---|---|---|---|---|"]
    for r in rows:
        cells = (r["op"], r["label"], r["dtype"], r["candidate"], f"{r['ms']:.4f}", f"{r['floor_ms'] / r['ms']:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """README with the table between its marks."""
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def flow_loss(backends: list[str], device: torch.device, seconds: float) -> list[dict]:
    """The flow loss at a size where launching is what it costs, through the public function."""
    problem = Problem("flow_matching_loss", SMALL_FLOW, torch.bfloat16, device)
    found, raised = measure(problem, backends, seconds=seconds)
    rows = []
    for backend in backends:
        row = dict(op="flow_matching_loss", label=SMALL_FLOW.label("flow_matching_loss"), dtype="bfloat16")
        row |= dict(candidate=backend, failure=raised.get(backend), ok=backend not in raised) | found.get(backend, {})
        if backend == "cuda":
            row["misses"] = misses(Case("flow_matching_loss", 0, 0, most_ms=0.25), row)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="leaves", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each row (default %(default)g)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file (default %(default)s)")
    parser.add_argument("--choose", type=Path, help="take what this result file says is fastest")
    parser.add_argument("--readme", action="store_true", help="write README's table")
    options = parser.parse_args(argv)
    if options.choose:
        choose(options.choose)
        return 0
    if options.readme:
        path = ROOT / "README.md"
        path.write_text(with_table(path.read_text()))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("leaves: needs an NVIDIA GPU, and torch sees none (--device cpu tries the harness)", file=sys.stderr)
        return 2
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    reasons = {b: unavailable(b, device, dtype) for b in BACKENDS}
    for backend, reason in reasons.items():
        if reason:
            print(f"{backend} is left out: {reason}")
    backends = [b for b in BACKENDS if not reasons[b]]
    file = ResultFile(options.out, "leaves", device)
    parts = [lambda c=c: run(c, backends, dtype, device, options.seconds) for c in cases(device)]
    if device.type == "cuda":
        parts.append(lambda: flow_loss(backends, device, options.seconds))
    for part in parts:
        for row in part():
            words = [row["op"], row["label"], row["candidate"], row["failure"] or ""]
            words += [f"{row['ms']:.4f} ms, copy {row['floor_ms']:.4f}"] if row.get("ms") else []
            print(", ".join(filter(None, words + row.get("misses", []))), flush=True)
            file.add("rows", row)
    failed = [row for row in file.content["rows"] if row["failure"] or row.get("misses")]
    print(f"{len(failed)} of {len(file.content['rows'])} rows failed or missed their target. Kept in {file.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Cross-entropy of a linear layer and the joint loss at the shapes of large models: `make bench-decoder`.

    python -m benchmarks.decoder [--device cuda|cpu] [--minutes 10] [--seconds 3] [--out FOLDER]

Each row's result is first compared with float64; then ours, what people use instead, and the matrix products alone take
turns. On a CPU the same shapes are scaled down: absolute times mean little there, but a ratio that moves does.
"""

import argparse
import faulthandler
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from sfr_kernels.ops.dispatch import unavailable

from .decoder_peers import missing
from .gpu_check import Case, check, progress
from .problems import Shape
from .results import FOLDER, ResultFile, render

BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("torch",)}

# Tokens in sequences, H, V, share supervised; times of the products alone that forward and backward may take, and how
# many times as long the fastest peer must take at least; for a trained and for a frozen lm_head.
LLAMA = Shape(4, 2048, 4096, 0.5, vocab=128256)
SHAPES = (
    (LLAMA, (1.09, 1.9), (1.10, 1.9)),
    (replace(LLAMA, supervised=1.0), (1.10, 1.0), (1.10, None)),
    (Shape(2, 2048, 2048, 0.5, vocab=151936), (1.12, 1.9), (1.15, None)),
    (Shape(8, 2048, 2048, 0.5, vocab=248320), (1.20, None), (1.15, None)),
)
ROW_MINUTES = 10.0  # the longest that a row may take that was begun in time
MEMORY = {False: 2.5, True: 0.5}  # most bytes beyond the returned gradients, in lm_heads; by whether it is frozen
SMALL = dict(of_floor=1.25, peer=None, units=0.3)  # chunks of H / 8 rows, accumulated in the weight's dtype
ON_CPU = dict(of_floor=2.2, peer=None, units=4.0)  # measured: 1.3 to 1.7, and 3.0
JOINT = dict(of_floor=1.10, peer=1.0, units=None)  # its peer is the two ops one after the other


def cases(device: torch.device, seconds: float) -> list[tuple[Case, dict]]:
    """Each case with its targets; on a CPU coarse ones, and a sixteenth of the tokens and classes, an eighth of H."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    found = []
    for shape, *targets in SHAPES:
        shape = shape if on_gpu else scaled(shape)
        for frozen, (of_floor, peer) in zip((False, True), targets, strict=True):
            problem = replace(shape, frozen=frozen)
            case = Case("linear_cross_entropy", problem, dtype, draws=1, peers=True, seconds=seconds)
            found.append((case, dict(of_floor=of_floor, peer=peer, units=MEMORY[frozen])))
    shape = SHAPES[0][0] if on_gpu else scaled(SHAPES[0][0])
    small = Case("linear_cross_entropy", shape, dtype, draws=1, seconds=seconds, small=True)
    found.append((small, SMALL))
    for frozen in (False, True):
        joint = Case("sfr_loss", replace(shape, frozen=frozen), dtype, draws=1, peers=True, seconds=seconds)
        found.append((joint, JOINT))
    return found if on_gpu else [(case, ON_CPU) for case, _ in found]


def scaled(shape: Shape) -> Shape:
    sizes = dict(target_size=64, width=64)
    return replace(
        shape, length=shape.length // 16, hidden_size=shape.hidden_size // 8, vocab=shape.vocab // 16, **sizes
    )


def misses(row: dict, targets: dict, fastest: float | None) -> list[str]:
    """What a row of ours should have reached and did not, or nobody knows."""
    found = []
    if not row.get("ms"):
        return ["not measured"] if targets else found
    if (limit := targets.get("of_floor")) and row["ms"] > limit * row["floor_ms"]:
        found.append(f"{row['ms'] / row['floor_ms']:.2f} × floor, wanted {limit}")
    if least := targets.get("peer"):
        if fastest is None:
            found.append("no peer was measured")
        elif fastest < least * row["ms"]:
            found.append(f"fastest peer / ours {fastest / row['ms']:.2f}, wanted {least}")
    if (limit := targets.get("units")) and row["weight_units"] > limit:
        found.append(f"{row['weight_units']:.2f} lm_heads of memory, wanted {limit}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="decoder", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no row after this (default %(default)g)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each row (default %(default)g)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file (default %(default)s)")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("decoder: needs an NVIDIA GPU, and torch sees none (--device cpu)", file=sys.stderr)
        return 2
    # a kernel that hangs cannot be interrupted from Python; every row before it is in the file
    faulthandler.dump_traceback_later(60 * (options.minutes + ROW_MINUTES), exit=True, file=sys.__stderr__)
    try:
        return run(options, device)
    finally:
        faulthandler.cancel_dump_traceback_later()


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Measures every case into one file; 1 if anything failed or missed its target."""
    start, backends = time.monotonic(), tuple(b for b in BACKENDS[device.type] if unavailable(b) is None)
    file = ResultFile(options.out, "decoder", device)
    if absent := missing(device):
        print(f"Not installed, or not for this device, and so not compared: {', '.join(absent)}")
        file.content["missing_peers"] = absent
    missed = []
    for case, targets in cases(device, options.seconds):
        if time.monotonic() > start + 60 * options.minutes:
            reason = f"not run: {options.minutes:g} minutes did not suffice (--minutes)"
            rows = [case.fields | dict(candidate=b, ok=False, failure=reason) for b in backends]
        else:
            rows = check(case, backends, device, quick=False)
        fastest = min((row["ms"] for row in rows if row.get("peer") and row.get("ms")), default=None)
        for row in rows:
            print(progress(row), flush=True)
            if not row.get("peer"):
                row["targets"], row["misses"] = targets, misses(row, targets, fastest)
                missed += [f"{row['op']} {row['label']} {row['candidate']}: {text}" for text in row["misses"]]
            file.add("rows", row)
    print(f"\n{render(file.content)}\n")
    print("\n".join(["Missed:", *missed]) if missed else "No target missed, of the peers that were measured.")
    failed = missed + [row for row in file.content["rows"] if not row["ok"] and not row.get("peer")]
    print(f"Kept in {file.path}, after {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m benchmarks.collapse world|personas: runs an experiment, or goes on with one."""

import argparse
from pathlib import Path

import torch


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collapse", description=__doc__)
    parser.add_argument("experiment", choices=("world", "personas"))
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"), help="folder of what is kept on the way")
    parser.add_argument("--results", type=Path, help="result file")
    parser.add_argument("--arms", nargs="+", help="their names, as in the result file; if left out all, or the chosen")
    parser.add_argument("--worlds", type=_count, default=5)
    parser.add_argument("--seeds", type=_count, help="4 of each world; 3 of the personas, 10 on a GPU, if left out")
    parser.add_argument("--workers", type=_count, default=max(torch.get_num_threads(), 1), help="processes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.results or args.out / f"{args.experiment}.jsonl"
    if args.experiment == "world":
        from .trial import FIRST, experiment

        worlds = range(FIRST, FIRST + args.worlds)
        experiment(path, args.out, args.arms, worlds, args.seeds or 4, args.workers)
    else:
        from .personas import experiment

        experiment(path, args.out, args.arms, args.seeds, args.workers)


if __name__ == "__main__":
    main()

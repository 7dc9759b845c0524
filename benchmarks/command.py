"""Measures, shows a table and writes a report; compares results, and shows old ones (benchmarks/README.md).

    bench                       the main cases of each op, the joint loss and a training step: within five minutes
    bench --full                every case, in the order of their worth
    bench --only softmax_xent   of all cases, those that contain it as a word: op, label, dtype
    bench compare A B           what got slower from A to B; exit status 1 if something of ours did
    bench report FILE           the table and the report of a result file
    bench choose FILE           takes the kernels that FILE measured to be fastest for `auto`
Exit status: 0, 1 if something of ours was wrong or failed, 2 if it could not be run.
"""

import argparse
import math
import re
import shutil
import signal
import sys
from pathlib import Path

import torch

from . import loop

MINUTES = 5.0  # of the quick selection


def main(argv: list[str]) -> int:
    if argv[:1] == ["compare"]:
        from .report import compare

        return compare.main(argv[1:])
    if argv[:1] in (["report"], ["choose"]):
        parser = argparse.ArgumentParser(prog=f"sfr_kernels bench {argv[0]}")
        parser.add_argument("file", type=Path)
        path = parser.parse_args(argv[1:]).file
        if argv[0] == "report":
            return 0 if show(path) else 2
        from .report.choose import choose

        choose(path)
        return 0
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="sfr_kernels bench", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--full", action="store_true", help="every case")
    add("--only", action="append", default=[], metavar="TEXT", help="those with these words; again for more")
    add("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    add("--minutes", type=float, help="stop after this (default 5; without limit with --full or --only)")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the results (default %(default)s)")
    add("--resume", type=Path, metavar="FILE", help="go on with a result file that was not finished")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & would have it ignore
    if args.resume is not None:  # what was selected then
        if args.full or args.only or args.device:
            parser.error("--resume goes on with what was selected: without --full, --only and --device")
        head = loop.lines_of(args.resume)[0]
        args.full, args.only, args.device = head["full"], head["only"], head["device"]["kind"]
    if args.device == "cuda" and not torch.cuda.is_available():
        print("sfr_kernels bench: torch sees no GPU", file=sys.stderr)
        return 2
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    minutes = args.minutes if args.minutes is not None else math.inf if args.full or args.only else MINUTES
    head = loop.described(args.device, args.full, tuple(args.only))
    name, date = re.sub(r"[^a-z0-9]+", "-", head["device"]["name"].lower()), re.sub(r"[-:]|\+.*", "", head["date"])
    path = args.resume or args.out / f"bench-{name.strip('-')}-{date}.jsonl"
    try:
        fine = loop.measure(path, head, minutes)
    except KeyboardInterrupt:
        print(f"\nbench --resume {path} goes on from there", file=sys.stderr)
        raise
    show(path)
    return 0 if fine else 1


def show(path: Path) -> bool:
    """The table, and the report beside the file: whether this machine has the packages for both."""
    print(f"Kept in {path}")
    try:
        from .report import data, tables

        results = data.read(path)
        print(tables.show(results, shutil.get_terminal_size().columns))
        from .report import page

        page.write(results, path.with_suffix(".html"))
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: pip install 'sfr_kernels[bench]', then bench report {path}")
        return False
    print(f"\nThe report is {path.with_suffix('.html')}")
    return True

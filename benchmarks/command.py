"""`python -m sfr_kernels bench`: measures, shows a table and writes a report; compares results, and shows old ones.

    bench                       the five-minute selection, on a GPU if there is one
    bench --full                every case
    bench --only softmax_xent   of the selection, those that contain it as a word: op, label, dtype
    bench compare A B           what got slower from A to B; exit status 1 if something of ours did
    bench report FILE           the table and the report of a result file
    bench choose FILE           takes the leaves that FILE measured to be fastest for `auto`

Exit status: 0, 1 if something of ours was wrong or failed, 2 if it could not be run.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from .harness.environment import device_of, now
from .harness.runner import Run, measure, path_in, reported
from .report import compare, fastest
from .report.resultfile import load

FOLDER = Path("runs/bench")


def main(argv: list[str]) -> int:
    commands = {"compare": compare.main, "report": _report, "choose": _choose}
    if argv[:1] and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return _bench(argv)


def _bench(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sfr_kernels bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--full", action="store_true", help="every case, not the five-minute selection")
    add(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="of the cases, those with these words; again for more",
    )
    add("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    add("--minutes", type=float, help="begin no case after this (default 5, without limit with --full or --only)")
    add("--seconds", type=float, help="of timing for each case, in place of its own")
    add("--out", type=Path, default=FOLDER, help="folder of the result file and the report (default %(default)s)")
    add("--resume", type=Path, metavar="FILE", help="go on with a result file that was not finished")
    args = parser.parse_args(argv)
    for module in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    if args.resume is not None:  # what was selected then
        own = load(args.resume)["sfr_kernels"]
        args.full, args.only, args.device = own["full"], own["only"], own["device"]["kind"]
    if args.device == "cuda" and not torch.cuda.is_available():
        print("sfr_kernels bench: torch sees no GPU", file=sys.stderr)
        return 2
    before = None if args.resume is None else reported(args.resume)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    minutes = args.minutes
    if minutes is None and not (args.full or args.only):
        minutes = 5.0
    path = args.resume or path_in(args.out, device_of(device)["name"], now())
    try:
        measured = measure(Run(path, device.type, args.full, tuple(args.only), minutes, args.seconds))
    except KeyboardInterrupt:
        print(f"\nbench --resume {path} goes on from there", file=sys.stderr)
        raise
    if not path.is_file() or (measured and reported(path) == before):
        print(measured, file=sys.stderr)
        return 2
    return show(path, measured)


def show(path: Path, problem: str | None = None) -> int:
    """Prints the table and writes the report beside the file. What is measured on a machine without the packages for
    either is shown on one that has them."""
    content = load(path)
    print(f"Kept in {path}")
    for shown in (_table, _page):
        try:
            shown(content, path)
        except ModuleNotFoundError as error:
            print(f"{error.name} is not installed: pip install 'sfr_kernels[bench]', then bench report {path}")
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem or any(row["ours"] for row in content["sfr_kernels"]["failed"]) else 0


def _table(content: dict, path: Path) -> None:
    from .report.terminal import render

    render(content)


def _page(content: dict, path: Path) -> None:
    from .report.page import write_report

    write_report(content, path.with_suffix(".html"))
    print(f"\nThe report is {path.with_suffix('.html')}")


def _report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sfr_kernels bench report", description="Shows a result file.")
    parser.add_argument("file", type=Path)
    args = parser.parse_args(argv)
    show(args.file)
    return 0


def _choose(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sfr_kernels bench choose", description="Writes leaves/fastest.json.")
    parser.add_argument("file", type=Path)
    fastest.choose(parser.parse_args(argv).file)
    return 0

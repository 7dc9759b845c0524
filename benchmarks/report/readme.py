"""Writes the tables of README.md, the training step alone, and of benchmarks/README.md, all of them, from the committed
result files; with --check, only says which are not current, with exit status 1."""

import re
import sys
from dataclasses import replace
from pathlib import Path

from sfr_kernels.atomic import write_atomically

from ..case import MORE, WHOLE
from .data import KEY, read
from .tables import LEGEND, goals, missing, of_op, render, summary

ROOT, FOLDER = Path(__file__).resolve().parents[2], "benchmarks/results"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
SHORT = "case", "", "time", "× reference", "tokens/s", "peak memory", "targets' share"
SHORT_LEGEND = """\
★: the fastest. Time: the median. × reference: the median of the rounds' ratios to the case's reference, with a 99% \
bootstrap interval. Peak memory: with model and optimizer. Targets' share: of the time."""
SECTIONS = {"": (("training_step",), WHOLE), "benchmarks/": ((), MORE)}  # folder: (ops, or all; up to which worth)


def account(root: Path, ops: tuple[str, ...], worth: int) -> str:
    """Of every GPU, else of every CPU, the newest result of each case of these ops (none: of all), file by file."""
    found = [x for x in map(read, (root / FOLDER).glob("bench-*.jsonl")) if not ops or x.frame.op.isin(ops).any()]
    found.sort(key=lambda x: x.run["date"])
    found, parts = [x for x in found if x.run["device"]["kind"] == "cuda"] or found, []
    cases = lambda x: [(x.facts["device"], *case) for case in x.frame[KEY[:3]].itertuples(index=False)]  # noqa: E731
    newest = {case: x.name for x in found for case in cases(x)}
    for x in reversed(found):
        frame = x.frame.assign(newest=[newest[case] == x.name for case in cases(x)]).astype(dict(newest=bool))
        frame = frame[frame.newest & (frame.worth <= worth) & (frame.op.isin(ops) if ops else True)]
        gone = [g for g in x.gone if newest.get((x.facts["device"], *(g[key] for key in KEY[:3])), x.name) == x.name]
        if len(frame) or (gone and not ops):
            listed = [of_op(op, frame) for op in dict.fromkeys(frame.op)]
            mine = replace(x, frame=frame, gone=gone)
            listed += [] if ops else [summary(mine), missing(mine), goals(frame)]
            parts += [f"{x.about} ({x.name}).", *(f"**{warning}**" for warning in x.warnings)]
            parts += [render(table, "markdown", columns=SHORT if ops else ()) for table in listed]
    parts += [SHORT_LEGEND if ops else LEGEND] if parts else ["Nothing of this has been measured yet."]
    return "\n\n".join(parts)


def main(argv: list[str], root: Path = ROOT) -> int:
    """ValueError naming marks that are not there once, in order."""
    old, new = {folder: (root / folder / "README.md").read_text() for folder in SECTIONS}, {}
    for folder, which in SECTIONS.items():
        parts = re.split(f"({BEGIN}|{END})", old[folder])
        if parts[1::2] != [BEGIN, END]:
            raise ValueError(f"{folder}README.md needs {BEGIN} and {END}, in order and once each")
        new[folder] = "".join([*parts[:2], f"\n{account(root, *which)}\n", *parts[3:]])
    for folder in (folder for folder in old if old[folder] != new[folder]):
        print(f"{folder}README.md is not what the result files say")
        if "--check" not in argv:
            write_atomically(root / folder / "README.md", new[folder].encode())
    return int("--check" in argv and old != new)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

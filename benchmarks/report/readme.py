"""README's tables and figures, from the committed result files.

    python -m benchmarks.report.readme            writes them between README's marks, and draws the figures
    python -m benchmarks.report.readme --check    exit status 1, saying what is not that of the files

Shown is, of every GPU, the newest complete file in `benchmarks/results` that has every case, or while there is none the
newest complete one; while there is none of a GPU, the same of every CPU.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sfr_kernels.atomic import write_atomically

from . import figures
from .accounts import account, targets_account
from .resultfile import date_of, device_of, is_gpu, load

ROOT = Path(__file__).resolve().parents[2]
README, FOLDER = "README.md", "benchmarks/results"  # below the root
FIGURES = f"{FOLDER}/figures"
TARGETS = ("targets", "collation")  # ops that have a section of their own
NOTHING = (
    "Nothing of this has been measured yet: no complete result file in `benchmarks/results` has it. "
    "`python -m sfr_kernels bench` makes one."
)


@dataclass(frozen=True)
class Plot:
    path: str  # below the root
    shows: str
    data: list[dict]
    draw: Callable[[list[dict], Path], None]


def sources(root: Path, targets: bool) -> dict[str, dict]:
    """Name → content of the files that are shown, where they have benchmarks of targets, or have others."""
    chosen = {}
    for path in sorted((root / FOLDER).glob("bench-*.json")):
        content = load(path)
        has = any((entry["extra_info"]["op"] in TARGETS) == targets for entry in content["benchmarks"])
        if has and content["sfr_kernels"].get("complete"):
            known = chosen.get(device_of(content))
            if known is None or _rank(content, targets) >= _rank(known[1], targets):
                chosen[device_of(content)] = path.name, content
    found = dict(chosen.values())
    return {name: content for name, content in found.items() if is_gpu(content)} or found


def _rank(content: dict, targets: bool) -> tuple[bool, str]:
    """Files with every case of what is shown come before all others, then the newest."""
    most, *only = (content["sfr_kernels"].get("selection") or "").split(", ")
    return most == "full" and (not only or (targets and set(TARGETS) <= set(only))), date_of(content)


def plots_of(content: dict) -> list[Plot]:
    device = device_of(content)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    found = [
        Plot(f"{FIGURES}/limit-{slug}.svg", f"Time in units of the limit, ours and the fastest peer's, on {device}",
             figures.limits(content), figures.draw_limits),
        Plot(f"{FIGURES}/step-{slug}.svg", f"The parts of a training step on {device}", figures.parts(content),
             figures.draw_parts),
    ]  # fmt: skip
    return [plot for plot in found if plot.data]


def sections(root: Path) -> dict[str, str]:
    """Mark → what stands between it and its end."""
    bench = [
        account(name, content, {plot.path: plot.shows for plot in plots_of(content)})
        for name, content in sources(root, targets=False).items()
    ]
    targets = [targets_account(name, content) for name, content in sources(root, targets=True).items()]
    return {mark: "\n\n".join(parts) or NOTHING for mark, parts in (("bench", bench), ("targets", targets))}


def plots(root: Path) -> list[Plot]:
    return [plot for content in sources(root, targets=False).values() for plot in plots_of(content)]


def with_sections(text: str, found: dict[str, str]) -> str:
    """README with its sections replaced. ValueError naming a mark that is not there once, and in order."""
    for mark, section in found.items():
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"{README} needs {begin} and {end} after it, once each: the section goes between them")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"
    return text


def stale(root: Path) -> list[Path]:
    """Figures that no file is the source of."""
    return sorted({*(root / FIGURES).glob("*.svg")} - {root / plot.path for plot in plots(root)})


def write(root: Path) -> None:
    path = root / README
    text = with_sections(path.read_text(), sections(root))
    for plot in plots(root):
        if figures.drawn_digest(root / plot.path) != figures.digest(plot.data):
            plot.draw(plot.data, root / plot.path)
    for left in stale(root):
        left.unlink()
    write_atomically(path, text.encode())


def differences(root: Path) -> list[str]:
    """What `write` would change, in words; empty where nothing would."""
    text = (root / README).read_text()
    changed = difflib.unified_diff(text.splitlines(), with_sections(text, sections(root)).splitlines(), README,
                                   "what the result files say", n=0, lineterm="")  # fmt: skip
    found = list(changed)
    for plot in plots(root):
        if figures.drawn_digest(root / plot.path) != figures.digest(plot.data):
            found.append(f"{plot.path} does not show what the result files say")
    return found + [f"{path.relative_to(root).as_posix()} has no result file" for path in stale(root)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    options = parser.parse_args(argv)
    try:
        if not options.check:
            write(ROOT)
            return 0
        found = differences(ROOT)
    except (OSError, ValueError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return 2
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

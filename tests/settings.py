"""Writes what tests show into sfr_kernels/training/README.md; with --check, only says whether it is written there.

    python -m tests.settings

A test says which setting of which trainer it shows by a marker, which a case of a parametrized test may have, too:

    @pytest.mark.setting("Trainer", "label smoothing")                      # it works, and the test compares values
    @pytest.mark.setting("Trainer", "compute_loss_func", outcome="refused")  # an error says what to do
    @pytest.mark.engine("Trainer", "FSDP2", "LoRA")                          # an engine, with what adapters

What no test shows is untested. The architectures are those of the tables in test_own_loss.py.
"""

import argparse
import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
README = TESTS.parent / "sfr_kernels/training/README.md"
TRAINERS = ("Trainer", "SFRTrainer", "accelerate", "Lightning", "own loop")
OUTCOMES = ("tested", "refused")

Settings = dict[tuple[str, ...], dict[str, str]]  # {(name,) or (engine, adapters): {trainer: outcome}}
TABLES = {"setting": ("setting",), "engine": ("engine", "adapters")}  # by marker: what its rows are named by


class Collector:
    """A plugin of pytest that reads the markers of the tests it collects."""

    def __init__(self):
        self.settings: dict[str, Settings] = {table: {} for table in TABLES}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for table in TABLES:
                for mark in item.iter_markers(table):
                    try:
                        self.add(table, *mark.args, **mark.kwargs)
                    except (TypeError, ValueError) as error:
                        raise pytest.UsageError(f"{item.nodeid}: {error}") from error

    def add(self, table: str, trainer: str, *row: str, outcome: str = "tested") -> None:
        for what, given, known in (("trainer", trainer, TRAINERS), ("outcome", outcome, OUTCOMES)):
            if given not in known:
                raise ValueError(f"the {what} of a setting must be one of {', '.join(known)}, got {given!r}")
        if len(row) != len(TABLES[table]):
            raise ValueError(f"{table} needs {' and '.join(TABLES[table])} after the trainer, got {row}")
        if self.settings[table].setdefault(row, {}).setdefault(trainer, outcome) != outcome:
            raise ValueError(
                f"{', '.join(row)} is said to be both tested and refused with {trainer}: name two settings"
            )


def collected(files: list[Path]) -> dict[str, Settings]:
    """What the tests of these files show, by table. RuntimeError if one of them cannot be collected."""
    collector, said = Collector(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        options = ["--collect-only", "-qq", "-s", "-m", "", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        code = pytest.main([*options, *map(str, files)], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests could not be collected:\n{said.getvalue()}")
    return collector.settings


def settings_table(table: str, settings: Settings) -> str:
    columns = [*TABLES[table], *TRAINERS]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in sorted(settings, key=lambda names: [name.lower() for name in names]):
        lines.append(f"| {' | '.join([*row, *(settings[row].get(t, 'untested') for t in TRAINERS)])} |")
    return "\n".join(lines)


def architectures(accepted, refused) -> str:
    return f"Loss and gradients compared: {', '.join(accepted)}.\n\nRefused: {', '.join(refused)}."


def sections() -> dict[str, str]:
    """Mark → what stands between it and its end."""
    marked = [f for f in sorted(TESTS.glob("test_*.py")) if re.search(r"mark\.(setting|engine)\b", f.read_text())]
    shown = {f"{table}s": settings_table(table, found) for table, found in collected(marked).items()}
    tables = importlib.import_module("test_own_loss")  # which pytest has made importable
    return shown | {"architectures": architectures(tables.ACCEPTED, tables.REFUSED)}


def with_sections(text: str, found: dict[str, str]) -> str:
    """A document with its sections replaced. ValueError naming a mark that is not there once."""
    for mark, section in found.items():
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        whole = f"{begin}\n{section}\n{end}"
        text, count = re.subn(f"{begin}.*?{end}", lambda _, whole=whole: whole, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{README} needs {begin} and {end} after it, once each: the section goes between them")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.settings", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    check = parser.parse_args(arguments).check
    before = README.read_text()
    after = with_sections(before, sections())
    if not check:
        README.write_text(after)
    elif before != after:
        print(f"{README} is not what the tests show: python -m tests.settings", file=sys.stderr)
    return int(check and before != after)


if __name__ == "__main__":
    sys.exit(main())

"""The loop over the cases: each in a process of its own, by worth, its lines appended to the file when it is done.

A crash, a hang or a dead GPU costs whoever was running its place in the case: it is put down as failed, and the others
race again without it. A run that was stopped has written what it had, and is gone on with.
"""

import contextlib
import importlib
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sfr_kernels.kernels.backend import unavailable
from sfr_kernels.kernels.build import find

from . import machine
from .case import WHOLE, Case, Suite
from .jobs import Job, Tell, run
from .race import MAKING, race

BENCHES = tuple(f"{__package__}.bench_{what}" for what in ("kernels", "losses", "training_step", "targets"))
SILENCE = dict(cuda=90.0, cpu=300.0)  # seconds for which one provider may run before that is called hanging


def suite_of(bench: str) -> Suite:
    return importlib.import_module(bench).SUITE


def entered(bench: str, case: Case, device: torch.device) -> dict[str, str | None]:
    """Providers of a case, and why they cannot run here."""
    known = suite_of(bench).providers(device)
    return {name: why for name, why in known.items() if case.providers is None or name in case.providers}


def selected(device: torch.device, full=False, only=(), benches=None) -> list[tuple[str, Case]]:
    """Benches and cases by worth. only: those that contain one of these texts as whole words, of all cases."""
    found = [(bench, case) for bench in benches or BENCHES for case in suite_of(bench).cases(device)]
    if only:
        words = re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in only))
        found = [pair for pair in found if words.search(pair[1].name)]
    elif not full:
        found = [pair for pair in found if pair[1].worth <= WHOLE]
    return sorted(found, key=lambda pair: pair[1].worth)


def lines_of(path: Path) -> list[dict]:
    """Of a result file, else ValueError; half a line at its end, of a process that was killed, is none."""
    *lines, _ = path.read_text().split("\n")
    try:
        found = [json.loads(line) for line in lines]
    except ValueError:
        found = []
    if not found or found[0].get("line") != "run":
        raise ValueError(f"{path} is not a result file")
    return found


def described(device: str, full: bool = False, only: tuple[str, ...] = ()) -> dict:
    """The first line of a result file."""
    selection = f"only {', '.join(only)}" if only else "full" if full else "quick"
    where = machine.described(torch.device(device))
    return dict(line="run", selection=selection, full=full, only=list(only), **where)


def compile_kernels(device: torch.device) -> None:  # those of csrc/, once, in nobody's time
    if device.type == "cuda" and unavailable("cuda", device) is None:
        with contextlib.suppress(Exception):  # who needs them says what is wrong
            find()


def measure(
    path: Path,  # of the result file; what it has already is not measured again. Beside it a .log of what cases print
    head: dict,  # its first line, which says what is selected
    minutes: float = math.inf,  # after which no case begins, and the one that runs is stopped
    benches: tuple[str, ...] | None = None,  # modules with a SUITE each; None: BENCHES
) -> bool:
    """Whether nothing of ours failed. ValueError where nothing is selected, or the file is of another run."""
    from tqdm import tqdm  # which not every machine that runs the check has

    until, device = time.monotonic() + 60 * minutes, torch.device(head["device"]["kind"])
    cases = selected(device, head["full"], tuple(head["only"]), benches)
    if not cases:
        raise ValueError(f"no case contains {' or '.join(head['only'])}")
    done = _gone_on_with(path, head) if path.exists() else set()
    waiting, log, silence = deque(), path.with_suffix(".log"), SILENCE[device.type]
    for bench, case in cases:
        if case.name not in done:
            waiting.append(Job(case.name, _race, (bench, case, device), {}, case.time_limit, silence, log))
    compile_kernels(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(waiting), unit="case", dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10.0)
    fine, reason = True, f"the time was up (--minutes {minutes:g})"
    with open(path, "a") as file, contextlib.closing(bar):
        _write(file, [head])
        for lines in _outcomes(waiting, until, bar):
            fine &= not any(line["line"] == "failed" and line["kind"] == "ours" for line in lines)
            _write(file, lines)
            bar.update(lines[-1]["line"] == "case")
        skipped = [dict(line="skipped", **job.arguments[1].fields, reason=reason) for job in waiting]
        _write(file, skipped or [dict(line="end")])
    return fine


def _outcomes(waiting: deque[Job], until: float, bar) -> Iterator[list[dict]]:
    """Lines of the cases as they come to an end, a "case" after all of one; those that do not are left in `waiting`."""
    lines, everyone, who = [], {}, MAKING
    for job, said in run(waiting, until=until):
        case = job.arguments[1]
        if isinstance(said, dict):
            who, everyone, lines = said.get("begin", who), said.get("everyone", everyone), said.get("lines", lines)
            bar.set_description_str(job.name, refresh=False)
            bar.set_postfix_str(who, refresh=sys.stderr.isatty())
            continue
        closing = [dict(line="case", **case.fields)]
        if lines:  # all was measured, however the process ended
            yield lines + closing
        elif said.late:
            waiting.appendleft(job)
        else:
            bar.write(f"{job.name}, {who}: {said.reason} (see {job.log})", file=sys.stderr)
            hung = not said.reason.startswith("time limit")  # who runs when that is reached need not be who was slow
            culprits = {who: everyone[who]} if hung and who in everyone else everyone or {who: "ours"}
            about = dict(line="failed", **case.fields, reason=said.reason)
            lost = [about | dict(provider=name, kind=kind) for name, kind in culprits.items()]
            if again := len(culprits) < len(everyone):  # the others, once more
                waiting.appendleft(replace(job, arguments=(*job.arguments, who)))
            yield lost if again else lost + closing
        lines, everyone, who = [], {}, MAKING


def _race(tell: Tell, bench: str, case: Case, device: torch.device, *without: str) -> None:
    """In a process of its own: a case."""
    suite, providers = suite_of(bench), entered(bench, case, device)
    able = [name for name, why in providers.items() if not why]
    tell(dict(everyone={name: suite.kind(name) for name in (*able, *suite.bounds) if name not in without}))
    tell(dict(lines=race(suite, case, device, providers, without, tell.begin)))


def _gone_on_with(path: Path, head: dict) -> set[str]:
    """Names of the cases that the file has. ValueError if it is of another run."""

    def flat(head: dict) -> dict:
        parts = (head, head["device"], head["versions"])
        return {k: v for part in parts for k, v in part.items() if k not in ("date", "device", "versions", "clocks")}

    first, *lines = lines_of(path)
    was, now = flat(first), flat(head)
    if differing := [f"{name} {was.get(name)}, now {now[name]}" for name in now if was.get(name) != now[name]]:
        raise ValueError(f"{path} cannot be gone on with: {', '.join(differing)}")
    text = path.read_bytes()
    os.truncate(path, text.rfind(b"\n") + 1)
    return {f"{x['op']}: {x['label']}, {x['dtype']}" for x in lines if x["line"] == "case"}


def _write(file, lines: list[dict]) -> None:
    file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())

"""The loop over the cases: each in a process of its own, in the order of their worth, its lines appended to the result
file when it is done.

A crash, a hang or a dead GPU costs whoever was running its place in the case: it is put down as failed, and the others
race again without it. A run that was stopped has written what it had, and is gone on with.
"""

import contextlib
import importlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import machine
from .case import WHOLE, Case, Suite
from .jobs import Ended, Job, run
from .race import MAKING, race

BENCHES = ("kernels", "losses", "training_step", "targets", "experiments")
SILENCE = 120.0  # seconds for which a provider may run before that is called hanging
SAME = ("version", "revision", "modified", "selection")  # of a run that is gone on with; device and versions, too


def suite_of(bench: str) -> Suite:
    return importlib.import_module(f".bench_{bench}", __package__).SUITE


def entered(bench: str, case: Case, device: torch.device) -> dict[str, str | None]:
    """Providers of a case, and why they cannot run here."""
    known = suite_of(bench).providers(device)
    return {name: why for name, why in known.items() if case.providers is None or name in case.providers}


def selected(device: torch.device, full: bool = False, only: tuple[str, ...] = ()) -> list[tuple[str, Case]]:
    """Benches and cases by worth. only: those that contain one of these texts as whole words, of all cases."""
    found = [(bench, case) for bench in BENCHES for case in suite_of(bench).cases(device)]
    if only:
        words = re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in only))
        found = [pair for pair in found if words.search(pair[1].name)]
    elif not full:
        found = [pair for pair in found if pair[1].worth <= WHOLE]
    return sorted(found, key=lambda pair: pair[1].worth)


def lines_of(path: Path) -> list[dict]:
    """Those of a result file; half a line at its end, of a process that was killed, is none."""
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


def described(device: str, full: bool = False, only: tuple[str, ...] = ()) -> dict:
    """The first line of a result file. The machine is described by a process of its own: this one is to leave the GPU
    alone."""
    selection = f"only {', '.join(only)}" if only else "full" if full else "quick"
    for _, said in run(deque([Job("machine", _describe, (device,))])):
        if isinstance(said, Ended):
            raise RuntimeError(f"the device could not be described: {said.reason}")
        return dict(line="run", selection=selection, full=full, only=list(only), **said)


def measure(
    path: Path,  # of the result file; what it has already is not measured again
    head: dict,  # its first line, which says what is selected
    minutes: float | None = None,  # after which no case begins, and the one that runs is stopped
    seconds: float | None = None,  # of timing for a case, in place of its own
) -> bool:
    """Whether nothing of ours failed. ValueError where nothing is selected, or the file is of another run."""
    until = None if minutes is None else time.monotonic() + 60 * minutes
    device = head["device"]["kind"]
    cases = selected(torch.device(device), head["full"], tuple(head["only"]))
    if not cases:
        raise ValueError(f"no case contains {' or '.join(head['only'])}")
    done = _gone_on_with(path, head) if path.exists() else set()
    path.parent.mkdir(parents=True, exist_ok=True)
    fields, fine = {case.name: case.fields for _, case in cases}, True
    waiting = deque(
        Job(case.name, _race, (bench, case.name, device, (), seconds), limit=case.time_limit, silence=SILENCE)
        for bench, case in cases if case.name not in done
    )  # fmt: skip
    bar = tqdm(total=len(waiting), unit="case", dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10.0)
    with open(path, "a") as file, contextlib.closing(bar):
        _write(file, [head])
        for lines in _outcomes(waiting, fields, until, bar):
            fine &= not any(line["line"] == "failed" and line["kind"] == "ours" for line in lines)
            _write(file, lines)
            bar.update()
        late = [dict(line="skipped", **fields[job.name], reason=f"the time was up ({minutes} min)") for job in waiting]
        _write(file, late or [dict(line="end")])
    return fine


def _outcomes(waiting: deque[Job], fields: dict[str, dict], until: float | None, bar: tqdm) -> Iterator[list[dict]]:
    """The lines of each case that came to its end; those that did not are left in `waiting`."""
    lines, everyone, who = [], {}, MAKING
    for job, said in run(waiting, until=until):
        if isinstance(said, dict):
            who, everyone = said.get("begin", who), said.get("everyone", everyone)
            lines += said.get("lines", [])
            bar.set_description_str(job.name, refresh=False)
            bar.set_postfix_str(who, refresh=sys.stderr.isatty())
            continue
        if said.reason is None or (until is not None and time.monotonic() > until):
            if said.reason is None:
                yield lines
            else:
                waiting.appendleft(job)
            lines, everyone, who = [], {}, MAKING
            continue
        bar.write(f"{job.name}, {who}: {said.reason}", file=sys.stderr)
        culprits = {who: everyone[who]} if who in everyone else everyone or {who: "ours"}
        about = dict(line="failed", **fields[job.name], reason=said.reason)
        lines = [*lines, *(about | dict(provider=n, kind=kind) for n, kind in culprits.items())]
        bench, name, device, without, seconds = job.arguments
        if who in everyone:  # the others, once more
            again = (bench, name, device, (*without, who), seconds)
            waiting.appendleft(Job(name, _race, again, limit=job.limit, silence=job.silence))
        else:
            yield lines
            lines = []
        everyone, who = {}, MAKING


def _race(tell, bench: str, name: str, device: str, without: tuple[str, ...], seconds: float | None) -> None:
    """In a process of its own: a case."""
    device, suite = torch.device(device), suite_of(bench)
    case = next(case for case in suite.cases(device) if case.name == name)
    if seconds is not None:
        object.__setattr__(case, "seconds", seconds)
    providers = entered(bench, case, device)
    tell(dict(everyone={name: suite.kind(name) for name, why in providers.items() if not why and name not in without}))
    tell(dict(lines=race(suite, case, device, providers, without, lambda who: tell(dict(begin=who)))))


def _describe(tell, device: str) -> None:
    from sfr_kernels.leaves.cuda.build import find
    from sfr_kernels.ops.dispatch import unavailable

    if device == "cuda" and unavailable("cuda", torch.device(device)) is None:
        with contextlib.suppress(Exception):  # who needs them says what is wrong
            find()  # compiles the CUDA kernels, once, in nobody's time
    tell(machine.described(torch.device(device)))


def _gone_on_with(path: Path, head: dict) -> set[str]:
    """Names of the cases that the file has. ValueError if it is of another run."""
    text = path.read_text()
    lines = lines_of(path)
    was = next((line for line in lines if line.get("line") == "run"), None)
    if was is None:
        raise ValueError(f"{path} is not a result file")
    pairs = {name: (was[name], head[name]) for name in SAME}
    for what in ("device", "versions"):
        pairs |= {name: (was[what].get(name), head[what][name]) for name in head[what] if name != "clocks"}
    if differing := [f"{name} {old}, now {new}" for name, (old, new) in pairs.items() if old != new]:
        raise ValueError(f"{path} cannot be gone on with: {', '.join(differing)}")
    os.truncate(path, len(text[: text.rfind("\n") + 1].encode()))
    return {f"{x['op']}: {x['label']}, {x['dtype']}" for x in lines if x["line"] in ("result", "failed")}


def _write(file, lines: list[dict]) -> None:
    file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())

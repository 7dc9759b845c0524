"""A suite whose providers do what none should, as planted.json in the working directory says: provider (or "making") →
what it does at the case that it names, or the first; after "late-" once it takes its turns."""

import json
import os
import signal
import time
from pathlib import Path

import torch

from benchmarks import race
from benchmarks.case import MAIN, MORE, WHOLE, Case, Suite, Work, WrongResultError

WARM = 6  # calls before all take turns


def cases(device: torch.device) -> list[Case]:
    worth = dict(third=MORE, second=WHOLE, first=MAIN)
    return [Case("planted", name, {}, torch.float32, worth=w, seconds=0.0, reference=None) for name, w in worth.items()]


def dead(error: Exception, device: torch.device) -> str:
    raise race.DeadGPUError(f"{error}; the GPU answered nothing after that")


def do(what: str | None) -> None:
    errors = dict(memory=torch.OutOfMemoryError("planted\nand much more"), dead=RuntimeError("illegal memory access"),
                  wrong=WrongResultError("hidden: error 1.0e+00"))  # fmt: skip
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(600)
    if what == "dead":
        race._reason = dead
    if what in errors:
        raise errors[what]


def make(case: Case, device: torch.device) -> Work:
    planted = json.loads(Path("planted.json").read_text())
    planted = planted if case.label == planted.get("case", "first") else {}
    do(planted.get("making"))
    calls = dict.fromkeys(("triton", "torch", "eager"), 0)

    def run(provider: str) -> list:
        calls[provider] += 1
        what = planted.get(provider, "")
        do(what.removeprefix("late-") if what.startswith("late-") and calls[provider] > WARM else None)
        return []

    return Work(lambda name: lambda: run(name), lambda name, run: do(planted.get(name)) or {}, bytes=1000)


SUITE = Suite(cases, make, lambda device: {"triton": None, "torch": None, "eager": None, "quack": "not installed"})

"""A suite whose providers do what providers should not, as planted.json in the working directory says: provider (or
"making") → what it does at the first case."""

import json
import os
import signal
import time
from pathlib import Path

import torch

from benchmarks import race
from benchmarks.case import MAIN, MORE, WHOLE, Case, Suite, Work, WrongResultError

FILE = Path("planted.json")
WARM = 6  # calls before all take turns


def cases(device: torch.device) -> list[Case]:
    worth = dict(third=MORE, second=WHOLE, first=MAIN)
    return [Case("planted", name, {}, torch.float32, worth=w, seconds=0.0, reference=None) for name, w in worth.items()]


def dead(error: Exception, device: torch.device) -> str:
    raise race.DeadGPUError(f"{error}; the GPU answered nothing after that")


def do(what: str | None) -> None:
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "hang":
        time.sleep(600)
    elif what == "dead":
        race._reason = dead
        raise RuntimeError("illegal memory access")
    elif what == "memory":
        raise torch.OutOfMemoryError("planted\nand much more")
    elif what == "wrong":
        raise WrongResultError("hidden: error 1.0e+00")
    elif what == "slow":
        time.sleep(0.5)


def make(case: Case, device: torch.device) -> Work:
    planted = json.loads(FILE.read_text()) if case.label == "first" else {}
    do(planted.get("making"))
    calls = dict.fromkeys(planted, 0)

    def judge(provider: str, run) -> dict:
        do(planted.get(provider))
        return {}

    def run_of(provider: str):
        def run() -> list:
            what = planted.get(provider, "")
            if what.startswith("late-"):
                calls[provider] += 1
                do(what.removeprefix("late-") if calls[provider] > WARM else None)
            return []

        return run

    return Work(run_of, judge, bytes=1000)


SUITE = Suite(cases, make, lambda device: {"triton": None, "torch": None, "eager": None, "quack": "not installed"})

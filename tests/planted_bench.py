"""Providers that do what providers should not, as the environment says: for the tests of the run around them.

PLANTED is "provider=what,…" at the first case, or "making=what": crash, hang, dead (the GPU answers nothing after it),
assert (the same, on a real one), interrupt, wrong, or late and late-dead (while all take turns).
"""

import os
import signal
import time

import torch

from benchmarks.harness import race as racing
from benchmarks.harness.work import Case, Suite, Work, WrongResultError

PLANTED = dict(part.split("=") for part in os.environ.get("PLANTED", "").split(",") if part)
WARM = 6  # calls before all take turns
LATE = {"late": "crash", "late-dead": "dead"}


def cases(device: torch.device) -> list[Case]:
    def case(label: str, quick: bool = True) -> Case:
        return Case("planted", label, dict(model=None), torch.float32, seconds=0.0, quick=quick)

    return [case("first"), case("second"), case("third", quick=False)]


def providers(device: torch.device) -> dict[str, str | None]:
    return {"triton": None, "torch": None, "eager": None, "quack": "quack is not installed"}


def illegal(provider: str, error: Exception, device: torch.device) -> str:
    raise racing.DeadGPUError(provider, str(error))


def do(what: str | None) -> None:
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "hang":
        time.sleep(600)
    elif what == "dead":
        racing._reason = illegal
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif what == "assert":
        torch.zeros(1, device="cuda")[torch.tensor([7], device="cuda")].sum().item()
    elif what == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(600)
    elif what == "wrong":
        raise WrongResultError("hidden: error 1.0e+00")


def make(case: Case, device: torch.device) -> Work:
    planted = PLANTED if case.label == "first" else {}
    do(planted.get("making"))
    calls = dict.fromkeys(planted, 0)

    def judge(provider: str, run) -> dict:
        do(planted.get(provider))
        return {}

    def run_of(provider: str):
        def run() -> list:
            if planted.get(provider) in LATE:
                calls[provider] += 1
                do(LATE[planted[provider]] if calls[provider] > WARM else None)
            return []

        return run

    return Work(run_of, judge, bytes=1000)


SUITE = Suite("planted", cases, make, providers)


def test_planted(race):
    race()

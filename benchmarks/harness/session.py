"""A run's result file, rewritten whole after every benchmark, and its journal, which tells the starter what goes on.

The file is pytest-benchmark's, with "sfr_kernels" added: device, versions, what is absent and what failed. A run that
ended early is gone on with: what the file has is not measured again.
"""

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from sfr_kernels._version import __version__
from sfr_kernels.atomic import write_atomically
from sfr_kernels.leaves.cuda.build import find
from sfr_kernels.ops.dispatch import unavailable

from . import environment
from .as_json import as_json
from .race import MAKING, DeadGPUError, Race, race
from .work import Case, Suite


class Session:
    """What one pytest process measures, on top of what `path` holds already."""

    def __init__(
        self,
        device: torch.device,
        path: Path | None = None,
        journal: Path | None = None,
        *,
        full: bool = False,  # every case, not the five-minute selection
        only: tuple[str, ...] = (),  # of the cases, those that contain one of these
        until: float | None = None,  # time.time() after which no case is begun
        seconds: float | None = None,  # of timing for a case, in place of its own
    ):
        self.device, self.path, self.until, self.seconds = device, path, until, seconds
        self._journal = None if journal is None else open(journal, "a")  # noqa: SIM115 (it lives as long as the session)
        self._raced: tuple[str, Race] | None = None
        self.selected = 0  # cases and providers, measured before or not
        self._mhz: list[float] = []
        selection = dict(selection=", ".join(["full" if full else "quick", *only]), full=full, only=list(only))
        own = dict(version=__version__, **selection, complete=False, cut=False, device=environment.device_of(device))
        own |= dict(versions=environment.versions(), **environment.revision(), date=environment.now())
        self.content = dict(benchmarks=[], sfr_kernels=own | dict(absent=[], failed=[]))
        if path is not None and path.exists():
            self._go_on(json.loads(path.read_text()))
        self._done = {(b["group"], b["extra_info"]["provider"]) for b in self.content["benchmarks"]}
        self._done |= {(f["group"], f["provider"]) for f in self.own["failed"]}

    def _go_on(self, earlier: dict) -> None:
        """ValueError if what was begun is not what would be gone on with."""
        was, now = earlier["sfr_kernels"], self.own
        differing = [
            f"{name} {was.get(name)}, now {now[name]}" for name in ("version", "revision", "modified", "selection")
            if was.get(name) != now[name]
        ]  # fmt: skip
        for what in ("device", "versions"):
            names = [n for n in now[what] if n != "clocks" and was[what].get(n) != now[what][n]]
            differing += [f"{n} {was[what].get(n)}, now {now[what][n]}" for n in names]
        if differing:
            raise ValueError(f"{self.path} cannot be gone on with: {', '.join(differing)}")
        self.content = earlier
        self.own.update(complete=False, cut=False, absent=[])

    @property
    def own(self) -> dict:
        return self.content["sfr_kernels"]

    def is_done(self, group: str, provider: str) -> bool:
        return (group, provider) in self._done

    def settle(self, group: str, everyone: Iterable[str]) -> None:
        """A case of which a part is missing is raced anew: only what took turns can be compared."""
        measured = {b["extra_info"]["provider"] for b in self.content["benchmarks"] if b["group"] == group}
        if measured and not all(self.is_done(group, provider) for provider in everyone):
            self.content["benchmarks"] = [b for b in self.content["benchmarks"] if b["group"] != group]
            self._done -= {(group, provider) for provider in measured}

    def compile(self) -> None:
        """The CUDA kernels, once, in nobody's time; whoever needs them says what is wrong."""
        if self.device.type == "cuda" and unavailable("cuda", self.device) is None:
            with contextlib.suppress(Exception):
                find()

    def head(self, content: dict) -> None:
        """The top level that pytest-benchmark makes, unless an earlier part of this run has."""
        self.content = {k: v for k, v in content.items() if k != "benchmarks"} | self.content

    def tell(self, **event) -> None:
        if self._journal is not None:
            self._journal.write(json.dumps(event) + "\n")
            self._journal.flush()

    # -----------------------------------------------------------------------------------------------------------------

    def absence(self, suite: Suite, case: Case, provider: str) -> str | None:
        """Why a provider is not measured at a case, None if it is."""
        reason = suite.providers(self.device).get(provider)
        if reason is None and self.until is not None and time.time() > self.until and not self._has_raced(case):
            self.own["cut"] = True
            reason = "not run: the time was up (--minutes)"
        return reason

    def _has_raced(self, case: Case) -> bool:
        return self._raced is not None and self._raced[0] == case.group

    def race(self, suite: Suite, case: Case) -> Race:
        """The race of a case: run once, kept until the next one."""
        if self._has_raced(case):
            return self._raced[1]
        self._raced = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        able = [name for name, reason in suite.providers(self.device).items() if reason is None]
        entered = [n for n in able if entered_in(case, n) and not self.is_done(case.group, n)]
        if self.seconds is not None:
            case = replace(case, seconds=self.seconds)
        if self.path is not None and not self.path.exists():
            self.write()  # for the starter to put a death into
        bounded = [n for n in suite.bounds if not self.is_done(case.group, n)]
        everyone = [*entered, *bounded]
        lost = {f["provider"] for f in self.own["failed"] if f["group"] == case.group}
        about = dict(event="running", op=case.op, group=case.group, providers=everyone)
        about["ours"] = [name for name in entered if suite.is_ours(name)]
        try:
            found = race(suite, case, self.device, entered, bounded, lambda who: self.tell(who=who, **about), lost)
        except DeadGPUError as error:
            for provider in everyone if error.provider == MAKING else [error.provider]:
                self.failed(suite, case, provider, f"{error}; the GPU answered nothing after that")
            self.tell(event="died", group=case.group, who=error.provider)
            raise
        self.tell(event="raced", group=case.group)
        if found.clocks and found.clocks["sm_mhz"]:
            self._mhz.append(found.clocks["sm_mhz"])
            self.own["device"]["clocks"] = found.clocks | dict(sm_mhz=statistics.median(self._mhz))
        self._raced = case.group, found
        return found

    # -----------------------------------------------------------------------------------------------------------------

    def measured(self, entry: dict) -> None:  # of the "benchmarks" of the file
        self.content["benchmarks"].append(entry)
        self.write()

    def absent(self, suite: Suite, case: Case, provider: str, reason: str) -> None:
        row = dict(op=case.op, group=case.group, provider=provider, ours=suite.is_ours(provider), reason=reason)
        self.own["absent"].append(row)

    def failed(self, suite: Suite, case: Case, provider: str, reason: str) -> None:
        row = dict(op=case.op, group=case.group, provider=provider, ours=suite.is_ours(provider), reason=reason)
        self.own["failed"].append(row)
        self.write()

    def finish(self) -> None:
        self.own["complete"] = not self.own["cut"]
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_atomically(self.path, as_json(self.content).encode())


def entered_in(case: Case, provider: str) -> bool:
    """Whether a provider takes part in a case."""
    return case.providers is None or provider in case.providers

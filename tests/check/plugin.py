"""Runs tests in a job's process and tells of each that it begins, why it fails as soon as it does, and that it has
ended: whoever reads knows the culprit where the process crashes, hangs or loses its GPU."""

import os
import sys

import pytest
import torch

from benchmarks.jobs import message


def run_tests(tell, file: str, marks: str, only: str = "", done: tuple[str, ...] = ()) -> None:
    """Tests with these marks and `only` in their name; uncaptured, since a crash would lose what was captured."""
    sys.stdout.reconfigure(line_buffering=True)
    options = ["-v", "-s", "--tb=short", "-rfE", "-p", "no:cacheprovider", "-m", marks]
    if pytest.main([file, *options], plugins=[Plugin(tell, only, done)]) in (3, 4):
        raise RuntimeError("pytest itself failed, see log.txt")


class Plugin:
    def __init__(self, tell, only: str, done: tuple[str, ...]):
        self.tell, self.only, self.done = tell, only, done

    @pytest.hookimpl(trylast=True)  # after the marks
    def pytest_collection_modifyitems(self, items) -> None:
        items[:] = [item for item in items if self.only in item.nodeid and item.nodeid not in self.done]
        self.tell(dict(items=[item.nodeid for item in items]))

    def pytest_collectreport(self, report) -> None:
        if not report.passed:  # a file that cannot be imported, or is skipped as a whole
            self.pytest_runtest_logstart(report.nodeid)
            self.pytest_runtest_logreport(report)
            self.pytest_runtest_logfinish()

    def pytest_runtest_logstart(self, nodeid) -> None:
        self.fields = dict(seconds=0.0)
        self.tell(dict(begin=nodeid))

    def pytest_runtest_logreport(self, report) -> None:
        self.fields |= dict(getattr(report, "user_properties", ()))
        self.fields["seconds"] += round(getattr(report, "duration", 0.0), 3)
        if report.failed:
            errors = [line[1:].strip() for line in report.longreprtext.splitlines() if line[:1] == "E"]
            self.tell(dict(fail=" ".join(errors)[:400] or report.longreprtext[-400:]))
        elif report.skipped:
            self.fields["skipped"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else "xfail"

    def pytest_runtest_logfinish(self) -> None:
        try:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # a kernel's error is met by whoever next waits for the GPU, and stays
        except Exception as error:
            self.tell(dict(fail=f"it leaves the GPU dead: {message(error)}"))
            os._exit(1)  # a test that has not ended is the culprit
        self.tell(dict(end=self.fields))

"""A pytest plugin for machines on which little is installed: `-p tests.bare`.

Tests that need a package that is not there are skipped with its name, the run ends in time, what a test makes is where
RAYMI_TESTS_DEVICE says, and what came of it all is written as JSON.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from tests.device import NAMED, Placed

_OURS = ("raymi", "tests", "demo", "benchmarks")
_MISSING = re.compile(r"(?:ModuleNotFoundError: No module named|ImportError: .*requires the) '?(\w+)")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bare")
    group.addoption("--seconds", type=float, default=0, help="start no test after so many seconds")
    group.addoption("--outcome", type=Path, help="where to write what came of it, as JSON")


class Outcome:
    """What came of a run, counted."""

    def __init__(self, config: pytest.Config) -> None:
        self.file: Path | None = config.getoption("--outcome")
        self.seconds: float = config.getoption("--seconds")
        self.started = time.monotonic()
        self.passed = self.skipped = self.not_begun = 0
        self.failed: list[str] = []
        self.missing = Counter[str]()
        self.findings: list[str] = []
        """What tests have recorded as the property `finding`."""

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """A module that imports what is not there is left out."""
        report = yield
        if report.failed and (package := _missing(str(report.longrepr))):
            self.missing[package] += 1
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: no {package} here")
        elif report.failed:
            self.failed.append(collector.nodeid)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and (package := _missing(str(report.longrepr))):
            self.missing[package] += 1
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"Skipped: no {package} here")
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1
            self.findings += [str(value) for name, value in report.user_properties if name == "finding"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """True: it is done with, without having begun."""
        if not self.seconds or time.monotonic() - self.started < self.seconds:
            return None
        self.not_begun += 1
        return True

    def pytest_sessionfinish(self) -> None:
        if self.file:
            counts = {name: getattr(self, name) for name in ("passed", "skipped", "not_begun")}
            failed = list(dict.fromkeys(self.failed))
            seconds = round(time.monotonic() - self.started)
            lists = {"failed": failed, "missing": dict(self.missing), "findings": self.findings}
            self.file.write_text(json.dumps({**counts, **lists, "seconds": seconds}))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcome(config), "what came of it")


@pytest.fixture(autouse=True)
def placed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not NAMED:
        yield
        return
    compare = torch.testing.assert_close
    here = torch.device("cpu")

    def on_the_cpu(actual: object, expected: object, **options: object) -> None:
        compare(*(x.to(here) if isinstance(x, torch.Tensor) else x for x in (actual, expected)), **options)

    monkeypatch.setattr(torch.testing, "assert_close", on_the_cpu)
    with Placed(torch.device(NAMED)):
        yield


def _missing(said: str) -> str | None:
    """A package, not a part of this repository, for want of which something failed."""
    found = _MISSING.search(said)
    return found[1] if found and found[1] not in _OURS else None

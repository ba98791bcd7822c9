"""Signals in a run without Ray, to a process of its own: whatever it is doing, the first ends it within its grace."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import raymi.store
from raymi.cluster.runner import GRACE
from raymi.report.tables import status
from tests.fakes import add_model

SLOW = Path(__file__).with_name("slow.py")
LONG = 60
"""Seconds that each phase is made to take."""
JOB = """
name: slow
models: org/*
prompts: [{id: paris, text: The capital of France is, answer: ' Paris'}]
experiments: [{kind: knockout, layers: {each: all}, heads: {each: all}, keys: first}]
unit_ablations: 4
verify: 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    add_model(tmp_path / "cache", "org/one")
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


class Slow:
    """`raymi run --inline` in a phase that takes long."""

    def __init__(self, folder: Path, phase: str, seconds: float = LONG) -> None:
        arguments = ["run", "job.yaml", "--inline", "--store", "store", "--cache-dir", "cache"]
        environment = os.environ | {"PYTHONPATH": str(SLOW.parents[2]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(SLOW), phase, str(seconds), "--", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.said: Iterator[str] = iter(self.process.stderr)
        self.heard = ""
        while f"in {phase}" not in self.heard:
            self.heard += next(self.said)

    def ends_after(self, *signals: signal.Signals) -> float:
        """Sends these and says how many seconds it took to end."""
        started = time.monotonic()
        for each in signals:
            self.process.send_signal(each)
            time.sleep(0.1)
        try:
            _, rest = self.process.communicate(timeout=LONG - 15)
        finally:
            self.process.kill()
        self.heard += rest
        return time.monotonic() - started


def is_as_it_should(folder: Path, n_rows: int) -> None:
    """Whether what was measured is there, nobody has the run, and the same command goes on."""
    store = raymi.store.open(str(folder / "store"))
    [manifest] = store.runs()
    assert not store.is_driven(manifest)
    assert status(manifest, False) == "stopped"
    assert store.scan("ablations").collect().height == n_rows


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("read", signal.SIGTERM),
        ("plan", signal.SIGINT),
        ("weights", signal.SIGINT),
        ("stuck", signal.SIGTERM),
        ("sites", signal.SIGINT),
        ("verify", signal.SIGTERM),
    ],
)
def test_a_first_signal_ends_what_would_take_long(folder: Path, phase: str, number: signal.Signals) -> None:
    run = Slow(folder, phase)
    seconds = run.ends_after(number)
    assert run.process.returncode == 128 + number, run.heard
    assert seconds < 5
    assert "The same command goes on" in run.heard
    assert "Traceback" not in run.heard
    is_as_it_should(folder, 0)


def test_a_unit_in_hand_is_waited_for(folder: Path) -> None:
    run = Slow(folder, "unit", 3)
    run.ends_after(signal.SIGINT)
    assert run.process.returncode == 130, run.heard
    is_as_it_should(folder, 4)


def test_a_unit_in_hand_is_waited_for_no_longer_than_the_grace(folder: Path) -> None:
    run = Slow(folder, "unit")
    seconds = run.ends_after(signal.SIGTERM)
    assert run.process.returncode == 143, run.heard
    assert seconds < GRACE[signal.SIGTERM] + 5
    is_as_it_should(folder, 0)


@pytest.mark.parametrize("phase", ["unit", "stuck"])
def test_a_second_signal_ends_at_once(folder: Path, phase: str) -> None:
    run = Slow(folder, phase)
    seconds = run.ends_after(signal.SIGINT, signal.SIGINT)
    assert run.process.returncode == 130, run.heard
    assert seconds < 4
    assert "Traceback" not in run.heard
    is_as_it_should(folder, 0)

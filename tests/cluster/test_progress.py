"""What a person sees of a run."""

import io

import pytest
from rich.console import Console

from raymi.cluster.messages import Status
from raymi.cluster.progress import Bars, Lines, duration


def status(phase="running", units=10, done=5, failed=0, replicas=1, seconds_left=90.0):
    return Status(phase, units, done, failed, 20 * (units or 0), 20 * done, replicas, seconds_left)


BEFORE = "m: 100 stored before, "


@pytest.mark.parametrize(
    ("statuses", "lines"),
    [
        ([status("waiting", None, 0)], []),
        ([status("tokenising", None, 0, seconds_left=None)], ["m: tokenising"]),
        ([status("loading", done=0)], [BEFORE + "0 of 200 measured, loading"]),
        ([status()], [BEFORE + "100 of 200 measured, 1 min 30 s left"]),
        ([status(replicas=2, failed=1)], [BEFORE + "100 of 200 measured, 1 unit failed, 1 min 30 s left, 2 replicas"]),
        ([status(), status(done=6)], [BEFORE + "100 of 200 measured, 1 min 30 s left"]),  # the next line is not due yet
        ([status(), status("done", done=10)],
         [BEFORE + "100 of 200 measured, 1 min 30 s left", BEFORE + "200 of 200 measured, done"]),
    ],
)  # fmt: skip
def test_lines(capsys, statuses, lines):
    shown = Lines({"m": 100})
    for each in statuses:
        shown.update({"m": each})
    assert capsys.readouterr().err.splitlines() == lines


def test_a_long_phase_is_heard_of_again(capsys, monkeypatch):
    shown = Lines({})
    now = [100.0]
    monkeypatch.setattr("raymi.cluster.progress.time.monotonic", lambda: now[0])
    for second in range(30):
        now[0] = 100.0 + second
        shown.update({"m": status()})
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_bars_are_one_a_model_and_what_is_said_stands_above_them():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Bars(console, {"a": 100}) as shown:
        shown.update({"a": status(), "b": status("waiting", None, 0, seconds_left=None)})
        shown.say("a: [red] herring")
        shown.update({"a": status("done", done=10), "b": status("failed", None, 0, seconds_left=None)})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a: [red] herring" in text
    last = text.split("\x1b[2K")[-1] + text
    assert "100 stored, 200/200 done" in last
    assert "failed" in last
    assert all(len(line) < 80 for line in last.splitlines() if "\x1b" not in line)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3599.6, "1 h 00 min"), (90000, "25 h 00 min")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words

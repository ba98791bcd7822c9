"""How far a run is: one line per model on a terminal, plain lines from time to time elsewhere (logs, `ray job`)."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from raymi import outlet
from raymi.cluster.messages import Phase, Status

PLAIN_SECONDS = 10.0


class Display(Protocol):
    """Shows a run to a person."""

    def say(self, line: str) -> None:
        """Something happened."""
        ...

    def detail(self, line: str) -> None:
        """Something happened that most do not want to know."""
        ...

    def update(self, statuses: Mapping[str, Status]) -> None:
        """Where every model stands now; called often."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


Words = Literal["few", "usual", "many"]
"""How much is said: what is wrong; how far each model is, too; and what every replica does."""


def display(before: Mapping[str, int], words: Words = "usual") -> Display:
    """The display for this terminal, or for none.

    Args:
        before: how much of each model was measured by earlier commands.
        words: how much it says.
    """
    console = Console(file=outlet.controls())
    return Bars(console, before, words) if console.is_terminal and words != "few" else Lines(before, words)


class Lines:
    """A line whenever a model comes into another phase, and one per running model every ten seconds."""

    def __init__(self, before: Mapping[str, int], words: Words = "usual") -> None:
        self._before, self._words = before, words
        self._phases: dict[str, Phase] = {}
        self._next = 0.0

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    def detail(self, line: str) -> None:
        if self._words == "many":
            self.say(line)

    def update(self, statuses: Mapping[str, Status]) -> None:
        if self._words == "few":
            return
        due = time.monotonic() >= self._next
        for key, status in statuses.items():
            changed = self._phases.get(key, "waiting") != status.phase
            if changed or (due and status.phase == "running"):
                self.say(f"{key}: {_words(status, self._before.get(key, 0))}")
            self._phases[key] = status.phase
        if due:
            self._next = time.monotonic() + PLAIN_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass


class Bars:
    """A bar per model."""

    def __init__(self, console: Console, before: Mapping[str, int], words: Words = "usual") -> None:
        self._before, self._words = before, words
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            _Words(table_column=Column(no_wrap=True)),
            console=console,
            refresh_per_second=4,
        )

    def say(self, line: str) -> None:
        self._progress.console.print(outlet.clean(line), markup=False, highlight=False)

    def detail(self, line: str) -> None:
        if self._words == "many":
            self.say(line)

    def update(self, statuses: Mapping[str, Status]) -> None:
        for key, status in statuses.items():
            if key not in self._tasks:
                self._tasks[key] = self._progress.add_task(outlet.clean(key), total=None)
            before = self._before.get(key, 0)
            total = None if status.units is None else before + status.ablations
            self._progress.update(
                self._tasks[key],
                total=total or (None if status.phase not in ("done", "failed") else 1),
                completed=before + status.ablations_done,
                words=_short(status, before),
            )

    def __enter__(self) -> Self:
        self._progress.start()
        outlet.install()  # rich has put streams of its own in the place of the two
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()


class _Words(ProgressColumn):
    """The end of a line."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("words", ""))


def _short(status: Status, before: int) -> str:
    """What fits behind a model's name and its bar in 80 characters."""
    words: str = status.phase
    if status.phase == "running" and status.seconds_left is not None:
        words = f"{duration(status.seconds_left)} left"
    stored = f"{before:,} stored, " if before else ""
    count = "" if status.units is None else f"{stored}{status.ablations_done:,}/{status.ablations:,} "
    return f"{count}{words}" + (f", {status.failed:,} failed" if status.failed else "")


def _words(status: Status, before: int) -> str:
    parts: list[str] = [status.phase]
    if status.units is not None:
        # What earlier commands have stored was not measured by this one.
        stored = [f"{before:,} stored before"] if before else []
        measured = f"{status.ablations_done:,} of {status.ablations:,} measured"
        now = [measured] if status.ablations or not before else []
        parts = [*stored, *now, *([] if status.phase == "running" else parts)]
    if status.failed:
        parts.append(f"{status.failed:,} unit{'' if status.failed == 1 else 's'} failed")
    if status.phase == "running" and status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    if status.replicas > 1:
        parts.append(f"{status.replicas} replicas")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"

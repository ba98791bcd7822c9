"""Runs one input under watch: what it may not do is crash, hang, or take much memory."""

import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymi.errors import MOST_SAID, UserError
from tests.fuzz.inputs import Input

SECONDS = 10.0
GROWTH = 600_000
"""Kilobytes by which one input may make the process larger than any before it did."""
HERE = "/dev/shm" if Path("/dev/shm").is_dir() else None


class TooLong(BaseException):
    """Not for `except Exception`."""


class Wrong(AssertionError):
    """What came out is no right answer."""


@dataclass(frozen=True)
class Fault:
    """An input that did what none may do."""

    input: Input
    what: str
    """The kind and the place: two inputs with the same one found the same."""
    trace: str


@dataclass(frozen=True)
class Result:
    accepted: bool
    fault: Fault | None = None


def run(input: Input, valid: dict[str, bytes], check: Callable[[Path], Any]) -> Result:
    """Writes an input and has a target look at it."""
    with tempfile.TemporaryDirectory(dir=HERE, prefix="fuzz-") as name:
        folder = Path(name)
        input.write(folder, valid)
        before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        accepted, what, trace = False, "", ""
        try:
            with _limit(SECONDS):
                check(folder)
            accepted = True
        except UserError as error:
            said = str(error)
            if not said.strip() or len(said) > 2 * MOST_SAID + 100:
                what, trace = f"{len(said)} characters of error", said[:500]
        except (Exception, TooLong, SystemExit) as error:
            what, trace = _place(error), "".join(traceback.format_exception(error))[-3_000:]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if not what and time.monotonic() - since > SECONDS:
            what = "too long, where no signal comes through"
        if not what and grown > GROWTH:
            what = f"memory: {grown // 1_000_000} GB or more"
        return Result(accepted, Fault(input, what, trace) if what else None)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/raymi/" in frame.filename or "/tests/fuzz/targets" in frame.filename]
    last = (own or list(frames) or [None])[-1]
    at = f"{Path(last.filename).name}:{last.name}:{last.lineno}" if last else "nowhere"
    said = f": {error}" if isinstance(error, Wrong) else ""
    return f"{type(error).__name__} at {at}{said}"[:300]


def bounded(gigabytes: int) -> None:
    """No more than so much address space beyond what there is, for this whole process: a machine is not to go down."""
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, resource.RLIM_INFINITY))

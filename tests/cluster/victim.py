"""`raymi` with a death built in, for the kill tests: `python victim.py HOW N PIDS -- run job.yaml ...`.

What happens, at the N-th unit that arrives at the driver:

    none          nothing
    driver        the driver dies; what has arrived since the last flush is lost
    flushed       the driver dies right after a flush
    write         the driver dies in the middle of the file that the next flush writes
    replica       one of its replicas dies
    stop          the driver is stopped (SIGSTOP)
    interrupt     Ctrl-C: SIGINT to the whole process group, as a terminal sends it
    terminate     SIGTERM to the driver
    twice         SIGINT to the driver, twice

The ids of the processes that the driver has started are written to the file PIDS before.
"""

import itertools
import os
import signal
import stat
import sys
from pathlib import Path

import psutil

from raymi.cli.main import main
from raymi.cluster import runner
from raymi.cluster.messages import Rows
from raymi.store import objects, writer

writer.MAX_SECONDS = 0.2  # a flush every now and then, in a run of seconds
record = runner._Record._rows


def note_processes() -> None:
    Path(PIDS).write_text("\n".join(str(child.pid) for child in psutil.Process().children(recursive=True)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(descriptor: int) -> None:
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode):  # a new folder is synced too, before its first file
        os.ftruncate(descriptor, about.st_size // 2)
        die()


def strike(self: runner._Record) -> None:
    note_processes()
    match HOW:
        case "driver":
            die()
        case "flushed":
            self._run.flush()
            die()
        case "write":
            objects.os.fsync = die_half_way
            self._run.flush()
        case "replica":
            os.kill(min(replicas), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "interrupt":
            os.killpg(0, signal.SIGINT)
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        case "twice":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


def rows(self: runner._Record, outcome: Rows) -> None:
    record(self, outcome)
    if outcome.unit is None:
        replicas.update(int(pid) for pid in outcome.tables["models"]["replica"].to_pylist())
    elif next(arrived) == int(N):
        strike(self)


replicas: set[int] = set()
arrived = itertools.count(1)
runner._Record._rows = rows

if __name__ == "__main__":
    HOW, N, PIDS = sys.argv[1:4]
    sys.argv = ["raymi", *sys.argv[5:]]
    main()

"""The backend without Ray: one model at a time, in this process. For debugging, and for small things."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from raymi.cluster.messages import Broken, Delivered, Event, Impossible, LeaseEnded, Loaded, Prepared
from raymi.cluster.worker import Failed, Worker
from raymi.plan import Unit


class InlineBackend:
    """Does one step of what was asked in each `poll`: a load, or one unit.

    Args:
        make: a worker for a model, by its key.
    """

    def __init__(self, make: Callable[[str], Worker]) -> None:
        self._make = make
        self._replica: int | None = None
        self._worker: Worker | None = None
        self._steps: deque[Iterator[Event]] = deque()

    def start(self, replica: int, model: str, *, share: float, roomy: bool) -> Literal["started", "full"] | Impossible:
        if self._worker is not None:
            return "full"
        self._replica, self._worker = replica, self._make(model)
        return "started"

    def prepare(self, replica: int) -> None:
        self._steps.append(self._prepare(replica))

    def load(self, replica: int) -> None:
        self._steps.append(self._load(replica))

    def run(self, replica: int, lease: int, units: Sequence[Unit]) -> None:
        self._steps.append(self._run(replica, lease, units))

    def drain(self, replica: int) -> None:
        self._alive().drain()

    def stop(self, replica: int) -> None:
        self._replica = self._worker = None
        self._steps.clear()

    def poll(self, timeout: float) -> list[Event]:
        while self._steps:
            for event in self._steps[0]:
                return [event]
            self._steps.popleft()
        time.sleep(timeout)
        return []

    def _prepare(self, replica: int) -> Iterator[Event]:
        tables = self._alive().prepare()
        yield Broken(replica, tables) if isinstance(tables, Failed) else Prepared(replica, tables)

    def _load(self, replica: int) -> Iterator[Event]:
        tables = self._alive().load()
        yield Broken(replica, tables) if isinstance(tables, Failed) else Loaded(replica, tables)

    def _run(self, replica: int, lease: int, units: Sequence[Unit]) -> Iterator[Event]:
        for item in self._alive().run(units):
            yield Delivered(replica, lease, item)
        yield LeaseEnded(replica, lease)

    def _alive(self) -> Worker:
        assert self._worker is not None, "asked of a replica that was stopped"
        return self._worker

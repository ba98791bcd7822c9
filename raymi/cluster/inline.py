"""The backend without Ray: one model at a time, in this process. For debugging, and for small things.

A thread computes, so that the driver hears of signals whatever is going on: a load or a unit may take minutes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Literal

from raymi.cluster.messages import Broken, Delivered, Event, Impossible, LeaseEnded, Loaded, Prepared
from raymi.cluster.worker import Failed, Worker
from raymi.experiments.unit import Unit
from raymi.leaving import abandon


class InlineBackend:
    """Does one step of what was asked at a time, a load or one unit, and only while `poll` waits for it.

    Args:
        make: a worker for a model, by its key.
    """

    def __init__(self, make: Callable[[str], Worker]) -> None:
        self._make = make
        self._replica: int | None = None
        self._worker: Worker | None = None
        self._steps: deque[Iterator[Event]] = deque()
        self._hand = _Hand()

    def start(self, replica: int, model: str, *, share: float, roomy: bool) -> Literal["started", "full"] | Impossible:
        if self._worker is not None:
            return "full"
        self._replica, self._worker = replica, self._make(model)
        return "started"

    def prepare(self, replica: int) -> None:
        self._steps.append(self._prepare(self._alive(), replica))

    def load(self, replica: int) -> None:
        self._steps.append(self._load(self._alive(), replica))

    def run(self, replica: int, lease: int, units: Sequence[Unit]) -> None:
        self._steps.append(self._run(self._alive(), replica, lease, units))

    def drain(self, replica: int) -> None:
        self._alive().drain()

    def stop(self, replica: int) -> None:
        self._replica = self._worker = None
        self._steps.clear()
        if self._hand.busy:  # only a signal ends a step
            abandon(self._hand)
            self._hand = _Hand()

    def poll(self, timeout: float) -> list[Event]:
        while self._steps:
            events = self._hand.next(self._steps[0], timeout)
            if events is None:
                return []
            if events:
                return events
            self._steps.popleft()
        time.sleep(timeout)
        return []

    @staticmethod
    def _prepare(worker: Worker, replica: int) -> Iterator[Event]:
        tables = worker.prepare()
        yield Broken(replica, tables) if isinstance(tables, Failed) else Prepared(replica, tables)

    @staticmethod
    def _load(worker: Worker, replica: int) -> Iterator[Event]:
        tables = worker.load()
        yield Broken(replica, tables) if isinstance(tables, Failed) else Loaded(replica, tables)

    @staticmethod
    def _run(worker: Worker, replica: int, lease: int, units: Sequence[Unit]) -> Iterator[Event]:
        for item in worker.run(units):
            yield Delivered(replica, lease, item)
        yield LeaseEnded(replica, lease)

    def _alive(self) -> Worker:
        assert self._worker is not None, "asked of a replica that was stopped"
        return self._worker


class _Hand(threading.Thread):
    """Takes one step at a time. It is one thread for all of them, since torch keeps helpers for each that computes."""

    def __init__(self) -> None:
        super().__init__(name="raymi's model", daemon=True)
        self.busy = False
        self._asked: SimpleQueue[Iterator[Event]] = SimpleQueue()
        self._answers: SimpleQueue[list[Event] | BaseException] = SimpleQueue()

    def next(self, events: Iterator[Event], timeout: float) -> list[Event] | None:
        """The next event, or none when there are no more; None when it takes longer than `timeout` seconds."""
        if not self.busy:
            if not self.is_alive():
                self.start()
            self.busy = True
            self._asked.put(events)
        try:
            answer = self._answers.get(timeout=timeout)
        except Empty:
            return None
        self.busy = False
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def run(self) -> None:
        while True:
            events = self._asked.get()
            try:
                event = next(events, None)
                answer: list[Event] | BaseException = [] if event is None else [event]
            except BaseException as error:
                answer = error
            del events  # nor the worker behind them
            self._answers.put(answer)

"""A cluster of pretence: replicas that take simulated seconds, with every way of failing, under a clock of its own."""

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from raymi.cluster.messages import (
    Broken,
    Delivered,
    Event,
    Impossible,
    LeaseEnded,
    Loaded,
    Lost,
    Note,
    Outcome,
    Prepared,
    Rows,
    Trouble,
)
from raymi.cluster.scheduler import Scheduler
from raymi.cluster.worker import Done, Failed
from raymi.experiments.knockout.spec import Ablation
from raymi.experiments.unit import Unit
from raymi.store import schemas

ABLATION = Ablation(layers=(0,), heads=None, edges=((1, 0),))


def unit(name: str, flops: int = 1) -> Unit:
    return Unit(name, "heads", (("prompt", (ABLATION,)),), flops)


def units(model: str, n: int, flops: int = 1) -> list[Unit]:
    return [unit(f"{model}/{i:04}", flops) for i in range(n)]


Fate = Literal["done", "raises", "oom", "dies", "node dies", "silent"]


@dataclass
class Behaviour:
    """What simulated replicas do; every method may be replaced by a test."""

    seconds: float = 1.0
    """Per unit of one flop."""
    start_seconds: float = 5.0
    fate: Callable[[int, Unit], Fate] = lambda replica, unit: "done"
    loading: Callable[[int, str], Literal["loads", "raises", "oom", "dies", "node dies"]] = lambda replica, model: (
        "loads"
    )


@dataclass
class Simulated:
    model: str
    cores: int
    queue: list[tuple[int, list[Unit]]] = field(default_factory=list)
    busy: bool = False
    drained: bool = False


@dataclass
class SimulatedBackend:
    """A machine of `cores`; `history` says what was asked of it, in order."""

    cores: int = 4
    behaviour: Behaviour = field(default_factory=Behaviour)
    impossible: frozenset[str] = frozenset()
    per_replica: int = 1
    now: float = 0.0

    def __post_init__(self) -> None:
        self.alive: dict[int, Simulated] = {}
        self.agenda: list[tuple[float, int, Event, Callable[[], None]]] = []
        self.order = itertools.count()
        self.history: list[tuple[object, ...]] = []
        self.most_leases = 0

    def clock(self) -> float:
        return self.now

    # The backend's side

    def start(self, replica: int, model: str, *, share: float, roomy: bool) -> Literal["started", "full"] | Impossible:
        assert 0 < share <= 1
        if model in self.impossible:
            return Impossible("needs a bigger machine")
        if sum(r.cores for r in self.alive.values()) + self.per_replica > self.cores:
            return "full"
        self.alive[replica] = Simulated(model, self.per_replica)
        self.history.append(("start", model, roomy))
        return "started"

    def prepare(self, replica: int) -> None:
        self._later(self.behaviour.start_seconds / 2, Prepared(replica, {"prompts": schemas.rows("prompts", [])}))

    def load(self, replica: int) -> None:
        fate = self.behaviour.loading(replica, self.alive[replica].model)
        event: Event = Loaded(replica, {})
        if fate in ("raises", "oom"):
            event = Broken(replica, Failed(None, "OSError", "truncated file", oom=fate == "oom"))
        elif fate in ("dies", "node dies"):
            event = Lost(replica, "node" if fate == "node dies" else "process", "died while loading")
        self._later(self.behaviour.start_seconds, event)

    def run(self, replica: int, lease: int, units: Sequence[Unit]) -> None:
        simulated = self.alive[replica]
        simulated.queue.append((lease, list(units)))
        self.history.append(("run", simulated.model, replica, [u.unit_id for u in units]))
        self.most_leases = max(self.most_leases, len(simulated.queue))
        self._go_on(replica)

    def drain(self, replica: int) -> None:
        self.history.append(("drain", replica))
        self.alive[replica].drained = True

    def stop(self, replica: int) -> None:
        self.history.append(("stop", self.alive.pop(replica).model))

    def poll(self, timeout: float) -> list[Event]:
        limit = self.now + timeout
        while self.agenda and self.agenda[0][0] <= limit:
            at, _, event, then = heapq.heappop(self.agenda)
            self.now = max(self.now, at)
            if event.replica in self.alive:
                then()
                return [event]
        self.now = limit
        return []

    # Inside

    def _later(self, seconds: float, event: Event, then: Callable[[], None] = lambda: None) -> None:
        heapq.heappush(self.agenda, (self.now + seconds, next(self.order), event, then))

    def _go_on(self, replica: int) -> None:
        simulated = self.alive[replica]
        if simulated.busy or not simulated.queue:
            return
        simulated.busy = True
        lease, pending = simulated.queue[0]
        if simulated.drained or not pending:
            self._later(0.0, LeaseEnded(replica, lease), lambda: self._next_lease(replica))
            return
        unit = pending.pop(0)
        seconds = self.behaviour.seconds * unit.flops
        fate = self.behaviour.fate(replica, unit)
        outcomes: dict[str, Done | Failed] = {
            "done": Done(unit.unit_id, {}, seconds),
            "raises": Failed(unit.unit_id, "ValueError", "NaN"),
            "oom": Failed(unit.unit_id, "OutOfMemoryError", "no memory", oom=True),
        }
        if fate in outcomes:
            self._later(seconds, Delivered(replica, lease, outcomes[fate]), lambda: self._next_unit(replica))
        elif fate == "silent":
            self._next_unit(replica)
        else:
            self._later(seconds, Lost(replica, "node" if fate == "node dies" else "process", "killed"))

    def _next_unit(self, replica: int) -> None:
        self.alive[replica].busy = False
        self._go_on(replica)

    def _next_lease(self, replica: int) -> None:
        self.alive[replica].queue.pop(0)
        self._next_unit(replica)


@dataclass
class Result:
    """Everything a finished simulation told its driver."""

    outcomes: list[Outcome]
    seconds: float

    def done(self) -> list[str]:
        return [o.unit.unit_id for o in self.outcomes if isinstance(o, Rows) and o.unit]

    def failed_units(self) -> dict[str, str]:
        return {o.unit_id: o.failure.kind for o in self.troubles() if o.final and o.unit_id}

    def failed_models(self) -> dict[str, str]:
        return {o.model: o.failure.message for o in self.troubles() if o.final and not o.unit_id}

    def troubles(self) -> list[Trouble]:
        return [o for o in self.outcomes if isinstance(o, Trouble)]

    def notes(self, what: str) -> list[Note]:
        return [o for o in self.outcomes if isinstance(o, Note) and o.what == what]


def simulate(
    scheduler: Scheduler, backend: SimulatedBackend, *, until: float = 1e7, each: Callable[[], None] | None = None
) -> Result:
    """The driver's loop. Fails when the scheduler still waits although nothing can happen any more."""
    outcomes = scheduler.step([])
    quiet = 0
    while not scheduler.finished:
        events = backend.poll(0.5)
        outcomes += scheduler.step(events)
        quiet = 0 if events or backend.agenda else quiet + 1
        assert quiet < 1000, f"deadlock at {backend.now} s: {scheduler.status()}"
        assert backend.now < until, f"not finished after {until} s: {scheduler.status()}"
        if each:
            each()
    return Result(outcomes, backend.now)


def rng_behaviour(rng: random.Random, chaos: float) -> Behaviour:
    """Failures of every kind, each as likely as the others, `chaos` of the time."""
    fates: list[Fate] = ["raises", "oom", "dies", "node dies", "silent"]
    speeds: dict[int, float] = {}

    def fate(replica: int, unit: Unit) -> Fate:
        speeds.setdefault(replica, rng.uniform(0.5, 2))
        return rng.choice(fates) if rng.random() < chaos else "done"

    def loading(replica: int, model: str) -> Literal["loads", "raises", "oom", "dies", "node dies"]:
        return rng.choice(["raises", "oom", "dies", "node dies"]) if rng.random() < chaos else "loads"  # type: ignore

    return Behaviour(seconds=rng.choice([0.001, 0.3, 4.0, 60.0]), fate=fate, loading=loading)

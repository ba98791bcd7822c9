"""Leases and placement: which replica measures which units, and what happens when one fails or is lost.

Pure Python. What is carried out is the backend's business (Ray, or this process) and the clock is injected, so a
thousand replicas and every failure are tested in milliseconds. The driver's loop is

    outcomes = scheduler.step([])
    while not scheduler.finished:
        outcomes = scheduler.step(backend.poll(0.5))

Units never change; chunks, the units leased at one time, follow the clock. A unit may be leased twice (by an idle
replica at the end), the first delivery wins. Nothing is restarted or retried anywhere else.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from raymi.cluster.messages import (
    Backend,
    Broken,
    Delivered,
    Event,
    Impossible,
    LeaseEnded,
    Loaded,
    Lost,
    Note,
    NoteKind,
    Outcome,
    Phase,
    Prepared,
    Rows,
    Stage,
    Status,
    Trouble,
)
from raymi.cluster.worker import Done, Failed
from raymi.experiments.unit import Unit

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_SECONDS = 10.0
"""How much work a replica is given at one time."""
LEASES = 2
"""Chunks in flight per replica: one runs, one waits behind it."""
ATTEMPTS = 2
"""How often a unit that raises is tried."""
DEATHS = 2
"""How many replicas a unit may take with it before it is set aside."""
STRIKES = 6
"""How many replicas in a row a model may lose without one delivered unit."""
LOADING_STRIKES = 2
"""The same, for processes that die before the model is loaded."""
BACKOFF = (1.0, 60.0)
"""Seconds before a model's next replica after a first loss, and at most."""
LOOK_AGAIN = 5.0
"""Seconds after which a full cluster is asked again, since others may have left it."""


# Inside


@dataclass(slots=True)
class _Work:
    """A unit and what has become of it."""

    unit: Unit
    holders: set[int] = field(default_factory=set[int])
    """Leases that have yet to deliver it."""
    attempts: int = 0
    deaths: int = 0
    final: Literal["done", "failed"] | None = None
    last: Failed | None = None

    @property
    def cost(self) -> int:
        return max(1, self.unit.flops)

    @property
    def tries(self) -> int:
        return self.attempts + self.deaths


@dataclass(slots=True)
class _Lease:
    id: int
    pending: dict[str, _Work]
    """By unit id, in the order they are measured."""


@dataclass(slots=True)
class _Replica:
    id: int
    model: "_Model"
    since: float
    phase: Literal["tokenising", "loading", "running"]
    leases: dict[int, _Lease] = field(default_factory=dict[int, _Lease])


@dataclass(slots=True)
class _Model:
    key: str
    guess: float
    """Work before the units are known, in flops."""
    work: dict[str, _Work] | None = None
    waiting: deque[_Work] = field(default_factory=deque[_Work])
    replicas: dict[int, _Replica] = field(default_factory=dict[int, _Replica])
    waiting_cost: int = 0
    cost_left: int = 0
    open: int = 0
    """Units without a final state."""
    done: int = 0
    ablations: int = 0
    ablations_done: int = 0
    final: Literal["done", "failed"] | None = None
    not_before: float = 0.0
    strikes: int = 0
    loading_strikes: int = 0
    roomy: bool = False
    only_one: bool = False
    """A further replica could not be had: no more of them."""
    start_seconds: float | None = None
    rate: float | None = None
    """Seconds per flop, a moving average."""

    @property
    def left(self) -> float:
        return self.guess if self.work is None else float(self.cost_left)

    @property
    def seconds_left(self) -> float | None:
        return None if self.rate is None else self.rate * self.cost_left / max(1, len(self.replicas))

    def adopt(self, units: Iterable[Unit]) -> None:
        self.work = {unit.unit_id: _Work(unit) for unit in units}
        self.waiting = deque(self.work.values())
        self.cost_left = self.waiting_cost = sum(work.cost for work in self.waiting)
        self.open = len(self.work)
        self.ablations = sum(work.unit.n_ablations for work in self.waiting)

    def queue(self, work: _Work) -> None:
        """What may do harm goes to the end, so that the others are served first."""
        (self.waiting.append if work.last else self.waiting.appendleft)(work)
        self.waiting_cost += work.cost

    def take(self) -> _Work:
        work = self.waiting.popleft()
        self.waiting_cost -= work.cost
        return work


Plan = Callable[[str, "Mapping[str, pa.Table]"], Sequence[Unit] | Failed]


class Scheduler:
    """Leases the units of many models to replicas until each is done, or failed with a reason.

    Args:
        backend: carries out the decisions.
        clock: seconds, never going back (`time.monotonic`).
        plan: given a model, its tokenised prompts and its autoencoders, the units that are still to be measured, or why
            it cannot run.
        guesses: models to run, with a guess of their work in flops.
        units: units of the models whose prompts are known already.
    """

    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], float],
        plan: Plan,
        guesses: Mapping[str, float],
        units: Mapping[str, Sequence[Unit]] | None = None,
    ) -> None:
        self._backend, self._clock, self._plan = backend, clock, plan
        self._models = {key: _Model(key, guess=max(1.0, guess)) for key, guess in guesses.items()}
        self._replicas: dict[int, _Replica] = {}
        self._numbers = itertools.count()
        self._outbox: list[Outcome] = []
        self._stopping = False
        self._place_at = 0.0
        for key, known in (units or {}).items():
            self._models[key].adopt(known)
        for model in self._models.values():
            self._finish_if_done(model)

    # The driver's side

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen: every model is final, or a stop has drained every lease."""
        if self._stopping:
            return not any(replica.leases for replica in self._replicas.values())
        return all(model.final for model in self._models.values())

    def step(self, events: Iterable[Event]) -> list[Outcome]:
        """Take in what happened, decide what to do next, and say what the driver must know."""
        for event in events:
            replica = self._replicas.get(event.replica)
            if replica is not None:  # else it was stopped, and this was on its way
                self._handle(replica, event)
        if not self._stopping:
            self._place()
        outcomes, self._outbox = self._outbox, []
        return outcomes

    def stop(self) -> None:
        """Lease nothing more and let every replica end the unit in hand."""
        self._stopping = True
        for replica in list(self._replicas.values()):
            if replica.leases:
                self._backend.drain(replica.id)
            else:
                self._release(replica)

    def close(self) -> None:
        """Stop every replica that is left, at once."""
        self._stopping = True
        for replica in list(self._replicas.values()):
            self._release(replica)

    def status(self) -> dict[str, Status]:
        """Where every model stands, by its key."""
        return {key: _status(model) for key, model in self._models.items()}

    # What happened

    def _handle(self, replica: _Replica, event: Event) -> None:
        match event:
            case Prepared(tables=tables):
                self._on_prepared(replica, tables)
            case Loaded(tables=tables):
                self._on_loaded(replica, tables)
            case Broken(failure=failure):
                self._on_broken(replica, failure)
            case Delivered(lease=lease, item=item):
                self._on_delivered(replica, lease, item)
            case LeaseEnded(lease=lease):
                self._on_lease_ended(replica, lease)
            case Lost():
                self._on_lost(replica, event)

    def _on_prepared(self, replica: _Replica, tables: "Mapping[str, pa.Table]") -> None:
        model = replica.model
        units = self._plan(model.key, tables)
        if isinstance(units, Failed):
            self._fail_model(model, "plan", units)
            return
        model.adopt(units)
        if not self._finish_if_done(model):
            replica.phase = "loading"
            self._backend.load(replica.id)

    def _on_loaded(self, replica: _Replica, tables: "Mapping[str, pa.Table]") -> None:
        model = replica.model
        replica.phase = "running"
        model.loading_strikes = 0
        model.start_seconds = self._clock() - replica.since
        self._note(model, "loaded", replica, f"{model.start_seconds:.1f} s")
        self._outbox.append(Rows(model.key, None, tables))
        self._lease(replica)

    def _on_broken(self, replica: _Replica, failure: Failed) -> None:
        model = replica.model
        stage = "plan" if replica.phase == "tokenising" else "load"
        if failure.tables:
            self._outbox.append(Rows(model.key, None, failure.tables))
        self._release(replica)
        if failure.oom and not model.roomy:
            model.roomy = True
            self._outbox.append(Trouble(model.key, stage, failure, final=False))
        elif model.replicas:  # the others have shown that it can be done
            model.only_one = True
            self._outbox.append(Trouble(model.key, stage, failure, final=False))
        else:
            self._fail_model(model, stage, failure)

    def _on_delivered(self, replica: _Replica, lease_id: int, item: Done | Failed) -> None:
        model, lease = replica.model, replica.leases[lease_id]
        work = lease.pending.pop(item.unit_id or "", None)
        if work is None:
            return
        work.holders.discard(lease_id)
        if isinstance(item, Done):
            model.strikes = 0
            rate = item.seconds / work.cost
            model.rate = rate if model.rate is None else 0.7 * model.rate + 0.3 * rate
        if work.final:
            return
        if isinstance(item, Done):
            self._outbox.append(Rows(model.key, work.unit, item.tables))
            self._settle(model, work, "done")
        else:
            self._unit_failed(model, work, item)
        self._finish_if_done(model)
        if isinstance(item, Failed) and item.oom and not model.roomy and not model.final:
            self._make_room(replica, item)

    def _on_lease_ended(self, replica: _Replica, lease_id: int) -> None:
        model = replica.model
        lease = replica.leases.pop(lease_id)
        for work in lease.pending.values():
            work.holders.discard(lease_id)
            if not self._stopping and not work.final:
                silent = Failed(work.unit.unit_id, "NotDelivered", "the replica ended its lease without this unit")
                self._unit_failed(model, work, silent)
        if self._stopping:
            if not replica.leases:
                self._release(replica)
        elif not self._finish_if_done(model):
            self._lease(replica)

    def _on_lost(self, replica: _Replica, loss: Lost) -> None:
        model = replica.model
        loading = replica.phase != "running"
        self._note(model, "lost", replica, f"{loss.kind}: {loss.message}")
        suspect = None if loss.kind == "node" else _in_hand(replica)
        if suspect:
            suspect.deaths += 1
            suspect.last = Failed(suspect.unit.unit_id, f"replica lost ({loss.kind})", loss.message)
        model.strikes += 1
        model.loading_strikes += loading and loss.kind != "node"
        first, most = BACKOFF
        model.not_before = self._clock() + min(most, first * 2 ** (model.strikes - 1))
        self._release(replica)
        if suspect and suspect.last and not suspect.final:
            self._outbox.append(Trouble(model.key, "replica", suspect.last, final=False, attempt=suspect.tries))
        if not self._finish_if_done(model) and not self._stopping:
            self._give_up_if_hopeless(model, loss, loading)

    def _give_up_if_hopeless(self, model: _Model, loss: Lost, loading: bool) -> None:
        if loading and model.replicas:
            model.only_one = True
        elif model.loading_strikes >= LOADING_STRIKES or model.strikes >= STRIKES:
            text = f"its process was lost {model.strikes} times in a row, at last: {loss.message}"
            self._fail_model(model, "replica", Failed(None, f"replica lost ({loss.kind})", text))

    # Units

    def _unit_failed(self, model: _Model, work: _Work, failure: Failed) -> None:
        work.attempts += 1
        work.last = failure
        self._give_back(model, work)
        if not work.final:
            self._outbox.append(Trouble(model.key, "unit", failure, final=False, attempt=work.tries))

    def _give_back(self, model: _Model, work: _Work) -> None:
        """Queue a unit that one lease no longer holds, unless another still does, or it has had its chances."""
        if work.final or work.holders:
            return
        if work.last and (work.deaths >= DEATHS or work.attempts >= ATTEMPTS):
            self._settle(model, work, "failed")
            stage = "replica" if work.deaths >= DEATHS else "unit"
            self._outbox.append(Trouble(model.key, stage, work.last, final=True, attempt=work.tries))
        else:
            model.queue(work)

    def _settle(self, model: _Model, work: _Work, how: Literal["done", "failed"]) -> None:
        work.final = how
        model.open -= 1
        model.cost_left -= work.cost
        if how == "done":
            model.done += 1
            model.ablations_done += work.unit.n_ablations

    def _make_room(self, replica: _Replica, failure: Failed) -> None:
        """A unit did not fit next to its neighbours: the next replicas of the model get a larger slot."""
        model = replica.model
        model.roomy = True
        self._note(model, "lost", replica, f"needs more memory: {failure.message}")
        self._release(replica)

    # Replicas

    def _lease(self, replica: _Replica) -> None:
        """Give a loaded replica chunks until it holds enough, or let it help another, or let it go."""
        model = replica.model
        while len(replica.leases) < LEASES and not self._stopping:
            chunk = self._chunk(model)
            if not chunk and not replica.leases and not self._others_wait():
                chunk = self._others_tail(replica)
            if not chunk:
                break
            lease = _Lease(next(self._numbers), {work.unit.unit_id: work for work in chunk})
            for work in chunk:
                work.holders.add(lease.id)
            replica.leases[lease.id] = lease
            self._backend.run(replica.id, lease.id, [work.unit for work in chunk])
        if not replica.leases and not self._stopping:
            self._release(replica)

    def _chunk(self, model: _Model) -> list[_Work]:
        """The next units of about CHUNK_SECONDS, fewer near the end so that all replicas end together."""
        budget = 0.0
        if model.rate is not None:
            waiting = model.waiting_cost * model.rate
            budget = min(CHUNK_SECONDS, waiting / (2 * max(1, len(model.replicas))))
        chunk: list[_Work] = []
        seconds = 0.0
        while model.waiting and (not chunk or seconds < budget):
            work = model.take()
            chunk.append(work)
            seconds += work.cost * (model.rate or 0.0)
        return chunk

    def _others_wait(self) -> bool:
        """Whether a model without a replica could use the room."""
        return any(not model.final and not model.replicas for model in self._models.values())

    def _others_tail(self, replica: _Replica) -> list[_Work]:
        """What another replica will reach last, of the one whose oldest lease is the oldest; never a third holder."""
        others = [other for other in replica.model.replicas.values() if other.leases and other is not replica]
        for other in sorted(others, key=lambda other: min(other.leases)):
            pending = [work for lease in other.leases.values() for work in lease.pending.values()]
            alone = [work for work in pending if len(work.holders) == 1 and not work.final]
            if alone:
                half = alone[len(alone) // 2 :]
                return half[::-1]
        return []

    def _release(self, replica: _Replica) -> None:
        """Stop a replica; what it still held goes back to the queue."""
        model = replica.model
        del self._replicas[replica.id], model.replicas[replica.id]
        for lease in reversed(replica.leases.values()):
            for work in reversed(lease.pending.values()):
                work.holders.discard(lease.id)
                self._give_back(model, work)
        self._backend.stop(replica.id)
        self._note(model, "stop", replica)
        self._place_at = 0.0

    def _place(self) -> None:
        """Start what there is room for: models without a replica first, the longest first; then second replicas."""
        now = self._clock()
        if now < self._place_at:
            return
        open_models = [model for model in self._models.values() if not model.final]
        total = sum(model.left for model in open_models) or 1.0
        idle = sorted((m for m in open_models if not m.replicas), key=lambda m: -m.left)
        for model in idle:
            if model.not_before <= now:
                self._start(model, model.left / total)
        if all(model.replicas for model in open_models):
            for model in sorted(open_models, key=lambda m: -m.left):
                while self._wants_another(model) and self._start(model, model.left / total):
                    pass
        waits = [model.not_before - now for model in idle if model.not_before > now]
        self._place_at = now + min([LOOK_AGAIN, *waits])

    def _wants_another(self, model: _Model) -> bool:
        """Whether the work that waits outweighs one more load."""
        if model.only_one or model.rate is None or model.start_seconds is None or model.not_before > self._clock():
            return False
        waiting = model.waiting_cost * model.rate
        return len(model.waiting) > 1 and waiting / (len(model.replicas) + 1) > 2 * model.start_seconds

    def _start(self, model: _Model, share: float) -> bool:
        number = next(self._numbers)
        answer = self._backend.start(number, model.key, share=min(1.0, share), roomy=model.roomy)
        if isinstance(answer, Impossible):
            self._fail_model(model, "replica", Failed(None, "Impossible", answer.reason))
            return False
        if answer == "full":
            return False
        replica = _Replica(number, model, self._clock(), "tokenising" if model.work is None else "loading")
        self._replicas[number] = model.replicas[number] = replica
        self._note(model, "start", replica)
        (self._backend.prepare if model.work is None else self._backend.load)(number)
        return True

    # Models

    def _finish_if_done(self, model: _Model) -> bool:
        if model.final:
            return True
        if model.work is None or model.open:
            return False
        model.final = "done"
        self._note(model, "done")
        self._let_go(model)
        return True

    def _fail_model(self, model: _Model, stage: Stage, why: Failed) -> None:
        model.final = "failed"
        for work in (model.work or {}).values():
            if not work.final:
                self._settle(model, work, "failed")
        self._outbox.append(Trouble(model.key, stage, why, final=True))
        self._let_go(model)

    def _let_go(self, model: _Model) -> None:
        for replica in list(model.replicas.values()):
            self._release(replica)
        model.waiting.clear()
        model.waiting_cost = 0
        self._place_at = 0.0

    def _note(self, model: _Model, what: NoteKind, replica: _Replica | None = None, detail: str = "") -> None:
        self._outbox.append(Note(model.key, what, None if replica is None else replica.id, detail))


def _in_hand(replica: _Replica) -> _Work | None:
    """The unit a replica was working on: the first that its oldest lease has yet to deliver."""
    for lease in replica.leases.values():
        for work in lease.pending.values():
            return work
    return None


def _status(model: _Model) -> Status:
    phases = {replica.phase for replica in model.replicas.values()}
    alive: Phase = "waiting"
    for phase in ("tokenising", "loading", "running"):
        alive = phase if phase in phases else alive
    units = None if model.work is None else len(model.work)
    return Status(
        phase=model.final or alive,
        units=units,
        done=model.done,
        failed=(units or 0) - model.open - model.done,
        ablations=model.ablations,
        ablations_done=model.ablations_done,
        replicas=len(model.replicas),
        seconds_left=model.seconds_left,
    )

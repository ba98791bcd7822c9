"""The backend on Ray: an actor per replica, a streaming generator per lease.

Ray restarts nothing and retries nothing. Whatever says that an actor is gone makes the replica lost, once, and its
handle is killed and never used again: an actor that Ray calls unavailable may come back half way through a lease.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from raymi.catalog import CachedModel
from raymi.cluster.inventory import Demand, Node, demand, key_of, place
from raymi.cluster.messages import Broken, Delivered, Event, Impossible, LeaseEnded, Loaded, Lost, Prepared
from raymi.cluster.replica import STREAM, MakeWorker, RemoteReplica
from raymi.cluster.worker import Failed
from raymi.experiments.unit import Unit
from raymi.job import Job
from raymi.store.secret import scrub

READY_SECONDS = 300.0
"""For an actor's process to start. What Ray cannot place it keeps pending for ever, without a word."""


@dataclass(slots=True)
class _Alive:
    """A replica's actor, and what is expected of it."""

    id: int
    actor: Any
    node: Node
    ready: Any
    """Resolves once the process runs; None when it has."""
    until: float
    """By when it has to."""
    asked: dict[Any, Literal["prepare", "load"]] = field(default_factory=dict[Any, Literal["prepare", "load"]])
    leases: dict[Any, int] = field(default_factory=dict[Any, int])
    """Generator -> lease, in the order they run."""


class RayBackend:
    """Places replicas on nodes that hold their model and have room.

    Args:
        nodes: of the cluster, with the models that lie on each.
        job: for dtype and device.
        models: key of the scheduler -> model.
        make: given a model as its node has it, what makes its worker there.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        job: Job,
        models: Mapping[str, CachedModel],
        make: Callable[[CachedModel], MakeWorker],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes, self._job, self._models, self._make, self._clock = list(nodes), job, models, make, clock
        self._alive: dict[int, _Alive] = {}

    def start(self, replica: int, model: str, *, share: float, roomy: bool) -> Literal["started", "full"] | Impossible:
        name = key_of(self._models[model])
        holders = [node for node in self._nodes if name in node.models]
        answers = [(node, demand(node.models[name], node, self._job, share=share, roomy=roomy)) for node in holders]
        possible = [(node, need) for node, need in answers if isinstance(need, Demand)]
        if not possible:
            reasons = {answer.reason for _, answer in answers if isinstance(answer, Impossible)}
            return Impossible("; ".join(sorted(reasons)) or "no node that is alive has it")
        free = [(node, need) for node, need in possible if node.has_room(need)]
        if not free:
            return "full"
        node, need = max(free, key=lambda pair: (pair[0].free_gpus, pair[0].free_cpus))
        self._create(replica, node, need, node.models[name])
        return "started"

    def prepare(self, replica: int) -> None:
        alive = self._alive[replica]
        alive.asked[alive.actor.prepare.remote()] = "prepare"

    def load(self, replica: int) -> None:
        alive = self._alive[replica]
        alive.asked[alive.actor.load.remote()] = "load"

    def run(self, replica: int, lease: int, units: Sequence[Unit]) -> None:
        alive = self._alive[replica]
        stream = alive.actor.run.options(_generator_backpressure_num_objects=STREAM).remote(list(units))
        alive.leases[stream] = lease

    def drain(self, replica: int) -> None:
        self._alive[replica].actor.drain.remote()

    def stop(self, replica: int) -> None:
        alive = self._alive.pop(replica)
        del alive.node.taken[replica]
        ray.kill(alive.actor)

    def poll(self, timeout: float) -> list[Event]:
        owners = {ref: alive for alive in self._alive.values() for ref in _expected(alive)}
        if not owners:
            time.sleep(timeout)
            return []
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=timeout, fetch_local=False)
        if ready:  # then all that are, without waiting: one that is often ready must not keep the others back
            ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0, fetch_local=False)
        events: list[Event] = []
        lost: set[int] = set()
        for ref in ready:
            alive = owners[ref]
            if alive.id not in lost:
                for event in self._take(alive, ref):
                    events.append(event)
                    if isinstance(event, Lost):
                        lost.add(alive.id)
        return [*events, *self._overdue(lost)]

    def _create(self, replica: int, node: Node, need: Demand, model: CachedModel) -> None:
        threads = None if need.gpus else need.cpus
        actor = RemoteReplica.options(
            num_cpus=need.cpus,
            num_gpus=need.gpus,
            memory=need.memory,
            scheduling_strategy=place(node),
            name=f"raymi {model.id} {replica} {time.time_ns()}",
        ).remote(self._make(model), threads)
        node.taken[replica] = need
        until = self._clock() + READY_SECONDS
        self._alive[replica] = _Alive(replica, actor, node, actor.__ray_ready__.remote(), until)

    def _take(self, alive: _Alive, ref: Any) -> Iterator[Event]:
        """What `ref`, which is ready, brings."""
        try:
            if ref is alive.ready:
                ray.get(ref)
                alive.ready = None
            elif ref in alive.asked:
                yield _answer(alive.id, alive.asked.pop(ref), ray.get(ref))
            else:
                yield from _stream(alive, ref)
        except RayError as error:
            yield self._loss(alive, error)

    def _loss(self, alive: _Alive, error: RayError) -> Lost:
        kind: Literal["process", "memory", "node"] = "process"
        if isinstance(error, OutOfMemoryError):
            kind = "memory"
        elif isinstance(error, NodeDiedError | ActorUnschedulableError):
            self._forget(alive.node)  # `ray.nodes()` may call it alive for a while yet
            kind = "node"
        elif self._is_gone(alive.node):
            self._forget(alive.node)
            kind = "node"
        elif isinstance(error, ActorUnavailableError):
            # Of a process that died by itself Ray says that it died: this one is out of reach, and so is its node.
            kind = "node"
        return Lost(alive.id, kind, _gist(error))

    def _is_gone(self, node: Node) -> bool:
        """Whether the node has left the cluster."""
        return not any(each["Alive"] for each in ray.nodes() if each["NodeID"] == node.id)

    def _forget(self, node: Node) -> None:
        """Place nothing more on a node."""
        if node in self._nodes:
            self._nodes.remove(node)

    def _overdue(self, lost: set[int]) -> list[Event]:
        now = self._clock()
        late = [a for a in self._alive.values() if a.ready is not None and now > a.until and a.id not in lost]
        message = f"its process did not start within {READY_SECONDS:.0f} s"
        return [Lost(alive.id, "not ready", message) for alive in late]


def _expected(alive: _Alive) -> list[Any]:
    return [*alive.asked, *alive.leases] + ([] if alive.ready is None else [alive.ready])


def _answer(replica: int, question: Literal["prepare", "load"], answer: Any) -> Event:
    if isinstance(answer, Failed):
        return Broken(replica, answer)
    return Prepared(replica, answer) if question == "prepare" else Loaded(replica, answer)


def _stream(alive: _Alive, stream: Any) -> Iterator[Event]:
    """What a lease has ready."""
    lease = alive.leases[stream]
    while True:
        try:
            item: Any = ray.get(next(stream))
        except StopIteration:
            del alive.leases[stream]
            yield LeaseEnded(alive.id, lease)
            return
        yield Delivered(alive.id, lease, item)
        if not stream.next_ready():
            return


def _gist(error: RayError) -> str:
    """The telling lines of one of Ray's long messages: the last of a traceback, else the first."""
    lines = [line.rstrip() for line in scrub(str(error)).splitlines() if line.strip()]
    if isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False):
        return lines[-1].strip()
    return " ".join(line for line in lines if not line[0].isspace())[:300]  # ids of actor, job and node are indented

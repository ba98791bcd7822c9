"""The actor: one process, one model, a stream of results."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import ray

from raymi.cluster.worker import Done, Failed, Worker
from raymi.experiments.unit import Unit

if TYPE_CHECKING:
    import pyarrow as pa

MakeWorker = Callable[[int | None], Worker]
"""Makes the worker of a model, given the number of threads it may use, in the process that is to run it."""

STREAM = 4
"""Results that may wait for the driver before the replica pauses."""


class Replica:
    """A worker behind Ray. Its driver owns the leases, so nothing is restarted or retried here."""

    def __init__(self, make: MakeWorker, threads: int | None) -> None:
        self._worker = make(threads)

    def prepare(self) -> "dict[str, pa.Table] | Failed":
        return self._worker.prepare()

    def load(self) -> "dict[str, pa.Table] | Failed":
        return self._worker.load()

    def run(self, units: Sequence[Unit]) -> Iterator[Done | Failed]:
        yield from self._worker.run(units)

    @ray.method(concurrency_group="control")
    def drain(self) -> None:
        """Answered while a unit is being measured."""
        self._worker.drain()


_actor: Any = cast(Any, ray.remote)(concurrency_groups={"control": 1}, max_restarts=0, max_task_retries=0)
RemoteReplica = _actor(Replica)
"""What Ray makes of it; one method at a time, but for those of the control group."""

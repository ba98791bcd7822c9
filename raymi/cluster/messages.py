"""What the scheduler, its backend and the driver say to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from raymi.cluster.worker import Done, Failed
from raymi.experiments.unit import Unit

if TYPE_CHECKING:
    import pyarrow as pa

# What the backend reports


@dataclass(frozen=True, slots=True)
class Prepared:
    """The replica's tokenizer has read the prompts, and the autoencoders are found."""

    replica: int
    tables: "Mapping[str, pa.Table]"
    """Rows of the tables `prompts` and `saes`, and of `failures`: of prompts that cannot be read."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The replica holds its model."""

    replica: int
    tables: "Mapping[str, pa.Table]"


@dataclass(frozen=True, slots=True)
class Broken:
    """The replica lives but could not tokenise, or load its model."""

    replica: int
    failure: Failed


@dataclass(frozen=True, slots=True)
class Delivered:
    """One unit of a lease came out, with rows or with a failure. Units come out in the order they were leased."""

    replica: int
    lease: int
    item: Done | Failed


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """Nothing more comes of this lease."""

    replica: int
    lease: int


@dataclass(frozen=True, slots=True)
class Lost:
    """The replica is gone. `node` losses are not held against the unit that was running."""

    replica: int
    kind: Literal["process", "memory", "node", "not ready"]
    message: str


Event = Prepared | Loaded | Broken | Delivered | LeaseEnded | Lost


# What the backend is asked


@dataclass(frozen=True, slots=True)
class Impossible:
    """A replica that no node of the cluster could ever hold."""

    reason: str


class Backend(Protocol):
    """Carries out decisions. Only `poll` may wait; after `stop` nothing more is reported of a replica."""

    def start(
        self, replica: int, model: str, *, share: float, roomy: bool
    ) -> "Literal['started', 'full'] | Impossible":
        """Begin a process for `model`, or say that there is no room now, or ever.

        Args:
            replica: the number by which it is known from now on.
            model: a key of the scheduler's models.
            share: this model's part of all work that is left, in (0, 1]: a hint for how many cores it deserves.
            roomy: a smaller slot has run out of memory.
        """
        ...

    def prepare(self, replica: int) -> None:
        """Tokenise, and find autoencoders; answered by Prepared or Broken."""
        ...

    def load(self, replica: int) -> None:
        """Load the weights; answered by Loaded or Broken."""
        ...

    def run(self, replica: int, lease: int, units: Sequence[Unit]) -> None:
        """Measure units in this order, after the leases before; answered by Delivered per unit and LeaseEnded."""
        ...

    def drain(self, replica: int) -> None:
        """End every lease after the unit in hand."""
        ...

    def stop(self, replica: int) -> None:
        """Let go of the process and of its resources."""
        ...

    def poll(self, timeout: float) -> Sequence[Event]:
        """What happened, waiting at most `timeout` seconds for the first event."""
        ...


# What the driver is told

Stage = Literal["plan", "prompt", "load", "unit", "replica"]
"""Where something failed: reading the prompts or cutting units, one prompt alone, loading, measuring, or the process
itself."""
NoteKind = Literal["start", "loaded", "lost", "stop", "done"]

Phase = Literal["waiting", "tokenising", "loading", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Tables to store: of a unit at its first delivery, or of a load (`unit` None)."""

    model: str
    unit: Unit | None
    tables: "Mapping[str, pa.Table]"


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something failed: a unit, a prompt, or the whole model (neither is named). Not `final`: it is tried again."""

    model: str
    stage: Stage
    failure: Failed
    final: bool
    attempt: int = 1

    @property
    def unit_id(self) -> str | None:
        return self.failure.unit_id


@dataclass(frozen=True, slots=True)
class Note:
    """What happened to a replica or a model, for the record and the progress display."""

    model: str
    what: NoteKind
    replica: int | None = None
    detail: str = ""


Outcome = Rows | Trouble | Note


@dataclass(frozen=True, slots=True)
class Status:
    """Where a model stands."""

    phase: Phase
    units: int | None
    """Units to measure in this session; None before the prompts are tokenised."""
    done: int
    failed: int
    ablations: int
    ablations_done: int
    replicas: int
    seconds_left: float | None
    """Estimate, once a unit has been timed."""

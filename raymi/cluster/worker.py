"""What one replica does, in whatever process it lives: tokenise, load one model, measure units. Never imports ray."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Done:
    """A unit that was measured."""

    unit_id: str
    tables: "dict[str, pa.Table]"
    """Its rows, by table of the store."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Why a unit (or, without `unit_id`, a model) could not be measured, in words that hold no secrets."""

    unit_id: str | None
    kind: str
    """The exception's class, or what happened to the process."""
    message: str
    traceback: str = ""
    oom: bool = False
    """The device had too little memory for even one row."""

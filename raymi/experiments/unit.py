"""The unit of work: what is leased, retried and committed together."""

from dataclasses import dataclass
from typing import TypeVar

from raymi.experiments.kind import Work

W = TypeVar("W", bound=Work)


@dataclass(frozen=True, slots=True)
class Unit:
    """A block of work of one experiment on one model.

    Units are cut by a pure integer rule, so the same job on the same commit gives the same units everywhere.
    """

    unit_id: str
    experiment: str
    """Name of the experiment within the job."""
    items: tuple[tuple[str, tuple[Work, ...]], ...]
    """(prompt id, what is measured of it), prompts of equal token length only; work of one kind only."""
    flops: int
    """Arithmetic by the causal cone (by full forwards where the job asks for those), for planning and progress."""
    tokens: str = ""
    """Hash of what its prompts were when it was planned (`prompts.fingerprint`); empty: not compared."""

    @property
    def n_ablations(self) -> int:
        """How much is measured: ablations, injections, and texts by each autoencoder that reads them."""
        return sum(len(work) for _, work in self.items)

    def of(self, kind: type[W]) -> list[tuple[str, tuple[W, ...]]]:
        """Its items, whose work is all of this class."""
        found = [(prompt_id, tuple(each for each in work if isinstance(each, kind))) for prompt_id, work in self.items]
        assert all(len(kept) == len(work) for (_, kept), (_, work) in zip(found, self.items, strict=True))
        return found

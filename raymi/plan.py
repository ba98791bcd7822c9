"""From a job and a catalog to units: which models, then per model which ablations are leased and committed together."""

from dataclasses import dataclass

from raymi.experiments.knockout.spec import Ablation


@dataclass(frozen=True, slots=True)
class Unit:
    """What is leased, retried and committed: a block of ablations of one experiment on one model.

    Units are cut by a pure integer rule, so the same job on the same commit gives the same units everywhere.
    """

    unit_id: str
    experiment: str
    """Name of the experiment within the job."""
    items: tuple[tuple[str, tuple[Ablation, ...]], ...]
    """(prompt id, its ablations), prompts of equal token length only."""
    flops: int
    """Estimate of the arithmetic of the unit by full forwards, for planning and progress."""

    @property
    def n_ablations(self) -> int:
        return sum(len(ablations) for _, ablations in self.items)

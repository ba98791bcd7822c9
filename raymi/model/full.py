"""The slow way: every ablation by a full forward, as a row of a batch. Nothing is reused, so it serves any model."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Intervention

Way = Literal["cone", "layers", "full"]
"""`cone` leaves out layers below and positions before, `layers` only the layers, `full` nothing."""


class Batch(NamedTuple):
    """Measured ablations, as logits of the last position, float32."""

    cells: Sequence[int]
    """Which of the requested ablations these are."""
    clean_PV: Tensor
    """The clean prompts that they belong to."""
    ablated_AV: Tensor
    prompt_A: Tensor
    """Row of `clean_PV` that each ablation belongs to."""
    fired_A: Tensor
    empty_A: Tensor
    closed_A: Tensor | None
    """Edges that the model's own mask had closed; None where that cannot be known."""
    clean_error: float
    """Largest logit difference of the batch's clean rows from the clean run; 0 where they are the same."""
    way: Way
    """How they were measured."""


class Full:
    """Ablations of some prompts of equal length; each batch carries the clean rows that it is compared with."""

    way: Way = "full"

    def __init__(self, model: HookedModel, ids_PT: Tensor) -> None:
        self.model, self.ids_PT = model, ids_PT

    def groups(self, cells: Sequence[Cell]) -> list[list[int]]:
        """What may share a batch: everything."""
        return [list(range(len(cells)))]

    def rows(self, cells: Sequence[Cell]) -> int:
        """Rows that a batch of these cells has."""
        return len(cells) + len({cell.prompt for cell in cells})

    def measure(self, cells: Sequence[Cell], indices: Sequence[int]) -> Iterator[Batch]:
        """One batch of the cells at `indices`."""
        of_batch = [cells[i] for i in indices]
        prompts = sorted({cell.prompt for cell in of_batch})
        place = {prompt: row for row, prompt in enumerate(prompts)}
        rows = [*prompts, *(cell.prompt for cell in of_batch)]
        nothing: list[Sequence[Intervention]] = [()] * len(prompts)
        out = self.model.forward(self.ids_PT[rows], [*nothing, *(cell.interventions for cell in of_batch)])
        prompt_A = torch.tensor([place[cell.prompt] for cell in of_batch], device=self.model.device)
        n = len(prompts)
        clean_PV, ablated_AV = out.logits_BV[:n], out.logits_BV[n:]
        closed_A = None if out.closed_B is None else out.closed_B[n:]
        fired_A, empty_A = out.fired_B[n:], out.empty_B[n:]
        yield Batch(indices, clean_PV, ablated_AV, prompt_A, fired_A, empty_A, closed_A, 0.0, self.way)

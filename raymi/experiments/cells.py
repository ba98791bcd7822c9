"""Kinds that are made of cells: each changes the model's forward of one prompt, and is one row.

What is the same for all of them is here: running through the engine, effect columns, and the second opinion, full
forwards by the family's own eager attention (in half precision, such forwards of the same weights in float32).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa
import torch
from torch import Tensor

from raymi.experiments.effects import Columns, measure
from raymi.experiments.kind import Company, Spec, Work
from raymi.experiments.setting import Drawn, Setting
from raymi.experiments.unit import Unit
from raymi.experiments.verifying import beside_full, beside_truth, is_beside_truth
from raymi.model.elsewhere import elsewhere
from raymi.model.engine import Engine
from raymi.model.full import Batch
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Edit, Intervention
from raymi.prompts import TokenizedPrompt

W = TypeVar("W", bound=Work)
Interventions = tuple[Intervention, ...]


def cell_id(kind: str, model_id: str, token_ids: Sequence[int], said: Sequence[object]) -> str:
    """16 hexadecimal digits that name a cell in every run, revision and dtype."""
    text = json.dumps([kind, model_id, list(token_ids), said], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Cells(Generic[W]):
    """What makes rows of a kind's cells."""

    kind: str
    work: type[W]
    schema: pa.Schema
    """Of its table; `raymi.experiments.columns.of_cells` makes one."""
    interventions: Callable[[W], Interventions]
    """What a cell does to the model."""
    columns: Callable[[W], Mapping[str, Any]]
    """What a row says of its cell, in the kind's own columns."""
    name: Callable[[str, Sequence[int], W, HookedModel], str] | None = None
    """The cell's id, from model id, token ids, cell and model; None: `cell_id` of all that the cell says."""

    def measure(self, setting: Setting, spec: Spec, unit: Unit) -> pa.Table:
        """Measures a unit of an experiment; see `of`."""
        return self.of(unit, setting)

    def of(self, unit: Unit, setting: Setting) -> pa.Table:
        """Measures every cell of a unit, whose prompts all have the same number of tokens.

        Returns:
            A table of `schema`, one row a cell, in the unit's order.

        Raises:
            NotFinite, NotFired, NoSuchPlace, OutOfMemory: from the model room.
        """
        ids_PT = torch.tensor([setting.prompts[prompt_id].token_ids for prompt_id, _ in unit.items])
        work = [(p, each) for p, (_, its) in enumerate(unit.of(self.work)) for each in its]
        cells = [Cell(p, self.interventions(each)) for p, each in work]
        prompts_A = [setting.prompts[unit.items[p][0]] for p, _ in work]

        def about(batch: Batch) -> Columns:
            rows = [(prompts_A[i], work[i][1]) for i in batch.cells]
            own = [self.columns(each) for _, each in rows]
            return {
                "unit_id": [unit.unit_id] * len(rows),
                "experiment": [unit.experiment] * len(rows),
                "model_id": [setting.model_id] * len(rows),
                "revision": [setting.revision] * len(rows),
                "dtype": [setting.dtype] * len(rows),
                "ablation_id": [self._named(setting, prompt, each) for prompt, each in rows],
                "prompt_id": [prompt.prompt.id for prompt, _ in rows],
                "n_tokens": [len(prompt.token_ids) for prompt, _ in rows],
                **{name: [each[name] for each in own] for name in own[0]},
            }

        return measure(setting.engine, ids_PT, cells, prompts_A, about, schema=self.schema, top_k=setting.top_k)

    def verify(self, setting: Setting, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
        """Measures cells both ways.

        Returns:
            Records of table `verifications`, in the order of `drawn`; differences and effects in logits.
        """
        engine, clean = setting.engine, dict[tuple[int, ...], Tensor]()
        records: list[dict[str, Any]] = []
        for _, prompt, work, company in drawn:
            assert isinstance(work, self.work)
            cell = Cell(0, self.interventions(work))
            batch, row = self._among(engine, prompt, work, company())
            ids_1T = torch.tensor([prompt.token_ids])
            edited = [one.layer for one in cell.interventions if isinstance(one, Edit)]
            # A wrong place would be no opinion that two forwards share.
            with elsewhere(engine.model, ids_1T, edited) if edited else nullcontext():
                if is_beside_truth(engine):
                    found = beside_truth(engine, ids_1T, cell, batch, row)
                else:
                    if prompt.token_ids not in clean:
                        clean[prompt.token_ids] = _by_own_attention(engine.model, ids_1T, ())
                    full_V = _by_own_attention(engine.model, ids_1T, cell.interventions)
                    found = beside_full(engine, batch.ablated_AV[row], full_V, clean[prompt.token_ids], batch.way)
            records.append(
                {
                    "ablation_id": self._named(setting, prompt, work),
                    "model_id": setting.model_id,
                    "revision": setting.revision,
                    "prompt_id": prompt.prompt.id,
                    **found,
                }
            )
        return records

    def _named(self, setting: Setting, prompt: TokenizedPrompt, work: W) -> str:
        model = setting.engine.model
        if self.name is not None:
            return self.name(setting.model_id, prompt.token_ids, work, model)
        return cell_id(self.kind, setting.model_id, prompt.token_ids, work.said(model.all_heads))

    def _among(self, engine: Engine, prompt: TokenizedPrompt, asked: W, company: Company) -> tuple[Batch, int]:
        """The batch of a cell that is measured as units are, among others, and its row there."""
        ids_PT = torch.tensor([each.token_ids for each, _ in company])
        work = [(p, each) for p, (_, its) in enumerate(company) for each in its if isinstance(each, self.work)]
        place = work.index((next(p for p, (each, _) in enumerate(company) if each is prompt), asked))
        for batch in engine.ablations(ids_PT, [Cell(p, self.interventions(each)) for p, each in work]):
            if place in batch.cells:
                return batch, list(batch.cells).index(place)
        raise AssertionError("an engine measures all that it is asked for")


def _by_own_attention(model: HookedModel, ids_1T: Tensor, interventions: Interventions) -> Tensor:
    """Logits of a full forward of one row, [V]."""
    return model.forward(ids_1T, [interventions], own_attention=True).logits_BV[0]

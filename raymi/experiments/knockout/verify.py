"""A second opinion on a few ablations: full forwards by the family's own eager attention, with an edited mask.

In half precision, such forwards of the same weights in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raymi.experiments.knockout.run import masks
from raymi.experiments.knockout.spec import Ablation, Company, ablation_id
from raymi.experiments.verifying import beside_full, beside_truth, is_beside_truth
from raymi.model.engine import Engine
from raymi.model.full import Batch
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask
from raymi.prompts import TokenizedPrompt

Drawn = Sequence[tuple[TokenizedPrompt, Ablation, Company]]
"""Prompt, ablation, and what it is measured among."""


def verify(engine: Engine, drawn: Drawn, *, model_id: str, revision: str) -> list[dict[str, Any]]:
    """Measure ablations both ways.

    Args:
        engine: the model, and the way it is measured.
        drawn: which ablations (`raymi.plan`).
        model_id: written into the records.
        revision: written into the records.

    Returns:
        Records of table `verifications`, in the order of `drawn`; differences and effects in logits.
    """
    clean: dict[tuple[int, ...], Tensor] = {}
    records: list[dict[str, Any]] = []
    for prompt, ablation, company in drawn:
        batch, row = _among(engine, prompt, ablation, company)
        if is_beside_truth(engine):
            cell = Cell(0, masks(ablation))
            found = beside_truth(engine, torch.tensor([prompt.token_ids]), cell, batch, row)
        else:
            if prompt.token_ids not in clean:
                clean[prompt.token_ids] = _by_own_attention(engine.model, prompt, ())
            full_V = _by_own_attention(engine.model, prompt, masks(ablation))
            found = beside_full(engine, batch.ablated_AV[row], full_V, clean[prompt.token_ids], batch.way)
        records.append(
            {
                "ablation_id": ablation_id(model_id, prompt.token_ids, ablation, engine.model.all_heads),
                "model_id": model_id,
                "revision": revision,
                "prompt_id": prompt.prompt.id,
                **found,
            }
        )
    return records


def _by_own_attention(model: HookedModel, prompt: TokenizedPrompt, cuts: tuple[Mask, ...]) -> Tensor:
    """Logits of a full forward of one row, [V]."""
    ids_1T = torch.tensor([prompt.token_ids])
    return model.forward(ids_1T, [cuts], own_attention=True).logits_BV[0]


def _among(engine: Engine, prompt: TokenizedPrompt, ablation: Ablation, company: Company) -> tuple[Batch, int]:
    """The batch of an ablation that is measured as units are, among others, and its row there."""
    ids_PT = torch.tensor([each.token_ids for each, _ in company])
    work = [(p, each) for p, (_, ablations) in enumerate(company) for each in ablations]
    asked = work.index((next(p for p, (each, _) in enumerate(company) if each is prompt), ablation))
    for batch in engine.ablations(ids_PT, [Cell(p, masks(each)) for p, each in work]):
        if asked in batch.cells:
            return batch, list(batch.cells).index(asked)
    raise AssertionError("an engine measures all that it is asked for")

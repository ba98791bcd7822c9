"""A second opinion on a few ablations: full forwards by the family's own eager attention, with an edited mask."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from raymi.experiments.knockout.run import masks
from raymi.experiments.knockout.spec import Ablation, ablation_id
from raymi.model.engine import Engine
from raymi.model.hooked import Cell
from raymi.prompts import TokenizedPrompt

Drawn = Sequence[tuple[TokenizedPrompt, Ablation]]


def verify(engine: Engine, drawn: Drawn, *, model_id: str, revision: str) -> list[dict[str, Any]]:
    """Measure ablations both ways.

    Args:
        engine: the model, and the way it is measured.
        drawn: which ablations (`plan.drawn`).
        model_id: written into the records.
        revision: written into the records.

    Returns:
        Records of table `verifications`, in the order of `drawn`; differences and effects in logits.
    """
    return [_verify(engine, prompt, ablation, model_id, revision) for prompt, ablation in drawn]


def _verify(
    engine: Engine, prompt: TokenizedPrompt, ablation: Ablation, model_id: str, revision: str
) -> dict[str, Any]:
    ids_1T = torch.tensor([prompt.token_ids])
    cell = Cell(0, masks(ablation))
    [batch] = engine.ablations(ids_1T, [cell])
    rows = ids_1T.expand(2, -1)
    full_2V = engine.model.forward(rows, [(), cell.interventions], own_attention=True).logits_BV
    difference = float((batch.ablated_AV[0] - full_2V[1]).abs().max())
    tolerance = engine.capability.tolerance
    return {
        "ablation_id": ablation_id(model_id, prompt.token_ids, ablation, engine.model.n_heads),
        "model_id": model_id,
        "revision": revision,
        "prompt_id": prompt.prompt.id,
        "engine": engine.way,
        "max_logit_diff": difference,
        "effect": float((full_2V[1] - full_2V[0]).abs().max()),
        "tolerance": tolerance,
        "passed": difference <= tolerance,
        "measured_at": datetime.now(UTC),
    }

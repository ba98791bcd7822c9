"""From a unit of knockouts to its rows, on one loaded model."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from raymi.experiments.cells import Cells
from raymi.experiments.effects import only
from raymi.experiments.knockout.spec import SCHEMA, Ablation, ablation_id
from raymi.experiments.setting import Setting, no_saes
from raymi.experiments.unit import Unit
from raymi.model.engine import Engine
from raymi.model.hooked import HookedModel
from raymi.model.interventions import Mask
from raymi.prompts import TokenizedPrompt


def masks(ablation: Ablation) -> tuple[Mask, ...]:
    """An ablation as interventions, one a layer."""
    return tuple(Mask(layer, ablation.heads, ablation.edges) for layer in ablation.layers)


def _columns(ablation: Ablation) -> Mapping[str, Any]:
    """What was cut, in full and, where there is just one of it, by itself."""
    queries, keys = [q for q, _ in ablation.edges], [k for _, k in ablation.edges]
    return {
        "layers": ablation.layers,
        "heads": ablation.heads,
        "queries": queries,
        "keys": keys,
        "layer": only(ablation.layers),
        "head": only(ablation.heads),
        "query": only(queries),
        "key": only(keys),
    }


def _name(model_id: str, token_ids: Sequence[int], ablation: Ablation, model: HookedModel) -> str:
    return ablation_id(model_id, token_ids, ablation, model.all_heads)


CELLS = Cells("knockout", Ablation, SCHEMA, masks, _columns, _name)
measure, verify = CELLS.measure, CELLS.verify


def run(
    engine: Engine,
    unit: Unit,
    prompts: Mapping[str, TokenizedPrompt],
    *,
    model_id: str,
    revision: str,
    dtype: str,
    top_k: int = 10,
) -> pa.Table:
    """Measure every ablation of a unit, for whoever has no more than a model.

    Args:
        engine: the model, and the way it is measured.
        unit: what to measure; its prompts all have the same number of tokens.
        prompts: prompt id -> prompt, at least those of the unit.
        model_id: written into the rows.
        revision: written into the rows.
        dtype: written into the rows.
        top_k: how many of the most changed tokens a row lists.

    Returns:
        A table of `spec.SCHEMA`, one row an ablation, in the unit's order.

    Raises:
        NotFinite, NotFired, OutOfMemory: from the model room.
    """
    return CELLS.of(unit, Setting(engine, prompts, no_saes, frozenset(), model_id, revision, dtype, top_k))

"""From a unit of knockouts to its rows, on one loaded model."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import torch

from raymi.experiments.effects import Columns, measure, only
from raymi.experiments.knockout.spec import SCHEMA, Ablation, ablation_id
from raymi.heads import Heads
from raymi.model.engine import Engine
from raymi.model.full import Batch
from raymi.model.hooked import Cell
from raymi.model.interventions import Mask
from raymi.plan import Unit
from raymi.prompts import TokenizedPrompt


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
    """Measure every ablation of a unit.

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
    ids_PT = torch.tensor([prompts[prompt_id].token_ids for prompt_id, _ in unit.items])
    work = [(p, ablation) for p, (_, ablations) in enumerate(unit.of(Ablation)) for ablation in ablations]
    cells = [Cell(p, masks(a)) for p, a in work]
    prompts_A = [prompts[unit.items[p][0]] for p, _ in work]

    def about(batch: Batch) -> Columns:
        rows = [(prompts_A[i], work[i][1]) for i in batch.cells]
        return {
            "unit_id": [unit.unit_id] * len(rows),
            "experiment": [unit.experiment] * len(rows),
            "model_id": [model_id] * len(rows),
            "revision": [revision] * len(rows),
            "dtype": [dtype] * len(rows),
            **_asked(rows, model_id, engine.model.all_heads),
        }

    return measure(engine, ids_PT, cells, prompts_A, about, schema=SCHEMA, top_k=top_k)


def masks(ablation: Ablation) -> tuple[Mask, ...]:
    """An ablation as interventions, one a layer."""
    return tuple(Mask(layer, ablation.heads, ablation.edges) for layer in ablation.layers)


def _asked(rows: Sequence[tuple[TokenizedPrompt, Ablation]], model_id: str, heads: Heads) -> Columns:
    """What was cut, in full and, where there is just one of it, by itself."""
    columns: Columns = {name: [] for name in _ASKED}
    for prompt, ablation in rows:
        queries, keys = [q for q, _ in ablation.edges], [k for _, k in ablation.edges]
        values = (
            ablation_id(model_id, prompt.token_ids, ablation, heads),
            prompt.prompt.id,
            len(prompt.token_ids),
            *(ablation.layers, ablation.heads, queries, keys),
            *(only(ablation.layers), only(ablation.heads), only(queries), only(keys)),
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


_ASKED = (
    *("ablation_id", "prompt_id", "n_tokens"),
    *("layers", "heads", "queries", "keys", "layer", "head", "query", "key"),
)

"""From a unit of knockouts to its rows, on one loaded model."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import torch

from raymi.experiments.effects import Columns, answers, effects
from raymi.experiments.knockout.spec import SCHEMA, Ablation, ablation_id
from raymi.model.engine import Engine
from raymi.model.hooked import Cell, NotFinite
from raymi.model.interventions import Mask
from raymi.model.metrics import Comparison
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
    tables: list[pa.Table] = []
    done: list[int] = []
    try:
        for batch in engine.ablations(ids_PT, cells):
            rows = [(prompts[unit.items[p][0]], ablation) for p, ablation in (work[i] for i in batch.cells)]
            compared = Comparison(batch.clean_PV, batch.ablated_AV, batch.prompt_A)
            columns = {
                "unit_id": [unit.unit_id] * len(rows),
                "experiment": [unit.experiment] * len(rows),
                "model_id": [model_id] * len(rows),
                "revision": [revision] * len(rows),
                "dtype": [dtype] * len(rows),
                **_asked(rows, model_id, engine.model.n_heads),
                **effects(compared, top_k),
                **answers(compared, [prompt for prompt, _ in rows]),
                "fired": batch.fired_A.tolist(),
                "empty_rows": batch.empty_A.tolist(),
                "engine": [batch.way] * len(rows),
                "clean_error": [batch.clean_error] * len(rows),
            }
            tables.append(pa.table(columns, schema=SCHEMA))
            done += batch.cells
    except NotFinite as error:
        raise NotFinite(f"{error} (prompts {', '.join(prompt_id for prompt_id, _ in unit.items)})") from error
    return pa.concat_tables(tables).take(sorted(range(len(done)), key=done.__getitem__))


def masks(ablation: Ablation) -> tuple[Mask, ...]:
    """An ablation as interventions, one a layer."""
    return tuple(Mask(layer, ablation.heads, ablation.edges) for layer in ablation.layers)


def _asked(rows: Sequence[tuple[TokenizedPrompt, Ablation]], model_id: str, n_heads: int) -> Columns:
    """What was cut, in full and, where there is just one of it, by itself."""

    def only(values: Sequence[int] | None) -> int | None:
        return values[0] if values is not None and len(set(values)) == 1 else None

    columns: Columns = {name: [] for name in _ASKED}
    for prompt, ablation in rows:
        queries, keys = [q for q, _ in ablation.edges], [k for _, k in ablation.edges]
        values = (
            ablation_id(model_id, prompt.token_ids, ablation, n_heads),
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

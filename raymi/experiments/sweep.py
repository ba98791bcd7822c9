"""Any interventions on one prompt, many ablations at a time: what a notebook asks for, and what a row of it says."""

from collections.abc import Iterable, Sequence
from typing import cast

import pyarrow as pa
import torch

from raymi.errors import UserError, quoted
from raymi.experiments.columns import EFFECTS, HOW
from raymi.experiments.effects import Columns, measure, only
from raymi.model.engine import Engine
from raymi.model.full import Batch
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Edit, Intervention, Mask
from raymi.model.meant import on_prompt
from raymi.model.sites import NoSuchPlace
from raymi.prompts import TokenizedPrompt

Ablations = Intervention | Iterable[Intervention | Iterable[Intervention]]
"""Each an intervention, or several that are applied together; or a single one of a single intervention."""

SCHEMA = pa.schema(
    [
        ("ablation", pa.int32()),
        ("model_id", pa.string()),
        ("revision", pa.string()),
        ("dtype", pa.string()),
        ("prompt_id", pa.string()),
        ("n_tokens", pa.int32()),
        # What was changed: parallel, one entry an intervention. A mask acts at the attention's scores.
        ("layers", pa.list_(pa.int16())),
        ("sites", pa.list_(pa.string())),
        # The same, where there is exactly one of it; the position of an edge is its query's.
        ("layer", pa.int16()),
        ("site", pa.string()),
        ("head", pa.int16()),
        ("position", pa.int32()),
        *EFFECTS,
        ("empty_rows", pa.int32()),
        *HOW,
    ]
)
"""One row an ablation, `ablation` being its place among those that were asked for."""


def cells(model: HookedModel, prompt: TokenizedPrompt, ablations: Ablations) -> list[Cell]:
    """Ablations of a prompt as something to measure, each of them found possible on the model.

    Raises:
        UserError: there is none, or one without interventions, or of something else.
        NoSuchPlace: an intervention names a site, layer, head or position that is not there, or its value does not fit
            there; says of which ablation.
        ValueError: an intervention names a position twice, or an edge that no causal model has, as the prompt shows.
    """
    given = [ablations] if isinstance(ablations, Mask | Edit) else ablations
    every = [together(one, f"ablation {index}") for index, one in enumerate(given)]
    if not every:
        raise UserError("there are no ablations to measure")
    found: list[Cell] = []
    for index, interventions in enumerate(every):
        try:
            found.append(Cell(0, on_prompt(model, interventions, len(prompt.token_ids))))
        except (NoSuchPlace, ValueError) as error:
            raise type(error)(f"ablation {index}: {error}") from None
    return found


def together(ablation: Intervention | Iterable[Intervention], name: str = "the ablation") -> tuple[Intervention, ...]:
    """The interventions of an ablation, which may be given as one alone.

    Raises:
        UserError: there are none, or something else is among them; calls the ablation by its name.
    """
    if isinstance(ablation, Mask | Edit):
        return (ablation,)
    given = cast(object, ablation)
    found = tuple(cast(Iterable[object], given)) if isinstance(given, Iterable) else (given,)
    for one in found:
        if not isinstance(one, Mask | Edit):
            raise UserError(
                f"{name}: found {quoted(one)}, which is no intervention",
                hint="`raymi.interventions` has what can be done: Mask, zero, mean, replace, add, scale.",
            )
    if not found:
        raise UserError(f"{name} has no interventions, and would be the clean prompt")
    return cast(tuple[Intervention, ...], found)


def run(
    engine: Engine,
    prompt: TokenizedPrompt,
    cells: Sequence[Cell],
    *,
    model_id: str,
    revision: str,
    dtype: str,
    top_k: int = 10,
) -> pa.Table:
    """Measures ablations of one prompt.

    Args:
        engine: the model, and the way it is measured.
        prompt: the prompt.
        cells: what to do to it.
        model_id: written into the rows.
        revision: written into the rows.
        dtype: written into the rows.
        top_k: how many of the most changed tokens a row lists.

    Returns:
        A table of `SCHEMA`, in the order of `cells`.

    Raises:
        NotFinite, NotFired, OutOfMemory: from the model room; NoSuchPlace where a value is not as wide as a head.
    """

    def about(batch: Batch) -> Columns:
        n_rows = len(batch.cells)
        return {
            "ablation": list(batch.cells),
            "model_id": [model_id] * n_rows,
            "revision": [revision] * n_rows,
            "dtype": [dtype] * n_rows,
            "prompt_id": [prompt.prompt.id] * n_rows,
            "n_tokens": [len(prompt.token_ids)] * n_rows,
            **_asked([cells[i].interventions for i in batch.cells]),
        }

    ids_1T, prompts_A = torch.tensor([prompt.token_ids]), [prompt] * len(cells)
    return measure(engine, ids_1T, cells, prompts_A, about, schema=SCHEMA, top_k=top_k)


def _asked(ablations: Sequence[tuple[Intervention, ...]]) -> Columns:
    """What was changed, in full and, where there is just one of it, by itself."""
    layers = [[one.layer for one in its] for its in ablations]
    sites = [[one.site for one in its] for its in ablations]
    return {
        "layers": layers,
        "sites": sites,
        "layer": [only(of) for of in layers],
        "site": [only(of) for of in sites],
        "head": [_head(its) for its in ablations],
        "position": [only(at for one in its for at in _positions(one)) for its in ablations],
    }


def _head(interventions: Sequence[Intervention]) -> int | None:
    of_each = [only(one.heads) for one in interventions]
    return None if None in of_each else only(of_each)


def _positions(one: Intervention) -> Iterable[int]:
    return one.positions if isinstance(one, Edit) else (query for query, _ in one.edges)

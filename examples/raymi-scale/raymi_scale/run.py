"""From cells to rows, where a model is loaded."""

from typing import Any

from raymi.experiments.cells import Cells
from raymi.experiments.effects import only
from raymi.interventions import Edit, scale
from raymi_scale.spec import SCHEMA, Scaling


def edits(cell: Scaling) -> tuple[Edit, ...]:
    return tuple(scale(layer, "attn.hook_z", cell.positions, cell.factor, cell.heads) for layer in cell.layers)


def columns(cell: Scaling) -> dict[str, Any]:
    one = {"layer": only(cell.layers), "head": only(cell.heads)}
    return {"layers": cell.layers, "heads": cell.heads, **one, "factor": cell.factor}


CELLS = Cells("scale", Scaling, SCHEMA, edits, columns)
measure, verify = CELLS.measure, CELLS.verify

"""What is measured. Plans are made of this, so it imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from raymi.catalog import CachedModel
from raymi.experiments.axes import Axis, Position, positions
from raymi.experiments.columns import of_cells
from raymi.experiments.kind import Kind, Table, Work
from raymi.experiments.of_heads import OfHeads, layers_and_heads, shape
from raymi.prompts import TokenizedPrompt


@dataclass(frozen=True, slots=True)
class Scaling(Work):
    """One row: what the heads of the layers give at the positions is multiplied with the factor."""

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    positions: tuple[int, ...]
    factor: float

    def starts_at(self) -> tuple[int, int]:
        return self.layers[0], self.positions[0]


class ScaleSpec(OfHeads):
    """What becomes of the answer when heads speak louder, or more quietly."""

    kind: Literal["scale"]
    factors: tuple[float, ...] = (0.5, 2.0)
    """What a head's output is multiplied with, each by itself."""
    positions: Axis[Position] = Axis[Position](each=("last",))

    @property
    def table(self) -> str:
        return "scalings"

    def work(self, prompt: TokenizedPrompt, model: CachedModel, saes: Sequence[object]) -> list[Scaling]:
        return [
            Scaling(layers, heads, at, factor)
            for at in sorted(positions(self.name, self.positions, prompt))
            for layers, heads in layers_and_heads(self, *shape(model))
            for factor in self.factors
        ]


_HEADS = [(name, pa.list_(pa.int16())) for name in ("layers", "heads")]
SCHEMA = of_cells(*_HEADS, ("layer", pa.int16()), ("head", pa.int16()), ("factor", pa.float64()))
KIND = Kind("scale", ScaleSpec, {"scalings": Table(SCHEMA)}, running="raymi_scale.run")

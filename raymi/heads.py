"""How many query heads the layers of a model have: in most models all as many, in some each its own number."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads of a model's layers."""

    usual: int
    """What the config says for the whole model."""
    by_layer: tuple[int, ...] | None = None
    """Of each layer; None where all have the usual number."""

    def of(self, layer: int) -> int:
        """Of one layer."""
        return self.usual if self.by_layer is None else self.by_layer[layer]

    def named(self, layers: Iterable[int], heads: Sequence[int] | None) -> Sequence[object] | None:
        """The same heads of these layers, however written, in the same words: what ids are made of.

        None is all heads, where every layer has the usual number; a list of them where all have another; and a list for
        each layer where they differ. An id is thus another than that of rows in which `all` meant the usual number of a
        layer that has more, or fewer.
        """
        numbers = [self.of(layer) for layer in sorted(set(layers))]
        chosen = None if heads is None else sorted(set(heads))
        if chosen is not None and any(len(chosen) != number for number in numbers):
            return chosen
        if all(number == self.usual for number in numbers):
            return None
        whole = [list(range(number)) for number in numbers]
        return whole[0] if all(each == whole[0] for each in whole) else whole

    def __str__(self) -> str:
        if self.by_layer is None:
            return str(self.usual)
        low, high = min(self.by_layer), max(self.by_layer)
        return str(low) if low == high else f"{low}-{high}"


def as_heads(heads: int | Heads) -> Heads:
    """As many in every layer, where only a number is given."""
    return Heads(heads) if isinstance(heads, int) else heads

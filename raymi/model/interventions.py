"""What can be done to a model while it runs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mask:
    """Attention edges of one layer are cut: their scores become -inf in the place of the causal mask.

    Acts at `blocks.{layer}.attn.hook_attn_scores`, after a softcap. A query left without any key attends to nothing:
    its head's output is zero.
    """

    layer: int
    heads: tuple[int, ...] | None
    """Query heads; None: all of them."""
    edges: tuple[tuple[int, int], ...]
    """(query position, key position), key <= query."""

    @property
    def first_query(self) -> int:
        """Nothing at a position before this one changes."""
        return min(query for query, _ in self.edges)


Intervention = Mask

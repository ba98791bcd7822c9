"""How many bytes a forward needs, from a model's shape alone. No torch: plans are made without it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how large a forward's tensors are."""

    n_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    itemsize: int
    """Bytes of one number of the dtype that is computed in."""


UNEMBEDDED = {"cpu": 1 << 23, "gpu": 1 << 24}
"""Logits made at a time; metrics are computed on them before the next ones are."""

METRIC_SLICE = {"cpu": 1 << 19, "gpu": 1 << 24}
"""Logits that metrics handle at a time: on a CPU, few enough to stay in its caches."""

POSITIONS_PER_BATCH = {"cpu": 4096, "mps": 8192, "cuda": 65536}
"""More positions at once make no matrix product faster, they only take memory."""


def row_bytes(shape: Shape, computed: int, attended: int) -> int:
    """Peak memory that one row of a batch adds to a forward: scores and pattern, MLP, residual stream, logits.

    Args:
        shape: of the model.
        computed: positions that are computed: the whole prompt, or the suffix from an ablation's first query on.
        attended: positions that are attended to: the whole prompt.
    """
    scores = 2 * 4 * shape.n_heads * computed * attended
    states = shape.itemsize * computed * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    return scores + states


def rows_per_batch(shape: Shape, computed: int, attended: int, device: str, available: int) -> int:
    """Rows of the first batch: within 60 % of the memory that is free, and no more than speed gains from."""
    fit = int(0.6 * available) // row_bytes(shape, computed, attended)
    return max(1, min(POSITIONS_PER_BATCH[device] // computed, fit))

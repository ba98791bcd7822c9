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


TOKENS_PER_BATCH = {"cpu": 4096, "mps": 8192, "cuda": 65536}
"""More tokens at once make no matrix product faster, they only take memory."""


def row_bytes(shape: Shape, n_tokens: int) -> int:
    """Peak memory that one row of a batch adds to a full forward: scores and pattern, MLP, residual stream, logits."""
    scores = 3 * 4 * shape.n_heads * n_tokens**2
    states = shape.itemsize * n_tokens * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    return scores + states + shape.vocab_size * (shape.itemsize + 4)


def rows_per_batch(shape: Shape, n_tokens: int, device: str, available: int) -> int:
    """Rows of the first batch: within 60 % of the memory that is free, and no more than speed gains from."""
    return max(1, min(TOKENS_PER_BATCH[device] // n_tokens, int(0.6 * available) // row_bytes(shape, n_tokens)))

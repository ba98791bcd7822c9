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
    n_layers: int
    key_width: int
    """Numbers of all key heads of a layer together; values are taken to be as many."""


UNEMBEDDED = {"cpu": 1 << 23, "gpu": 1 << 24}
"""Logits made at a time; metrics are computed on them before the next ones are."""

METRIC_SLICE = {"cpu": 1 << 19, "gpu": 1 << 24}
"""Logits that metrics handle at a time: on a CPU, few enough to stay in its caches."""

POSITIONS_PER_BATCH = {"cpu": 4096, "mps": 8192, "cuda": 65536}
"""More positions at once make no matrix product faster, they only take memory."""


KEPT_BYTES = 1 << 28
"""Clean runs beyond this are forgotten, the oldest first; the last one is always kept."""


def pays_together(shape: Shape, n_prompts: int, n_cells: int, n_tokens: int) -> bool:
    """Whether ablations of several prompts are faster in one sweep than prompt by prompt.

    A sweep reads every weight once, so few rows make too small a batch. But rows of one prompt share the attention over
    its prefix, where rows of several each need their own keys and values: a copy as large as the prompt is long.
    """
    read = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size + LAYER_CALL
    copied = 2 * n_tokens * shape.hidden_size
    return n_cells < ROWS_OF_ONE_PROMPT * n_prompts and n_cells * copied <= n_prompts * read


ROWS_OF_ONE_PROMPT = 64
"""From so many ablations a prompt on, a sweep of its own is never too small."""
LAYER_CALL = 1 << 19
"""Numbers that could be copied in the time that a layer of the smallest model takes to be called."""


def kept_bytes(shape: Shape, n_prompts: int, n_tokens: int) -> int:
    """Memory of the clean run of some prompts: layer inputs, keys and values, logits."""
    of_position = shape.n_layers * shape.itemsize * (shape.hidden_size + 2 * shape.key_width)
    return n_prompts * (n_tokens * of_position + 4 * shape.vocab_size)


def prompts_kept(shape: Shape, n_tokens: int, available: int) -> int:
    """Prompts whose clean runs take no more than 30 % of the memory that is free; at least one."""
    return max(1, int(0.3 * available) // kept_bytes(shape, 1, n_tokens))


def reference_bytes(shape: Shape, n_tokens: int) -> int:
    """Peak memory of one row by a family's own attention, with a mask that is as large as its scores: both, their sum
    and the pattern, in float32 at most.
    """
    return row_bytes(shape, n_tokens, n_tokens, sliced=False) + 2 * 4 * shape.n_heads * n_tokens**2


def row_bytes(shape: Shape, computed: int, attended: int, *, sliced: bool = True) -> int:
    """Peak memory that one row of a batch adds to a forward: scores and pattern, MLP, residual stream, logits.

    Args:
        shape: of the model.
        computed: positions that are computed: the whole prompt, or the suffix from an ablation's first query on.
        attended: positions that are attended to: the whole prompt.
        sliced: whether rows are unembedded a few at a time, as the cone does; else every row has its logits.
    """
    scores = 2 * 4 * shape.n_heads * computed * attended
    states = shape.itemsize * computed * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    return scores + states + (0 if sliced else (4 + shape.itemsize) * shape.vocab_size)


def rows_per_batch(
    shape: Shape, computed: int, attended: int, device: str, available: int, *, sliced: bool = True
) -> int:
    """Rows of the first batch: within 60 % of the memory that is free, and no more than speed gains from."""
    fit = int(0.6 * available) // row_bytes(shape, computed, attended, sliced=sliced)
    return max(1, min(POSITIONS_PER_BATCH[device] // computed, fit))

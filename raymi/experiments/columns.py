"""What a change did to the next-token distribution, and how that was measured: alike in every table that says it."""

import pyarrow as pa

EFFECTS: tuple[tuple[str, pa.DataType], ...] = (
    # What it did. Logits as the model gives them (after a final softcap where it has one), KL in nats.
    ("kl", pa.float64()),
    ("total_variation", pa.float64()),
    ("answer_id", pa.int32()),
    ("wrong_id", pa.int32()),
    ("answer_logit_clean", pa.float64()),
    ("answer_logit_ablated", pa.float64()),
    ("wrong_logit_clean", pa.float64()),
    ("wrong_logit_ablated", pa.float64()),
    ("logit_diff", pa.float64()),
    ("margin_diff", pa.float64()),
    ("answer_prob_clean", pa.float64()),
    ("answer_prob_ablated", pa.float64()),
    ("wrong_prob_clean", pa.float64()),
    ("wrong_prob_ablated", pa.float64()),
    ("answer_rank_clean", pa.int32()),
    ("answer_rank_ablated", pa.int32()),
    ("top1_clean", pa.int32()),
    ("top1_ablated", pa.int32()),
    (
        "changed",
        pa.list_(pa.struct([("token_id", pa.int32()), ("prob_clean", pa.float64()), ("prob_ablated", pa.float64())])),
    ),
)
"""Ranks count from 0; probabilities are of the last position."""

HOW: tuple[tuple[str, pa.DataType], ...] = (
    # Entries that were changed, and edges that were named, but that the model's own mask (a window, a chunk) had closed
    # before (null where that cannot be known, or was not asked); the way that was taken, and how far off its clean rows
    # came out, in logits.
    ("fired", pa.int32()),
    ("closed", pa.int32()),
    ("engine", pa.string()),
    ("clean_error", pa.float64()),
)

ABOUT: tuple[tuple[str, pa.DataType], ...] = (
    ("unit_id", pa.string()),
    ("ablation_id", pa.string()),
    ("experiment", pa.string()),
    ("model_id", pa.string()),
    ("revision", pa.string()),
    ("dtype", pa.string()),
    ("prompt_id", pa.string()),
    ("n_tokens", pa.int32()),
)
"""What a row is of."""


def of_cells(*own: tuple[str, pa.DataType]) -> pa.Schema:
    """The table of a kind that is made of cells: what a row is of, the kind's own columns, what was done and how."""
    return pa.schema([*ABOUT, *own, *EFFECTS, ("empty_rows", pa.int32()), *HOW])

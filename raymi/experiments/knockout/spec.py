"""Attention knockout: which edges of which heads in which layers are cut, and what a row of the result says."""

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Ablation:
    """One row to measure: at every one of `layers`, every one of `heads` loses every one of `edges`, all together."""

    layers: tuple[int, ...]
    """Ascending, non-negative."""
    heads: tuple[int, ...] | None
    """Query heads, ascending; None: all heads."""
    edges: tuple[tuple[int, int], ...]
    """(query position, key position), key <= query, ascending, non-negative."""


SCHEMA = pa.schema(
    [
        ("unit_id", pa.string()),
        ("ablation_id", pa.string()),
        ("experiment", pa.string()),
        ("model_id", pa.string()),
        ("revision", pa.string()),
        ("dtype", pa.string()),
        ("prompt_id", pa.string()),
        ("n_tokens", pa.int32()),
        # What was cut. A null list of heads means all of them; queries and keys are parallel, one pair an edge.
        ("layers", pa.list_(pa.int16())),
        ("heads", pa.list_(pa.int16())),
        ("queries", pa.list_(pa.int32())),
        ("keys", pa.list_(pa.int32())),
        # The same, where there is exactly one of it: what people group by.
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("query", pa.int32()),
        ("key", pa.int32()),
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
            pa.list_(
                pa.struct([("token_id", pa.int32()), ("prob_clean", pa.float64()), ("prob_ablated", pa.float64())])
            ),
        ),
        # How it was measured.
        ("empty_rows", pa.int32()),
        ("fired", pa.int32()),
        ("engine", pa.string()),
    ]
)
"""Table `ablations`: one row an ablation. Ranks count from 0; probabilities are of the last position."""

"""Rows as Polars frames, in the order that was asked for and with the texts of tokens in them."""

from collections.abc import Sequence
from typing import Any, cast

import polars as pl
import pyarrow as pa

from raymi.experiments.knockout.spec import Ablation
from raymi.tokenizer import token_texts


def in_order(frame: pl.DataFrame, asked: Sequence[Ablation]) -> pl.DataFrame:
    """The rows in the order of the ablations: an engine measures in an order of its own."""
    place = {(a.layers, a.heads, a.edges): index for index, a in enumerate(asked)}
    order = [
        place[tuple(layers), None if heads is None else tuple(heads), tuple(zip(queries, keys, strict=True))]
        for layers, heads, queries, keys in frame.select("layers", "heads", "queries", "keys").iter_rows()
    ]
    return frame[sorted(range(len(order)), key=order.__getitem__)]


def with_texts(table: pa.Table, tokenizer: Any, tokens: Sequence[str], positions: Sequence[str]) -> pl.DataFrame:
    """Rows as a frame, with the text beside every token id and every position in the columns `positions`."""
    frame = cast(pl.DataFrame, pl.from_arrow(table))
    ids = ("answer_id", "wrong_id", "top1_clean", "top1_ablated")
    changed = frame["changed"].explode().struct.field("token_id")
    texts = token_texts(tokenizer, pl.concat([changed, *(frame[name] for name in ids)]).drop_nulls().to_list())

    def text_of(column: pl.Expr) -> pl.Expr:
        return column.replace_strict(list(texts), list(texts.values()), return_dtype=pl.String)

    named = pl.element().struct.with_fields(token=text_of(pl.element().struct.field("token_id")))
    return frame.with_columns(
        *(text_of(pl.col(name)).alias(f"{name.removesuffix('_id')}_token") for name in ids),
        *(
            pl.col(name).replace_strict(range(len(tokens)), tokens, return_dtype=pl.String).alias(f"{name}_token")
            for name in positions
        ),
        pl.col("changed").list.eval(named),
    )

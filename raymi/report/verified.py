"""What was measured twice: what a model's rows rest on, and what did not agree and is no part of that.

A verification belongs to the load that it was part of, and the first good or failed load that ended after it is taken
for that one. A good load has nothing that differs, unless it went on by full forwards, which then were verified too.
"""

import polars as pl

from raymi.report.query import View, collect


def counted(view: View) -> pl.LazyFrame:
    """What was verified at the good loads of each model, those of all its replicas together, by what they then used.

    Returns:
        model_id, revision, verified, agreed, verified_error, verified_tolerance, verified_effect.
    """
    counts = _records(view).filter("counts").group_by("model_id", "revision")
    return counts.agg(
        pl.len().cast(pl.Int64).alias("verified"),
        pl.col("passed").sum().cast(pl.Int64).alias("agreed"),
        pl.col("max_logit_diff").max().alias("verified_error"),
        pl.col("tolerance").max().alias("verified_tolerance"),
        pl.col("effect").max().alias("verified_effect"),
    )


def mismatches(view: View) -> pl.DataFrame:
    """What did not agree: one row a model, a way of measuring and what came of it.

    Returns:
        model_id, revision, engine (cone, layers, full), then (`full`: it went on by full forwards; `failed`: it did not
        go on), attempts (loads of the model at which this happened), verified (what was measured twice by this engine
        then), differed (of those), max_logit_diff and tolerance (the largest difference, and what would have been
        noise, in logits).
    """
    by = ["model_id", "revision", "engine", "then"]

    def found() -> pl.LazyFrame:
        then = pl.when(pl.col("gave_way")).then(pl.lit("full")).otherwise(pl.lit("failed")).alias("then")
        others = _records(view).filter(~pl.col("counts")).with_columns(then).group_by(by)
        return others.agg(
            pl.col("ended_at").filter(~pl.col("passed")).n_unique().cast(pl.Int64).alias("attempts"),
            pl.len().cast(pl.Int64).alias("verified"),
            (~pl.col("passed")).sum().cast(pl.Int64).alias("differed"),
            pl.col("max_logit_diff").max(),
            pl.col("tolerance").max(),
        ).filter(pl.col("differed") > 0)

    return collect(found).sort(by)


def _records(view: View) -> pl.LazyFrame:
    """Table `verifications`, and of each record whether it counts, when its load ended, and whether that gave way."""
    good = view.scan("models").filter(pl.col("load_seconds").is_not_null())
    failed = view.scan("failures").filter(pl.col("stage") == "load")
    ends = pl.concat(
        [
            good.select("model_id", "revision", ended_at="loaded_at", loaded=pl.lit(True)),
            failed.select("model_id", "revision", ended_at="failed_at", loaded=pl.lit(False)),
        ]
    )
    records = view.scan("verifications").sort("measured_at")
    records = records.join_asof(
        ends.sort("ended_at"),
        left_on="measured_at",
        right_on="ended_at",
        by=["model_id", "revision"],
        strategy="forward",
        check_sortedness=False,  # both are, which it cannot tell where there are groups
    ).with_columns(pl.col("loaded").fill_null(False))
    load = ["model_id", "revision", "ended_at"]
    made_good = ((pl.col("engine") == "full") & pl.col("passed")).any().over(load)
    gave_way = pl.col("loaded") & (~pl.col("passed")).any().over(load) & made_good
    replaced = gave_way & (pl.col("engine") != "full")
    return records.with_columns(
        gave_way.alias("gave_way"),
        # Of replicas that load at once, one may fail and the other not: what differs is of the one that failed.
        (pl.col("loaded") & pl.col("passed") & ~replaced).alias("counts"),
    )

"""What a run's store holds and no mean counts: units that are not planned any more, prompts that the job has lost."""

from dataclasses import dataclass

import polars as pl

from raymi.report.query import View, collect
from raymi.store import schemas


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows that are stored, and why they do not count."""

    superseded: pl.DataFrame
    """model_id, revision, experiment, why, units, rows."""
    prompts: pl.DataFrame
    """prompt_id, rows: of prompts that the job as last issued has no longer."""
    mixed: list[str]
    """Experiments whose sums over texts may hold such prompts still: they cannot be taken out of a sum."""


def left_out(view: View) -> LeftOut:
    """What of a run is left out."""
    unit = ["model_id", "revision", "experiment", "unit_id"]

    def rows() -> pl.LazyFrame:
        return pl.concat([view.scan(table).select(unit) for table in schemas.UNIT_TABLES])

    def superseded() -> pl.LazyFrame:
        sizes = rows().group_by(unit).len("rows")
        found = view.superseded().join(sizes, on=unit, how="inner", nulls_equal=True)
        return found.group_by("model_id", "revision", "experiment", "why").agg(
            pl.len().cast(pl.Int64).alias("units"), pl.col("rows").sum().cast(pl.Int64)
        )

    def prompts() -> pl.LazyFrame:
        tables = [table for table in schemas.UNIT_TABLES if "prompt_id" in schemas.SCHEMAS[table].names]
        former = pl.col("prompt_id").is_in(list(view.former))
        found = pl.concat([view.scan(table).select("prompt_id").filter(former) for table in tables])
        return found.group_by("prompt_id").agg(pl.len().cast(pl.Int64).alias("rows"))

    experiments = view.run.jobs[-1].resolved.get("experiments", ()) if view.former else ()
    sums = [each["name"] for each in experiments if each.get("measure") == "quality" and not each.get("corpus")]
    return LeftOut(
        collect(superseded).sort("model_id", "revision", "experiment", "why"), collect(prompts).sort("prompt_id"), sums
    )

"""What a run's store holds and no mean counts: units that are not planned any more, prompts that the job has lost."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import polars as pl

from raymi.report.query import View, collect
from raymi.report.saes import SAE
from raymi.store import schemas


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows that are stored, and why they do not count."""

    superseded: pl.DataFrame
    """model_id, revision, experiment, why, units, rows."""
    prompts: pl.DataFrame
    """prompt_id, rows: of prompts that the job as last issued has no longer."""
    mixed: list[str]
    """Experiments whose sums over texts hold such prompts still: they cannot be taken out of a sum."""


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
        # What is superseded as well is named there, and counts with --all no more than without.
        found = pl.concat([view.planned(table).select("prompt_id").filter(former) for table in tables])
        return found.group_by("prompt_id").agg(pl.len().cast(pl.Int64).alias("rows"))

    return LeftOut(
        collect(superseded).sort("model_id", "revision", "experiment", "why"),
        collect(prompts).sort("prompt_id"),
        _mixed(view),
    )


def _mixed(view: View) -> list[str]:
    """Experiments with sums over more prompts than the job has for them: an older raymi went on with such sums."""
    job = view.run.jobs[-1].resolved if view.former else {}
    ids = [prompt["id"] for prompt in job.get("prompts", ())]
    chosen = {
        each["name"]: sum(any(fnmatchcase(one, pattern) for pattern in each["prompts"]) for one in ids)
        for each in job.get("experiments", ())
        if each.get("measure") == "quality" and not each.get("corpus")
    }

    def most() -> pl.LazyFrame:
        rows = view.units("sae_quality").unique(["unit_id", "sae", "sae_version", "site"])
        texts = rows.group_by(*SAE, "skipped", "definitions").agg(pl.col("texts").sum())
        return texts.group_by("experiment").agg(pl.col("texts").max())

    most_texts: dict[str, int] = dict(collect(most).iter_rows()) if chosen else {}
    return [name for name, n in chosen.items() if most_texts.get(name, 0) > n]

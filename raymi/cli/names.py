"""What models are called in a report: by their ids, and by what tells those apart that have one id."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

    from raymi.report.tables import Report


def named(report: "Report") -> "Report":
    """The same, each `model_id` with its revision or dtype where the run has several of that id."""
    import polars as pl

    every = report.models.select("model_id", "revision", "dtype").unique()
    ids = every.group_by("model_id").agg(
        pl.col("revision").n_unique().alias("revisions"), pl.col("dtype").drop_nulls().n_unique().alias("dtypes")
    )

    def name(frame: "pl.DataFrame") -> "pl.DataFrame":
        known = frame.join(ids, on="model_id", how="left", maintain_order="left")
        at = pl.lit("@") + pl.col("revision").str.slice(0, 7).fill_null("unknown")
        said = [pl.col("model_id"), pl.when(pl.col("revisions") > 1).then(at).otherwise(pl.lit(""))]
        if "dtype" in frame.columns:
            dtype = pl.lit(" ") + pl.col("dtype").fill_null("")
            said.append(pl.when(pl.col("dtypes") > 1).then(dtype).otherwise(pl.lit("")))
        return known.with_columns(pl.concat_str(said).alias("model_id")).select(frame.columns)

    saes = {field.name: name(getattr(report.saes, field.name)) for field in dataclasses.fields(report.saes)}
    return dataclasses.replace(
        report,
        models=name(report.models),
        answers=name(report.answers),
        layers=name(report.layers),
        heads=name(report.heads),
        failures=name(report.failures),
        mismatches=name(report.mismatches),
        saes=dataclasses.replace(report.saes, **saes),
        left_out=dataclasses.replace(report.left_out, superseded=name(report.left_out.superseded)),
    )

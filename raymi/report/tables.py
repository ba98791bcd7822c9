"""What a run found, as tables: per model, per layer, what failed; and what runs a store holds."""

from dataclasses import dataclass
from typing import Any

import polars as pl

from raymi.report import query
from raymi.report.left_out import LeftOut, left_out
from raymi.report.query import MODEL, View, closed, collect, despite_damage, placed
from raymi.report.saes import Saes, saes
from raymi.report.verified import counted, mismatches
from raymi.store import schemas
from raymi.store.manifest import Manifest
from raymi.store.reader import Store


@dataclass(frozen=True, slots=True)
class Report:
    """A run at one instant; it may be going on."""

    run: Manifest
    driven: bool
    """Whether some process is driving it now."""
    models: pl.DataFrame
    """One row a model and experiment: `per_model`."""
    answers: pl.DataFrame
    """One row a model and experiment that looked at next tokens: `per_answer`."""
    layers: pl.DataFrame
    """One row a model, experiment and group of layers: `per_layer`."""
    heads: pl.DataFrame
    """One row a model, experiment and single head of a single layer: `per_head`."""
    failures: pl.DataFrame
    """What failed and has not been mended since: `open_failures`."""
    mismatches: pl.DataFrame
    """What was measured twice and did not agree: `raymi.report.verified.mismatches`."""
    saes: Saes
    """What was measured with autoencoders."""
    left_out: LeftOut
    """What the store holds and no mean counts, and why."""
    measured: int
    """How much was measured in all, as plans count: `query.measured`."""
    lacking: list[str]
    """Why experiments are not shown: a line each kind that is not installed."""
    damaged: list[str]
    """Files that are left out, or some of their rows, why, and what to do: a line each."""


def report(store: Store, ref: str | None = None, *, everything: bool = False) -> Report:
    """The report of a run.

    Args:
        store: where it is.
        ref: its name or how its name begins; None: the run that was last issued.
        everything: count also prompts that the job has no longer.

    Raises:
        UserError: there is no such run.
    """
    run = store.find(ref)
    return despite_damage(store, run, _report, everything=everything)


def _report(view: View) -> Report:
    store, run = view.store, view.run
    failures = open_failures(view)
    return Report(
        run=run,
        driven=store.is_driven(run),
        models=per_model(view, failures),
        answers=collect(lambda: per_answer(view)).sort(*MODEL, "experiment"),
        layers=per_layer(view),
        heads=per_head(view),
        failures=failures,
        mismatches=mismatches(view),
        saes=saes(view),
        left_out=left_out(view),
        measured=query.measured(view),
        lacking=query.lacking(run),
        damaged=view.damage.said(store.objects),
    )


def runs(store: Store, notes: list[str] | None = None) -> pl.DataFrame:
    """One row a run, the one that was last issued at the end.

    Args:
        store: where they are.
        notes: what is said of damaged manifests and files, which are left out, is added.

    Returns:
        run, status (running, stopped, failed, partial, done), models, measured (as plans count: ablations, injections,
        texts by each autoencoder that reads them), failures (open ones), started, last_write.
    """
    found, damaged = store.survey()
    said = [str(error) for error in damaged.values()]
    records: list[dict[str, Any]] = []
    for run in found:
        try:
            record = _record(View(store, run))
        except (OSError, pl.exceptions.PolarsError):
            damage = store.damage(run.run, thoroughly=True)
            if not damage.unreadable:
                raise
            record = _record(View(store, run, damage=damage))
            said += damage.said(store.objects)
        records.append(record)
    if notes is not None:
        notes += said
    time = pl.Datetime("us", "UTC")
    kinds = {"run": pl.String(), "status": pl.String()} | dict.fromkeys(("models", "measured", "failures"), pl.Int64())
    return pl.DataFrame(records, schema={**kinds, "started": time, "last_write": time})


def _record(view: View) -> dict[str, Any]:
    store, run = view.store, view.run
    return {
        "run": run.run,
        "status": status(run, store.is_driven(run)),
        "models": len({(ref.partition("@")[0], revision) for ref, revision in run.commits.items()}),
        "measured": query.measured(View(store, run, everything=True, damage=view.damage)),
        "failures": open_failures(view).height,
        "started": run.created_at,
        "last_write": store.last_write(run.run),
    }


def status(run: Manifest, driven: bool) -> str:
    """`running`, `failed` or `done`; `stopped` for what was interrupted or killed and waits to be continued; `partial`
    where the last command took a few prompts, and has done them.
    """
    if run.status in ("done", "failed"):
        return "partial" if run.status == "done" and run.taken is not None else run.status
    return "running" if driven else "stopped"


def per_model(view: View, failures: pl.DataFrame) -> pl.DataFrame:
    """One row a model (id, revision, dtype) and knockout experiment; where there was none, one with a null experiment.

    Returns:
        model_id, experiment, revision, dtype, device, ablations, mean_kl and max_kl (nats), mean_logit_diff (clean -
        ablated), the cell of the largest mean KL over prompts and edges (strongest_layers, strongest_heads,
        strongest_kl), closed (cells that cut nothing, as the model's own mask had closed them: they count as ablations
        and in nothing else); prompts, answer_prob and answer_top1 as in `per_answer`, null where there is none (without
        an experiment, those of the only one with autoencoders that looked at next tokens); and of
        the model, over all its experiments, also those with autoencoders: testbeds (that measured its rows; those
        of older versions, which do not say, count as one), engine (how it was measured: cone, layers, full),
        verified (what was measured twice when it was loaded, by the way it then went; what differed and was not gone on
        with is in `mismatches`), agreed (of those), verified_error, verified_tolerance and verified_effect (the largest
        difference, what would have been noise, and the largest effect, in logits), why_not_cone (found when the model
        was loaded; empty where it is measured by the cone), fallbacks (how often something took full forwards all
        the same) and fallback (the first time, and why), load_seconds, failures, unused (tensors that its config has no
        place for, and that it was measured without; null in rows of older versions).
    """
    by = [*MODEL, "experiment"]

    def measured() -> pl.LazyFrame:
        every = _ablations(view)
        counts = every.group_by(by).agg(
            pl.len().cast(pl.Int64).alias("ablations"), pl.col("shut").sum().cast(pl.Int64).alias("closed")
        )
        rows = every.filter(~pl.col("shut"))
        effects = rows.group_by(by).agg(
            pl.col("kl").mean().alias("mean_kl"),
            pl.col("kl").max().alias("max_kl"),
            pl.col("logit_diff").mean().alias("mean_logit_diff"),
        )
        cells = rows.group_by(*by, "layers", "heads", "first_layer").agg(pl.col("kl").mean())
        strongest = cells.sort(*by, "kl", "first_layer", "heads", descending=[False] * 4 + [True, False, False])
        strongest = strongest.group_by(by).agg(
            pl.col("layers").first().alias("strongest_layers"),
            pl.col("heads").first().alias("strongest_heads"),
            pl.col("kl").first().alias("strongest_kl"),
        )
        found = counts.join(effects, on=by, how="left", nulls_equal=True)
        found = found.join(strongest, on=by, how="left", nulls_equal=True)
        return found.join(per_answer(view), on=by, how="left", nulls_equal=True)

    def how() -> pl.LazyFrame:
        tables = {table: view.units(table) for table in schemas.UNIT_TABLES}
        # What is read off one clean forward is that by whatever engine.
        has = {table for table in tables if "engine" in schemas.SCHEMAS[table].names}
        engine = {table: pl.col("engine") if table in has else pl.lit(None, pl.String) for table in tables}
        rows = pl.concat(
            [rows.select(*MODEL, "testbed", engine=engine[table]).unique() for table, rows in tables.items()]
        )
        engines = pl.col("engine").drop_nulls().unique().sort().str.join(", ")
        return rows.group_by(MODEL).agg(
            pl.col("testbed").n_unique().cast(pl.Int64).alias("testbeds"),
            pl.when(pl.col("engine").count() > 0).then(engines).alias("engine"),
        )

    def loads() -> pl.LazyFrame:
        ready = view.scan("models").filter(pl.col("load_seconds").is_not_null())
        why = pl.col("capability").str.json_path_match("$.why").alias("why_not_cone")
        unused = pl.col("unused").list.len().cast(pl.Int64)
        of_load = ready.sort("loaded_at").select("model_id", "revision", "device", "load_seconds", why, unused)
        return of_load.group_by("model_id", "revision").agg(pl.all().last())

    def fell_back() -> pl.LazyFrame:
        return view.scan("events").filter(pl.col("kind") == "full").sort("happened_at")

    found, rows, revisions = collect(measured), collect(how), query.revisions(view)
    fallen = placed(collect(fell_back), revisions)
    fallbacks = fallen.group_by("model_id", "revision", maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("fallbacks"), pl.col("message").first().alias("fallback")
    )
    failed = failures.drop_nulls("model_id").group_by("model_id", "revision")
    failed = failed.agg(pl.len().cast(pl.Int64).alias("failures"))
    one = ["model_id", "revision"]
    everyone = pl.concat([revisions, *(each.select(one) for each in (rows, fallbacks, failed))]).unique()
    everyone = everyone.join(rows, on=one, how="left", nulls_equal=True)
    for each in (collect(loads), collect(lambda: counted(view)), fallbacks, failed):
        everyone = everyone.join(each, on=one, how="left", nulls_equal=True)
    table = _answers_of_one(
        everyone.join(found, on=by[:-1], how="left", nulls_equal=True), collect(lambda: per_answer(view))
    )
    table = table.with_columns(pl.col("ablations", "closed", "failures", "fallbacks").fill_null(0))
    of_model = ["testbeds", "engine"]
    of_verified = ["verified", "agreed", "verified_error", "verified_tolerance", "verified_effect"]
    of_replicas = [*of_verified, "why_not_cone", "fallbacks", "fallback", "load_seconds", "failures", "unused"]
    order = ["model_id", "experiment", "revision", "dtype", "device", *found.columns[4:], *of_model, *of_replicas]
    return table.select(order).sort("model_id", "revision", "dtype", "experiment")


def _answers_of_one(table: pl.DataFrame, answers: pl.DataFrame) -> pl.DataFrame:
    """Gives models without a knockout the answers of their experiment, where just one looked at them."""
    said = ["prompts", "answer_prob", "answer_top1"]
    only = answers.filter(pl.len().over(MODEL) == 1).select(*MODEL, *said)
    found = table.join(only, on=MODEL, how="left", nulls_equal=True, suffix="_only", maintain_order="left")
    free = pl.col("experiment").is_null()
    return found.with_columns(pl.when(free).then(f"{name}_only").otherwise(name).alias(name) for name in said).drop(
        f"{name}_only" for name in said
    )


def per_answer(view: View) -> pl.LazyFrame:
    """How well models answer when nothing is changed, by the prompts of each experiment.

    Returns:
        model_id, revision, dtype, experiment, prompts (of which the next token was looked at), answer_prob (mean over
        prompts of the clean P(answer)), answer_top1 (share of the prompts where the answer comes first).
    """
    by = [*MODEL, "experiment"]
    of_prompts = [*by, "prompt_id", "answer_prob_clean", "answer_rank_clean"]
    tables = [table for table in schemas.UNIT_TABLES if set(of_prompts) <= set(schemas.SCHEMAS[table].names)]
    rows = pl.concat([view.units(table).select(of_prompts) for table in tables])
    clean = rows.group_by(*by, "prompt_id").agg(pl.all().drop_nulls().first())
    return clean.group_by(by).agg(
        pl.len().cast(pl.Int64).alias("prompts"),
        pl.col("answer_prob_clean").mean().alias("answer_prob"),
        (pl.col("answer_rank_clean") == 0).mean().alias("answer_top1"),
    )


def per_layer(view: View) -> pl.DataFrame:
    """One row a model, experiment and group of layers that were ablated together.

    Returns:
        model_id, revision, dtype, experiment, layers (`3`, `3-7`, `1,5`), first_layer, last_layer, ablations, mean_kl,
        max_kl, mean_logit_diff; ascending. Without what cut nothing.
    """
    by = [*MODEL, "experiment", "layers", "first_layer", "last_layer"]
    table = collect(
        lambda: (
            _ablations(view)
            .filter(~pl.col("shut"))
            .group_by(by)
            .agg(
                pl.len().cast(pl.Int64).alias("ablations"),
                pl.col("kl").mean().alias("mean_kl"),
                pl.col("kl").max().alias("max_kl"),
                pl.col("logit_diff").mean().alias("mean_logit_diff"),
            )
        )
    )
    return table.sort(*MODEL, "experiment", "first_layer", "last_layer", "layers")


def per_head(view: View) -> pl.DataFrame:
    """One row a model, experiment and head, of ablations of one head in one layer.

    Returns:
        model_id, revision, dtype, experiment, layer, head, ablations, mean_kl, max_kl, mean_logit_diff; ascending.
        Without what cut nothing.
    """
    by = [*MODEL, "experiment", "layer", "head"]

    def found() -> pl.LazyFrame:
        rows = _ablations(view).filter(~pl.col("shut"))
        rows = rows.drop_nulls(["layer", "head"]).group_by(by)
        return rows.agg(
            pl.len().cast(pl.Int64).alias("ablations"),
            pl.col("kl").mean().alias("mean_kl"),
            pl.col("kl").max().alias("max_kl"),
            pl.col("logit_diff").mean().alias("mean_logit_diff"),
        )

    return collect(found).sort(by)


def open_failures(view: View) -> pl.DataFrame:
    """The last failure of each unit that has no rows, of each model that was not loaded since, and of each prompt that
    a model can never measure and the job still has.

    Returns:
        model_id, revision, unit_id, stage, kind, message, attempts, failed_at; the oldest first.
    """
    by = ["model_id", "revision", "unit_id", "stage", "prompt_id"]
    failed = placed(collect(lambda: view.scan("failures").sort("failed_at")), query.revisions(view))
    last = failed.group_by(by, maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("attempts"), pl.col("kind", "message", "failed_at").last()
    )

    def loads() -> pl.LazyFrame:
        return view.scan("models").group_by("model_id", "revision").agg(pl.col("loaded_at").max())

    last = last.filter(pl.col("kind").is_not_null())  # else it was taken back
    of_units = last.filter(pl.col("unit_id").is_not_null()).join(
        collect(lambda: query.units(view)), on="unit_id", how="anti"
    )
    of_prompts = last.filter(pl.col("prompt_id").is_not_null() & ~pl.col("prompt_id").is_in(list(view.former)))
    of_models = last.filter(pl.col("unit_id").is_null() & pl.col("prompt_id").is_null()).join(
        collect(loads), on=["model_id", "revision"], how="left", nulls_equal=True
    )
    mended = (pl.col("loaded_at") > pl.col("failed_at")).fill_null(False)
    # A run that is done has all its rows, whatever died on the way and was made good by others.
    of_models = of_models.filter(~mended & (status(view.run, driven=False) != "done")).drop("loaded_at")
    found = pl.concat([of_units, of_prompts, of_models]).sort("failed_at")
    return found.select("model_id", "revision", "unit_id", "stage", "kind", "message", "attempts", "failed_at")


def _ablations(view: View) -> pl.LazyFrame:
    """The rows that count of cells of heads, of whatever kinds, each once: with layers and heads as text to group by,
    and whether they cut nothing (`shut`).
    """
    columns = [*MODEL, "experiment", "layers", "heads", "layer", "head", "kl", "logit_diff"]
    return pl.concat(
        [
            view.units(table)
            .unique(["unit_id", "ablation_id"])
            .select(*columns, shut=closed(table))
            .with_columns(
                pl.col("layers").list.min().alias("first_layer"),
                pl.col("layers").list.max().alias("last_layer"),
                _label("layers").alias("layers"),
                _label("heads").fill_null("all").alias("heads"),
            )
            for table in query.cells_of_heads()
        ]
    )


def _label(column: str) -> pl.Expr:
    """A list of indices as text: `3`, `3-7`, or `1,5` where there are gaps."""
    indices = pl.col(column)
    low, high, n = indices.list.min(), indices.list.max(), indices.list.len()
    return (
        pl.when(n == 1)
        .then(low.cast(pl.String))
        .when(high - low + 1 == n)
        .then(pl.format("{}-{}", low, high))
        .otherwise(indices.cast(pl.List(pl.String)).list.join(","))
    )

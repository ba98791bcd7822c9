"""What a run found, as tables: per model, per layer, what failed; and what runs a store holds."""

from dataclasses import dataclass

import polars as pl

from raymi.report import query
from raymi.report.query import collect
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
    layers: pl.DataFrame
    """One row a model, experiment and group of layers: `per_layer`."""
    failures: pl.DataFrame
    """What failed and has not been mended since: `open_failures`."""
    mismatches: pl.DataFrame
    """What was measured twice and did not agree: `raymi.report.verified.mismatches`."""
    saes: Saes
    """What was measured with autoencoders."""
    measured: int
    """How much was measured in all, as plans count: `query.measured`."""


def report(store: Store, ref: str | None = None) -> Report:
    """The report of a run.

    Args:
        store: where it is.
        ref: its name or how its name begins; None: the run that was last issued.

    Raises:
        UserError: there is no such run.
    """
    run = store.find(ref)
    failures = open_failures(store, run)
    return Report(
        run=run,
        driven=store.is_driven(run),
        models=per_model(store, run, failures),
        layers=per_layer(store, run),
        failures=failures,
        mismatches=mismatches(store, run),
        saes=saes(store, run),
        measured=query.measured(store, run),
    )


def runs(store: Store) -> pl.DataFrame:
    """One row a run, the one that was last issued at the end.

    Returns:
        run, status (running, stopped, failed, done), models, measured (as plans count: ablations, injections, texts by
        each autoencoder that reads them), failures (open ones), started, last_write.
    """
    records = [
        {
            "run": run.run,
            "status": status(run, store.is_driven(run)),
            "models": len(run.commits),
            "measured": query.measured(store, run),
            "failures": open_failures(store, run).height,
            "started": run.created_at,
            "last_write": store.last_write(run.run),
        }
        for run in store.runs()
    ]
    time = pl.Datetime("us", "UTC")
    kinds = {"run": pl.String(), "status": pl.String()} | dict.fromkeys(("models", "measured", "failures"), pl.Int64())
    return pl.DataFrame(records, schema={**kinds, "started": time, "last_write": time})


def status(run: Manifest, driven: bool) -> str:
    """`running`, `failed` or `done`; `stopped` for what was interrupted or killed and waits to be continued."""
    if run.status in ("done", "failed"):
        return run.status
    return "running" if driven else "stopped"


def per_model(store: Store, run: Manifest, failures: pl.DataFrame) -> pl.DataFrame:
    """One row a model and knockout experiment; models on which there was none have one row with a null experiment.

    Returns:
        model_id, experiment, revision, dtype, device, ablations, mean_kl and max_kl (nats), mean_logit_diff (clean -
        ablated), the cell of the largest mean KL over prompts and edges (strongest_layers, strongest_heads,
        strongest_kl); and of the model, over all its experiments, also those with autoencoders: prompts (of which the
        next token was looked at), answer_prob (mean over prompts of the clean P(answer)), answer_top1 (share of the
        prompts where the answer comes first), engine (how it was measured: cone, layers, full), verified (what was
        measured twice when it was loaded, by the way it then went; what differed and was not gone on with is in
        `mismatches`), agreed (of those), verified_error, verified_tolerance and verified_effect (the largest
        difference, what would have been noise, and the largest effect, in logits), why_not_cone (found when the model
        was loaded; empty where it is measured by the cone), fallbacks (how often something took full forwards all
        the same) and fallback (the first time, and why), load_seconds, failures.
    """
    by = ["model_id", "experiment"]

    def measured() -> pl.LazyFrame:
        rows = _ablations(store, run)
        effects = rows.group_by(by).agg(
            pl.len().cast(pl.Int64).alias("ablations"),
            pl.col("kl").mean().alias("mean_kl"),
            pl.col("kl").max().alias("max_kl"),
            pl.col("logit_diff").mean().alias("mean_logit_diff"),
        )
        cells = rows.group_by(*by, "layers", "heads", "first_layer").agg(pl.col("kl").mean())
        strongest = cells.sort(*by, "kl", "first_layer", "heads", descending=[False, False, True, False, False])
        strongest = strongest.group_by(by).agg(
            pl.col("layers").first().alias("strongest_layers"),
            pl.col("heads").first().alias("strongest_heads"),
            pl.col("kl").first().alias("strongest_kl"),
        )
        return effects.join(strongest, on=by, how="left")

    def baseline() -> pl.LazyFrame:
        of_prompts = ["model_id", "prompt_id", "answer_prob_clean", "answer_rank_clean"]
        rows = [
            store.scan(table, run.run).select(of_prompts) for table in ("ablations", "sae_injections", "sae_ablations")
        ]
        clean = pl.concat(rows).group_by("model_id", "prompt_id").agg(pl.all().drop_nulls().first())
        return clean.group_by("model_id").agg(
            pl.len().cast(pl.Int64).alias("prompts"),
            pl.col("answer_prob_clean").mean().alias("answer_prob"),
            (pl.col("answer_rank_clean") == 0).mean().alias("answer_top1"),
        )

    def how() -> pl.LazyFrame:
        of_rows = ["model_id", "revision", "dtype"]
        tables = {table: store.scan(table, run.run) for table in schemas.UNIT_TABLES}
        # Which features are active is read off one clean forward, by whatever engine.
        engine = {table: pl.lit(None, pl.String) if table == "sae_features" else pl.col("engine") for table in tables}
        rows = pl.concat([rows.select(*of_rows, engine=engine[table]).unique() for table, rows in tables.items()])
        engines = pl.col("engine").drop_nulls().unique().sort().str.join(", ")
        return rows.group_by("model_id").agg(
            pl.col("revision", "dtype").last(), pl.when(pl.col("engine").count() > 0).then(engines).alias("engine")
        )

    def loads() -> pl.LazyFrame:
        ready = store.scan("models", run.run).filter(pl.col("load_seconds").is_not_null())
        why = pl.col("capability").str.json_path_match("$.why").alias("why_not_cone")
        of_load = ready.sort("loaded_at").select("model_id", "device", "load_seconds", why)
        return of_load.group_by("model_id").agg(pl.all().last())

    def fell_back() -> pl.LazyFrame:
        events = store.scan("events", run.run).filter(pl.col("kind") == "full").sort("happened_at")
        return events.group_by("model_id").agg(
            pl.len().cast(pl.Int64).alias("fallbacks"), pl.col("message").first().alias("fallback")
        )

    found = collect(measured)
    rows = collect(how)
    known = [*run.commits, *rows["model_id"], *failures["model_id"].drop_nulls()]
    failed = failures.group_by("model_id").agg(pl.len().cast(pl.Int64).alias("failures"))
    everyone = pl.DataFrame({"model_id": list(dict.fromkeys(known))}, schema={"model_id": pl.String()})
    for each in (
        rows,
        collect(baseline),
        collect(loads),
        collect(lambda: counted(store, run)),
        collect(fell_back),
        failed,
    ):
        everyone = everyone.join(each, on="model_id", how="left")
    counts = pl.col("ablations", "failures", "fallbacks").fill_null(0)
    table = everyone.join(found, on="model_id", how="left").with_columns(counts)
    of_model = ["prompts", "answer_prob", "answer_top1", "engine"]
    of_verified = ["verified", "agreed", "verified_error", "verified_tolerance", "verified_effect"]
    of_replicas = [*of_verified, "why_not_cone", "fallbacks", "fallback", "load_seconds", "failures"]
    order = ["model_id", "experiment", "revision", "dtype", "device", *found.columns[2:], *of_model, *of_replicas]
    return table.select(order).sort("model_id", "experiment")


def per_layer(store: Store, run: Manifest) -> pl.DataFrame:
    """One row a model, experiment and group of layers that were ablated together.

    Returns:
        model_id, experiment, layers (`3`, `3-7`, `1,5`), first_layer, last_layer, ablations, mean_kl, max_kl,
        mean_logit_diff; ascending.
    """
    by = ["model_id", "experiment", "layers", "first_layer", "last_layer"]
    table = collect(
        lambda: (
            _ablations(store, run)
            .group_by(by)
            .agg(
                pl.len().cast(pl.Int64).alias("ablations"),
                pl.col("kl").mean().alias("mean_kl"),
                pl.col("kl").max().alias("max_kl"),
                pl.col("logit_diff").mean().alias("mean_logit_diff"),
            )
        )
    )
    return table.sort("model_id", "experiment", "first_layer", "last_layer", "layers")


def open_failures(store: Store, run: Manifest) -> pl.DataFrame:
    """The last failure of each unit that has no rows, of each model that was not loaded since, and of each prompt that
    a model can never measure and the job still has.

    Returns:
        model_id, unit_id, stage, kind, message, attempts, failed_at; the oldest first.
    """
    by = ["model_id", "unit_id", "stage", "prompt_id"]
    gone = _prompts_no_longer(run)

    def unmended() -> pl.LazyFrame:
        last = (
            store.scan("failures", run.run)
            .sort("failed_at")
            .group_by(by, maintain_order=True)
            .agg(pl.len().cast(pl.Int64).alias("attempts"), pl.col("kind", "message", "failed_at").last())
        )
        units = query.units(store, run)
        loads = store.scan("models", run.run).group_by("model_id").agg(pl.col("loaded_at").max())
        of_units = last.filter(pl.col("unit_id").is_not_null()).join(units, on="unit_id", how="anti")
        of_prompts = last.filter(pl.col("prompt_id").is_not_null() & ~pl.col("prompt_id").is_in(gone))
        of_models = last.filter(pl.col("unit_id").is_null() & pl.col("prompt_id").is_null()).join(
            loads, on="model_id", how="left"
        )
        mended = (pl.col("loaded_at") > pl.col("failed_at")).fill_null(False)
        # A run that is done has all its rows, whatever died on the way and was made good by others.
        of_models = of_models.filter(~mended & (run.status != "done")).drop("loaded_at")
        return pl.concat([of_units, of_prompts, of_models]).sort("failed_at")

    return collect(unmended).select("model_id", "unit_id", "stage", "kind", "message", "attempts", "failed_at")


def _prompts_no_longer(run: Manifest) -> list[str]:
    """Ids of the prompts that a run once had and its job has no longer; chunks of corpora stay."""
    of_each = [{prompt["id"] for prompt in issue.resolved.get("prompts", ())} for issue in run.jobs]
    return sorted(set[str]().union(*of_each) - of_each[-1]) if of_each else []


def _ablations(store: Store, run: Manifest) -> pl.LazyFrame:
    """The rows of a run, each once, with layers and heads as text to group by."""
    rows = store.scan("ablations", run.run).unique(["unit_id", "ablation_id"])
    return rows.with_columns(
        pl.col("layers").list.min().alias("first_layer"),
        pl.col("layers").list.max().alias("last_layer"),
        _label("layers").alias("layers"),
        _label("heads").fill_null("all").alias("heads"),
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

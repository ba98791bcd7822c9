"""What a run found with autoencoders, as tables: how good they are, where features are active and what they do."""

import json
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import polars as pl

from raymi.report.characters import Piece, pieces
from raymi.report.query import View, collect
from raymi.sae.metrics import density_histogram, merged, metrics

SAE = ("model_id", "revision", "dtype", "experiment", "sae", "sae_version", "site")
"""What tells an autoencoder of a run from all others; every table here begins with these columns."""
_SAE_KINDS = dict.fromkeys(SAE, pl.String())

METRICS = (
    *("l0", "l1", "mse", "mse_per_element", "explained_variance", "fvu", "cossim", "l2_norm_in", "l2_norm_out"),
    *("l2_ratio", "relative_reconstruction_bias", "dead_features", "frac_alive"),
    *("ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation", "ce_loss_score"),
    *("kl_div_with_sae", "kl_div_with_ablation", "kl_div_score"),
)
"""By SAELens's keys; `raymi.sae.metrics` says what they mean."""
_PAIRS = 2_000_000
"""Active features of tokens that are looked at together, which takes about half a gigabyte."""
_MOVED = 5
"""Tokens that are named of those that an injection moves most."""
_BEFORE, _AFTER = 12, 6
"""Tokens of context around one that activates a feature."""


@dataclass(frozen=True, slots=True)
class Saes:
    """All tables of a run; those of what it did not measure are empty."""

    quality: pl.DataFrame
    densities: pl.DataFrame
    injections: pl.DataFrame
    ablations: pl.DataFrame
    activity: pl.DataFrame
    features: pl.DataFrame
    examples: pl.DataFrame
    absent: pl.DataFrame

    @property
    def tables(self) -> dict[str, pl.DataFrame]:
        """By the names of their files: `sae_quality`, ..."""
        return {f"sae_{field.name}": getattr(self, field.name) for field in fields(self)}


def saes(view: View) -> Saes:
    """Every table of a run."""
    return Saes(
        quality=quality(view),
        densities=densities(view),
        injections=injections(view),
        ablations=ablations(view),
        activity=activity(view),
        features=features(view),
        examples=examples(view),
        absent=absent(view),
    )


def quality(view: View) -> pl.DataFrame:
    """How well each autoencoder reconstructs, and what the model makes of the reconstruction.

    The sums of units add up to the sums of all texts, and only then become means and ratios.

    Returns:
        One row a model, experiment and autoencoder: what tells it from others (`SAE`), skipped, definitions, engine,
        texts, tokens, d_sae, and `METRICS`; ascending.
    """
    about = dict.fromkeys(("skipped", "definitions", "engine"), pl.String())
    counts = dict.fromkeys(("texts", "tokens", "d_sae"), pl.Int64())
    schema = {**_SAE_KINDS, **about, **counts, **dict.fromkeys(METRICS, pl.Float64())}
    records: list[dict[str, Any]] = []
    for sums in _merged(view):
        found = metrics(sums)
        records.append({**{name: sums[name] for name in (*SAE, *about, *counts)}, **{m: found[m] for m in METRICS}})
    return pl.DataFrame(records, schema=schema)


def densities(view: View) -> pl.DataFrame:
    """How many features of each autoencoder fire at which share of the tokens, of what `quality` measured.

    Returns:
        One row a model, experiment, autoencoder and step of the density, of which there are two to a power of ten:
        `SAE`, skipped, at_least, below, features. First the dead features, from 0 to 0, then from the rarest to the
        densest.
    """
    steps = {"at_least": pl.Float64(), "below": pl.Float64(), "features": pl.Int64()}
    records: list[dict[str, Any]] = []
    for sums in _merged(view):
        about = {name: sums[name] for name in (*SAE, "skipped")}
        dead = (0.0, 0.0, sums["d_sae"] - len(sums["fired_tokens"]))
        alive = density_histogram(sums["fired_tokens"], sums["tokens"])
        records += [{**about, **dict(zip(steps, step, strict=True))} for step in (dead, *alive)]
    return pl.DataFrame(records, schema={**_SAE_KINDS, "skipped": pl.String(), **steps})


_SHOWN = 0.0005
"""A smaller change of probability would be shown as none."""


def injections(view: View) -> pl.DataFrame:
    """What each feature does when it is added, at each strength.

    Returns:
        One row a model, experiment, autoencoder, feature and strength: `SAE`, feature, strength, injections, prompts,
        mean_logit_shift and max_logit_shift (of any logit), mean_kl and max_kl (nats), mean_logit_diff (of the answer,
        clean - injected), answer_prob_clean and answer_prob (means), top1_changed (share of the injections), raised and
        lowered (the tokens whose probability moved most in the mean, in points of a hundred). Ascending.
    """
    by = [*SAE, "feature", "strength"]

    def rows() -> pl.LazyFrame:
        return view.effects("sae_injections").unique(["unit_id", "ablation_id"])

    table = collect(
        lambda: (
            rows()
            .group_by(by)
            .agg(
                pl.len().cast(pl.Int64).alias("injections"),
                pl.col("prompt_id").n_unique().cast(pl.Int64).alias("prompts"),
                pl.col("logit_shift").mean().alias("mean_logit_shift"),
                pl.col("logit_shift").max().alias("max_logit_shift"),
                pl.col("kl").mean().alias("mean_kl"),
                pl.col("kl").max().alias("max_kl"),
                pl.col("logit_diff").mean().alias("mean_logit_diff"),
                pl.col("answer_prob_clean").mean(),
                pl.col("answer_prob_ablated").mean().alias("answer_prob"),
                (pl.col("top1_clean") != pl.col("top1_ablated")).mean().alias("top1_changed"),
            )
        )
    )
    change = pl.col("changed").struct.field("prob_ablated") - pl.col("changed").struct.field("prob_clean")
    moved = collect(
        lambda: (
            rows()
            .select(*by, "changed", n=pl.len().over(by))
            .explode("changed")
            .group_by(*by, pl.col("changed").struct.field("token_id"))
            # A token that is not among a row's most changed ones changed by less than those that are: about nothing.
            .agg((change.sum() / pl.col("n").first()).alias("change"))
            .drop_nulls()
            .join(view.scan("vocabulary"), on=["model_id", "revision", "token_id"], how="left")
            .select(*by, "token_id", "token", "change")
        )
    )
    raised = _named(moved.filter(pl.col("change") >= _SHOWN).sort("change", "token_id", descending=[True, False]), by)
    lowered = _named(moved.filter(pl.col("change") <= -_SHOWN).sort("change", "token_id"), by)
    table = table.join(raised.rename({"tokens": "raised"}), on=by, how="left")
    return table.join(lowered.rename({"tokens": "lowered"}), on=by, how="left").sort(by)


def ablations(view: View) -> pl.DataFrame:
    """What each feature does that was active, by what changes without it.

    Returns:
        One row a model, experiment, autoencoder and feature: `SAE`, skipped, feature, prompts (in which it is active),
        of_prompts (that there are), tokens (at which it is), mean_value and max_value (of its activation), mean_kl and
        max_kl (nats), mean_logit_diff (of the answer, clean - without it; over the prompts in which it is active) and
        effect (the absolute difference, in the mean over all prompts). The largest effect first, or where there is no
        answer the largest KL.
    """

    def found() -> pl.LazyFrame:
        rows = view.effects("sae_ablations").unique(["unit_id", "ablation_id", "prompt_id", "sae", "site"])
        rows = rows.with_columns(pl.col("prompt_id").n_unique().cast(pl.Int64).over(SAE).alias("of_prompts"))
        values = pl.col("values").list
        return (
            rows.filter(pl.col("feature").is_not_null())
            .group_by(*SAE, "skipped", "feature")
            .agg(
                pl.len().cast(pl.Int64).alias("prompts"),
                pl.col("of_prompts").first(),
                values.len().sum().cast(pl.Int64).alias("tokens"),
                (values.sum().sum() / values.len().sum()).alias("mean_value"),
                values.max().max().alias("max_value"),
                pl.col("kl").mean().alias("mean_kl"),
                pl.col("kl").max().alias("max_kl"),
                pl.col("logit_diff").mean().alias("mean_logit_diff"),
                pl.col("logit_diff").abs().sum().alias("effect"),
                pl.col("logit_diff").count().alias("answers"),
            )
            .with_columns(pl.when(pl.col("answers") > 0).then(pl.col("effect") / pl.col("of_prompts")).alias("effect"))
            .drop("answers")
        )

    total_kl = -pl.col("mean_kl") * pl.col("prompts")
    return collect(found).sort(*SAE, -pl.col("effect"), total_kl, "feature", nulls_last=True)


def activity(view: View) -> pl.DataFrame:
    """How active each autoencoder is.

    Returns:
        One row a model, experiment and autoencoder: `SAE`, skipped, texts, tokens (that count), mean_l0 (active
        features a token), features (that are active at any token); ascending.
    """
    by = [*SAE, "skipped"]

    def found() -> pl.LazyFrame:
        rows = _tokens(view)
        counted = pl.col("position").is_not_null()
        about = rows.group_by(by).agg(
            pl.col("prompt_id").n_unique().cast(pl.Int64).alias("texts"),
            pl.col("position").count().cast(pl.Int64).alias("tokens"),
            pl.col("features").list.len().filter(counted).mean().alias("mean_l0"),
        )
        feature = pl.col("features").explode().n_unique()
        seen = rows.filter(pl.col("features").list.len() > 0).group_by(by).agg(feature.cast(pl.Int64))
        return about.join(seen, on=by, how="left").with_columns(pl.col("features").fill_null(0))

    return collect(found).sort(by)


def features(view: View) -> pl.DataFrame:
    """How active each feature is that is active at all.

    Returns:
        One row a model, experiment, autoencoder and feature: `SAE`, skipped, feature, tokens (at which it is active),
        density (the share of the tokens that count), mean and max (of its activations there); ascending.
    """
    by = [*SAE, "skipped"]
    value = pl.col("value").cast(pl.Float64)
    parts = [
        _pairs(rows)
        .group_by(*by, "feature")
        .agg(pl.len().cast(pl.Int64).alias("tokens"), value.sum().alias("sum"), value.max().alias("max"))
        for rows in _batches(view)
    ]
    each = pl.concat(parts).group_by(*by, "feature").agg(pl.col("tokens", "sum").sum(), pl.col("max").max())
    total = collect(lambda: _tokens(view).group_by(by).agg(pl.col("position").count().alias("total")))
    found = each.join(total, on=by).with_columns(
        (pl.col("tokens") / pl.col("total")).alias("density"), (pl.col("sum") / pl.col("tokens")).alias("mean")
    )
    return found.select(*by, "feature", "tokens", "density", "mean", "max").sort(*by, "feature")


def examples(view: View, top: int = 10) -> pl.DataFrame:
    """The tokens at which each feature is most active, in their context.

    Args:
        view: of the run.
        top: tokens of a feature.

    Returns:
        One row a model, experiment, autoencoder, feature and token: `SAE`, skipped, feature, rank (from 1), value,
        prompt_id, position, token, context (the token in it stands in « », or the character that it is a part of);
        ascending.
    """
    by = [*SAE, "skipped", "feature"]
    best: pl.DataFrame | None = None
    for rows in _batches(view):
        pairs = _pairs(rows) if best is None else pl.concat([best, _pairs(rows)], how="diagonal")
        # Sorted as a whole: a group at a time would sort tens of thousands of them.
        ordered = pairs.sort("value", "prompt_id", "position", descending=[True, False, False])
        best = ordered.group_by(by, maintain_order=True).head(top)
    assert best is not None, "there is always a batch"
    table = best.sort(by, maintain_order=True).with_columns(pl.int_range(1, pl.len() + 1).over(by).alias("rank"))
    table = table.cast({"rank": pl.Int64, "value": pl.Float64})
    place = ["model_id", "revision", "prompt_id"]
    named = table.select(place).unique().lazy()
    texts = collect(lambda: view.scan("prompts").join(named, on=place, how="semi").select(*place, "tokens", "text"))
    of_text = {tuple(key): (its, pieces(its, text)) for *key, its, text in texts.iter_rows()}
    seen = [
        _in_context(*of_text.get(tuple(key), ([], [])), at) for *key, at in table.select(*place, "position").iter_rows()
    ]
    return table.select(*by, "rank", "value", "prompt_id", "position").with_columns(
        pl.Series("token", [token for token, _ in seen], dtype=pl.String),
        pl.Series("context", [context for _, context in seen], dtype=pl.String),
    )


def absent(view: View) -> pl.DataFrame:
    """The experiments that found no autoencoder for a model: their patterns match those of other models alone.

    Returns:
        One row a model and experiment: model_id, revision, experiment, note (why); ascending.
    """
    columns = ["model_id", "revision", "experiment", "note"]
    missing = collect(lambda: view.scan("saes").filter(pl.col("sae").is_null()).select(columns).unique())
    return missing.sort(columns)


def _merged(view: View) -> Iterable[dict[str, Any]]:
    """The rows of table `sae_quality` that would be there if all texts had been one unit."""

    def rows() -> pl.LazyFrame:
        return view.units("sae_quality").unique(["unit_id", "sae", "sae_version", "site"])

    # Units that were measured by other definitions are not added up.
    alike = ("skipped", "definitions")
    of_units = collect(rows).sort(*SAE, *alike, "unit_id")
    for units in of_units.partition_by(*SAE, *alike, maintain_order=True):
        about = {name: units[name][0] for name in (*SAE, *alike)}
        engine = ", ".join(sorted(units["engine"].unique()))
        yield {**about, "engine": engine, **merged(units.iter_rows(named=True))}


def _named(moved: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """`by` and `tokens`: the first tokens of each as text, `" Paris" +12.3`."""
    first = moved.group_by(by, maintain_order=True).head(_MOVED)
    said = [
        f"{json.dumps(token or f'#{token_id}', ensure_ascii=False)} {change * 100:+.1f}"
        for token_id, token, change in first.select("token_id", "token", "change").iter_rows()
    ]
    named = first.select(by).with_columns(pl.Series("tokens", said, dtype=pl.String))
    return named.group_by(by, maintain_order=True).agg(pl.col("tokens").str.join(", "))


def _tokens(view: View) -> pl.LazyFrame:
    """The rows of table `sae_features`, each once."""
    return view.units("sae_features").unique(["unit_id", "sae", "site", "prompt_id", "position"])


def _batches(view: View) -> Iterable[pl.DataFrame]:
    """The same, as many units at a time as have `_PAIRS` active features together; there is always one batch."""
    size = pl.col("features").list.len().sum().cast(pl.Int64).alias("pairs")
    units = collect(lambda: _tokens(view).group_by("unit_id").agg(size)).sort("unit_id")
    batches = units.group_by(pl.col("pairs").cum_sum() // _PAIRS, maintain_order=True).agg("unit_id")
    for unit_ids in batches["unit_id"].to_list() or [[]]:
        yield collect(lambda of=unit_ids: _tokens(view).filter(pl.col("unit_id").is_in(of)))


def _pairs(rows: pl.DataFrame) -> pl.DataFrame:
    """One row a token and active feature: with `feature` and `value` in place of the lists."""
    named = rows.select(*SAE, "skipped", "prompt_id", "position", feature="features", value="values")
    return named.filter(pl.col("feature").list.len() > 0).explode("feature", "value")


def _in_context(tokens: Sequence[str], shown: Sequence[Piece], at: int) -> tuple[str | None, str | None]:
    """A token, and some text around it in which it is marked, or the character of which it is a part; nothing for a
    text that the store does not know.
    """
    if at >= len(tokens):
        return None, None
    marked = bisect(shown, at, key=lambda piece: piece.first) - 1
    before, after = shown[max(0, marked - _BEFORE) : marked], shown[marked + 1 : marked + 1 + _AFTER]
    return tokens[at], f"{_joined(before)}«{shown[marked].text}»{_joined(after)}"


def _joined(some: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in some)

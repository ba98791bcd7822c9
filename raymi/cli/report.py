"""`raymi report`: a run's results as tables."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

import raymi.store
from raymi.cli import failures_text
from raymi.cli.completion import RUN
from raymi.cli.effects_text import by_head, by_layer, strongest
from raymi.cli.options import store_option
from raymi.cli.sae_text import sections
from raymi.cli.text import formatted, number, plural, table, terminal_width

if TYPE_CHECKING:
    import polars as pl

    from raymi.report.tables import Report


@click.command()
@click.argument("run", required=False, type=RUN)
@store_option
@click.option("--json", "as_json", is_flag=True, help="The tables as JSON.")
@click.option("--all", "everything", is_flag=True, help="Count also the prompts that the job has no longer.")
@click.option(
    "--csv",
    type=click.Path(path_type=Path),
    help="Write the tables into this folder: models.csv, answers.csv, layers.csv, heads.csv, failures.csv, "
    "mismatches.csv where what was measured twice did not agree, superseded.csv and former_prompts.csv for what is "
    "stored and does not count, and sae_*.csv for what was measured with autoencoders; or the table of models, if it "
    "ends in .csv.",
)
@click.option("--parquet", type=click.Path(path_type=Path), help="The same as Parquet.")
def command(
    run: str | None, store_uri: str, as_json: bool, everything: bool, csv: Path | None, parquet: Path | None
) -> None:
    """Show what a run has found so far: per model, per layer, per autoencoder, and what failed.

    RUN is the name of a run, or how its name begins; without it, the run that was last issued. The run may be going
    on. The rows themselves are Parquet files: `pl.scan_parquet("STORE/ablations/**/*.parquet")`.

    \b
    Examples:
      raymi report
      raymi report heads --csv tables      # the run whose name begins so
      raymi show --failure 1               # one of what failed, whole
    """
    from raymi.report import export, tables

    store = raymi.store.open(store_uri)
    for error in store.survey()[1].values():
        click.echo(f"damaged: {error}", err=True)
    report = tables.report(store, run, everything=everything)
    written: list[Path] = []
    if csv:
        written += export.write(report, csv, "csv")
    if parquet:
        written += export.write(report, parquet, "parquet")
    for path in written:
        click.echo(f"wrote {path}", err=True)
    if written or as_json:
        for each in report.damaged:
            click.echo(f"damaged, and left out: {each}", err=True)
    if as_json:
        click.echo(export.as_json(export.as_record(report)))
    elif not written:
        for line in lines(report, terminal_width()):
            click.echo(line)


def lines(report: "Report", width: int) -> Iterator[str]:
    """A report as text.

    Args:
        report: of a run.
        width: of the terminal in characters, of which tables need about 80; 0 folds nothing.
    """
    from raymi.cli.names import named

    yield from _heading(report)
    report = named(report)
    for (experiment,), models in report.models.drop_nulls("experiment").group_by("experiment", maintain_order=True):
        yield f"\n{experiment}: KL(clean || ablated) in nats; logit diff of the answer, clean - ablated"
        yield from _effects(models, width)
        layers = report.layers.filter(report.layers["experiment"] == experiment)
        if layers["layers"].n_unique() > 1:
            yield from by_layer(layers, width)
            yield from by_head(report.heads.filter(report.heads["experiment"] == experiment), width)
    yield from sections(report.saes, width)
    if not report.models.is_empty():
        together = report.answers["experiment"].n_unique() <= 1
        answers = together and report.answers["answer_prob"].count() > 0
        yield "\nmodels" + (", and how well they answer when nothing is changed" if answers else "")
        yield from _baselines(report.models, report.answers if together else None, width)
        if not together:
            yield "\nhow well they answer when nothing is changed, by the prompts of each experiment"
            yield from _answers(report.answers, width)
        yield "\nhow they were measured; and how far what was measured twice differs, in logits"
        yield from _proofs(report.models, width)
        for said in (
            *_mismatches(report.mismatches),
            *_slow(report.models),
            *_weak_proofs(report.models),
            *_unused(report.models),
            *_testbeds(report),
        ):
            yield fill(said, width or 10_000, initial_indent="  ", subsequent_indent="    ")
    for what, said in (
        ("not counted", [*_closed(report.models), *_left_out(report)]),
        ("not shown, but kept in the store", report.lacking),
    ):
        if said:
            yield f"\n{what}:"
        for each in said:
            yield fill(each, width or 10_000, initial_indent="  ", subsequent_indent="    ")
    if not report.failures.is_empty():
        yield "\nfailed:"
        yield from failures_text.lines(report.failures, width)
    if report.damaged:
        yield "\ndamaged, and left out:"
        for each in report.damaged:
            yield fill(
                each,
                width or 10_000,
                initial_indent="  ",
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )


def _heading(report: "Report") -> Iterator[str]:
    from raymi.report.tables import status

    run = report.run
    n_models = report.models.select("model_id", "revision", "dtype").n_unique()
    n_ablations = int(report.models["ablations"].sum())
    others = report.measured - n_ablations
    yield f"{run.run}: {status(run, report.driven)}, issued {run.driver.started_at.astimezone():%Y-%m-%d %H:%M}"
    if run.taken is not None:
        prompts = len(run.jobs[-1].resolved.get("prompts", ()))
        yield f"the last command took {run.taken:,} of {prompts:,} prompts; without --limit and --sample it takes all"
    said = [plural(n_models, "model")]
    if n_ablations or not others:
        said.append(plural(n_ablations, "ablation"))
    if others:
        said.append(f"{plural(others, 'measurement')} with autoencoders")
    if not report.failures.is_empty():
        said.append(plural(report.failures.height, "failure"))
    yield ", ".join(said)


def _effects(models: "pl.DataFrame", width: int) -> list[str]:
    header = ("model", "ablations", "mean KL", "max KL", "logit diff", "strongest")
    rows = [
        [
            model["model_id"],
            f"{model['ablations']:,}",
            number(model["mean_kl"]),
            number(model["max_kl"]),
            number(model["mean_logit_diff"], "+"),
            strongest(model["strongest_layers"], model["strongest_heads"]),
        ]
        for model in models.iter_rows(named=True)
    ]
    return table(header, rows, right=range(1, 5), width=width)


def _baselines(models: "pl.DataFrame", answers: "pl.DataFrame | None", width: int) -> list[str]:
    header = ("model", "revision", "dtype", "device", "load", "prompts", "P(answer)", "top-1")
    of: dict[str, dict[str, Any]] = {}
    if answers is not None:
        of = {row["model_id"]: row for row in answers.iter_rows(named=True)}
    shown = 8 if of else 5
    rows = [
        [
            model["model_id"],
            (model["revision"] or "-")[:7],
            model["dtype"] or "-",
            model["device"] or "-",
            "-" if model["load_seconds"] is None else f"{model['load_seconds']:.1f} s",
            *_answered(of.get(model["model_id"], {})),
        ][:shown]
        for model in models.unique("model_id", maintain_order=True).iter_rows(named=True)
    ]
    return table(header[:shown], rows, right=range(4, 8), width=width)


def _answers(answers: "pl.DataFrame", width: int) -> list[str]:
    rows = [[row["model_id"], row["experiment"], *_answered(row)] for row in answers.iter_rows(named=True)]
    return table(("model", "experiment", "prompts", "P(answer)", "top-1"), rows, right=range(2, 5), width=width)


def _answered(row: dict[str, Any]) -> list[str]:
    top = row.get("answer_top1")
    return [str(row.get("prompts") or "-"), number(row.get("answer_prob")), "-" if top is None else f"{top:.0%}"]


def _proofs(models: "pl.DataFrame", width: int) -> list[str]:
    header = ("model", "engine", "verified", "agreed", "off by", "noise to", "effects to")
    rows = [
        [
            model["model_id"],
            model["engine"] or "-",
            str(model["verified"] or "-"),
            "-" if model["agreed"] is None else str(model["agreed"]),
            *(
                "-" if model[name] is None else f"{model[name]:.1e}"
                for name in ("verified_error", "verified_tolerance")
            ),
            number(model["verified_effect"]),
        ]
        for model in models.unique("model_id", maintain_order=True).iter_rows(named=True)
    ]
    return table(header, rows, right=range(2, 7), width=width)


_WAYS = {
    "cone": "by the cone",
    "layers": "from the ablated layer on",
    "full": "by full forwards with raymi's attention",
}


def _mismatches(mismatches: "pl.DataFrame") -> Iterator[str]:
    """Says what was verified in vain, and what came of it."""
    for found in mismatches.iter_rows(named=True):
        attempts = found["attempts"]
        failed = "at an attempt that failed" if attempts == 1 else f"at {attempts} attempts that failed"
        yield (
            f"{found['model_id']}: {found['differed']} of {plural(found['verified'], 'ablation')} measured "
            f"{_WAYS.get(found['engine'], 'by ' + str(found['engine']))} differed from full forwards of the family's "
            f"own attention by up to {formatted(found['max_logit_diff'], '.1e')}"
            + (", so it was measured by full forwards" if found["then"] == "full" else f" {failed}")
        )


def _slow(models: "pl.DataFrame") -> Iterator[str]:
    """Says where the cone was not used, and why."""
    for model in models.unique("model_id", maintain_order=True).iter_rows(named=True):
        if model["why_not_cone"]:
            yield f"{model['model_id']}: {model['why_not_cone']}"
        if model["fallbacks"]:
            times = plural(model["fallbacks"], "time")
            yield f"{model['model_id']}: {times} something took full forwards all the same: {model['fallback']}"


def _unused(models: "pl.DataFrame") -> Iterator[str]:
    """Says what is not the model that was trained."""
    for model in models.filter(models["unused"] > 0).unique("model_id", maintain_order=True).iter_rows(named=True):
        yield (
            f"{model['model_id']}: measured without {plural(model['unused'], 'tensor')} that its weights hold and its "
            "config has no place for, as --allow-unused says (table models)"
        )


def _weak_proofs(models: "pl.DataFrame") -> Iterator[str]:
    """Says where a wrong number could pass for noise."""
    weak = models.filter(models["verified_effect"] <= models["verified_tolerance"])
    for model in weak["model_id"].unique(maintain_order=True):
        yield f"{model}: no effect that was measured twice is larger than noise, so their agreement proves little"


def _testbeds(report: "Report") -> Iterator[str]:
    """Says whose rows were not all measured alike."""
    several = report.models.filter(report.models["testbeds"] > 1).unique("model_id", maintain_order=True)
    for model in several.iter_rows(named=True):
        yield (
            f"{model['model_id']}: its rows come from {model['testbeds']} testbeds (device, versions; table testbeds), "
            "between which small differences mean nothing"
        )


def _closed(models: "pl.DataFrame") -> Iterator[str]:
    for model in models.filter(models["closed"] > 0).iter_rows(named=True):
        yield (
            f"{model['model_id']}: {model['experiment']}: {model['closed']:,} of "
            f"{plural(model['ablations'], 'ablation')} cut nothing: the model's own mask had closed their edges"
        )


def _left_out(report: "Report") -> Iterator[str]:
    """Says what the store holds beside what is shown."""
    for row in report.left_out.superseded.iter_rows(named=True):
        rows = plural(row["rows"], "row")
        yield f"{row['model_id']}: {row['experiment']}: {rows} of work that is not planned any more: {row['why']}"
    prompts = report.left_out.prompts
    if not prompts.is_empty():
        ids = ", ".join(prompts["prompt_id"][:5]) + (", ..." if prompts.height > 5 else "")
        yield (
            f"{plural(int(prompts['rows'].sum()), 'row')} of {plural(prompts.height, 'prompt')} that the job has no "
            f"longer ({ids}); --all counts them"
        )
    for name in report.left_out.mixed:
        yield (
            f"{name}: its sums are over prompts of which the job has some no longer; the run's command, issued again, "
            "measures them without"
        )

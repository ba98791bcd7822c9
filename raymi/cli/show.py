"""`raymi show`: one failure or one row, whole."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from textwrap import fill
from typing import Any

import click

import raymi.store
from raymi.cli.completion import RUN
from raymi.cli.knockout_text import percent, quoted
from raymi.cli.options import store_option
from raymi.cli.text import table, terminal_width
from raymi.errors import UserError

_LABEL = 22


@click.command()
@click.argument("run", required=False, type=RUN)
@store_option
@click.option("--failure", type=int, metavar="N", help="The failure that has this number in `raymi report`.")
@click.option("--table", metavar="TABLE", help="ablations, sae_quality, sae_features, sae_injections or sae_ablations.")
@click.option("--model", "model_id", metavar="ID", help="Of this model.")
@click.option("--experiment", metavar="NAME", help="Of this experiment.")
@click.option("--prompt", "prompt_id", metavar="ID", help="Of this prompt.")
@click.option("--layer", type=int, metavar="N", help="Of this layer.")
@click.option("--head", type=int, metavar="N", help="Of this head.")
@click.option("--unit", "unit_id", metavar="ID", help="Of this unit, or of those whose id begins so.")
@click.option("--ablation", "ablation_id", metavar="ID", help="This ablation.")
@click.option("--feature", type=int, metavar="N", help="Of this feature of an autoencoder.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def command(
    run: str | None, store_uri: str, failure: int | None, table: str | None, as_json: bool, **wanted: Any
) -> None:
    """Print one failure or one row of a run with all that is stored of it.

    RUN is the name of a run, or how it begins; without it, the run that was last issued. Of names and ids the
    beginning will do. Where several rows fit, the one with the largest KL is shown, and how many there are.

    \b
    Examples:
      raymi show                            # the row with the largest KL
      raymi show --layer 23 --head 4        # that of one head
      raymi show --failure 1                # with its traceback
      raymi show --table sae_injections --feature 789
    """
    from raymi.report import single, tables
    from raymi.report.query import View, despite_damage
    from raymi.store import schemas

    store = raymi.store.open(store_uri)
    chosen = {name: value for name, value in wanted.items() if value is not None}
    if failure is not None and (chosen or table):
        raise UserError("--failure: a failure has its number alone; what is measured has no failure")
    if table and table not in schemas.UNIT_TABLES:
        raise UserError(f"--table: found {table!r}; allowed: {', '.join(schemas.UNIT_TABLES)}")

    def look(view: View) -> tuple[View, single.Found]:
        if failure is not None:
            return view, single.failure(view, tables.open_failures(view), failure)
        return view, single.row(view, chosen, table)

    view, found = despite_damage(store, store.find(run), look)
    for each in view.damage.said(store.objects):
        click.echo(f"damaged, and left out: {each}", err=True)
    if as_json:
        click.echo(json.dumps(found.row, indent=2, default=datetime.isoformat, ensure_ascii=False))
        return
    more = "" if found.n == 1 else f"; {found.n:,} fit" if failure is None else f"; {found.n:,} units failed alike"
    click.echo(f"{view.run.run}: table {found.table}{more}\n")
    for line in _lines(found.row, terminal_width()):
        click.echo(line)


def _lines(row: Mapping[str, Any], width: int) -> Iterator[str]:
    """A line a column, those without a value left out; texts of several lines and lists of tokens below."""
    long = {name: value for name, value in row.items() if isinstance(value, str) and "\n" in value}
    for name, value in row.items():
        if value is not None and name not in long and name != "changed":
            head = f"{name:<{_LABEL}}"
            yield fill(f"{head}{_said(name, value)}", width or 10_000, subsequent_indent=" " * _LABEL)
    for name, value in long.items():
        yield f"\n{name}"
        yield from value.splitlines()
    if row.get("changed"):
        cells = [
            [quoted(each["token"] or "?"), str(each["token_id"]), percent(each["prob_clean"]), percent(each[after])]
            for each in row["changed"]
            for after in [next(key for key in each if key.startswith("prob_") and key != "prob_clean")]
        ]
        yield "\nwhat changed most"
        yield from table(("token", "id", "before", "after"), cells, right=(1, 2, 3), width=width)


def _said(name: str, value: Any) -> str:
    match value:
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S} UTC"
        case str():
            return quoted(value) if name.endswith("token") else value
        case list():
            return json.dumps(value, ensure_ascii=False, default=str)
        case _:
            return str(value)

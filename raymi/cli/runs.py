"""`raymi runs`: what is in the store."""

from datetime import UTC, datetime, timedelta

import click

import raymi.store
from raymi.cli.options import store_option
from raymi.cli.text import table, terminal_width


@click.command()
@store_option
@click.option("--json", "as_json", is_flag=True, help="The same as a JSON list.")
def command(store_uri: str, as_json: bool) -> None:
    """List the runs in a store, the one that was last issued at the end.

    A run that is `stopped` was interrupted or killed: the command that made it, issued again, continues it.
    One that is `partial` has measured the prompts that --limit or --sample took: the command without them goes on with
    the others.

    \b
    Examples:
      raymi runs
      raymi runs --store s3://bucket/prefix --json
    """
    from raymi.report import tables
    from raymi.report.export import as_json as to_json

    notes: list[str] = []
    runs = tables.runs(raymi.store.open(store_uri), notes)
    for note in notes:
        click.echo(f"damaged: {note}", err=True)
    if as_json:
        click.echo(to_json(runs.to_dicts()))
    elif runs.is_empty():
        click.echo(f"No runs in {store_uri}. `raymi run JOB.yaml` makes one; --store names another store.")
    else:
        header = ("run", "status", "models", "measured", "failed", "started", "written")
        now = datetime.now(UTC)
        cells = [
            [
                run["run"],
                run["status"],
                str(run["models"]),
                f"{run['measured']:,}",
                str(run["failures"] or "-"),
                f"{run['started'].astimezone():%m-%d %H:%M}",
                ago(now - run["last_write"]) if run["last_write"] else "-",
            ]
            for run in runs.iter_rows(named=True)
        ]
        click.echo("\n".join(table(header, cells, right=(2, 3, 4), width=terminal_width())))


def ago(since: timedelta) -> str:
    """How long something is past, in one unit: `5 min ago`."""
    seconds = max(0, since.total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"

"""`raymi models`: what is in the cache."""

import dataclasses
import json
from pathlib import Path
from textwrap import fill

import click

from raymi import catalog
from raymi.catalog import CachedModel
from raymi.cli.completion import MODEL
from raymi.cli.options import cache_option
from raymi.cli.text import count, size, table, terminal_width


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", type=MODEL)
@cache_option
@click.option("--json", "as_json", is_flag=True, help="Everything known of each model, as a JSON list.")
def command(models: tuple[str, ...], cache_dir: Path | None, as_json: bool) -> None:
    """List the models in the Hugging Face cache, and say which can run and why the others cannot.

    A MODEL is an id, or id@revision with a branch, a tag, a commit or the beginning of one. Without any, every model
    is listed at the revision that its main branch points to.

    \b
    Examples:
      raymi models
      raymi models gpt2 Qwen/Qwen3-0.6B@main --json
    """
    found = [catalog.find(ref, cache_dir) for ref in models] if models else catalog.scan(cache_dir)
    if not found:
        click.echo(f"No models in {cache_dir or catalog.default_cache()}.", err=True)
        click.echo("`raymi fetch HuggingFaceTB/SmolLM2-135M` downloads a small one to begin with.", err=True)
    if as_json:
        click.echo(json.dumps([record(model) for model in found], indent=2))
    elif found:
        _show(found)


def record(model: CachedModel) -> dict[str, object]:
    """A model as plain JSON values."""
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return {**fields, "path": str(model.path), "runnable": model.runnable}


def _show(models: list[CachedModel]) -> None:
    width = terminal_width()
    header = ("model", "rev", "type", "layers", "heads", "params", "size", "dtype", "runs")
    for line in table(header, [_cells(model) for model in models], right=range(3, 7), width=width):
        click.echo(line)
    stopped = [model for model in models if model.reason]
    if stopped:
        click.echo("\nCannot run:")
    for model in stopped:
        click.echo(fill(f"  {model.id}: {model.refused}", width or 10_000, subsequent_indent="    "))
    beside = [model for model in models if model.runnable and model.not_built]
    if beside:
        click.echo("\nStored beside the language model, and not built:")
    for model in beside:
        click.echo(fill(f"  {model.id}: {', '.join(model.not_built)}", width or 10_000, subsequent_indent="    "))
    if any(model.damaged for model in stopped):
        click.echo("\n`raymi fetch MODEL` downloads what is missing or damaged.")


def _cells(model: CachedModel) -> list[str]:
    return [
        model.id,
        model.revision[:7] or "-",
        model.model_type or "-",
        "-" if model.n_layers is None else str(model.n_layers),
        "-" if model.heads is None else str(model.heads),
        count(model.parameters),
        size(model.size_on_disk),
        model.dtype or "-",
        "yes" if model.runnable else "no",
    ]

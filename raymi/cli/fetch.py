"""`raymi fetch`: models from the hub into the cache."""

from pathlib import Path

import click

from raymi import catalog
from raymi.cli.options import target_option
from raymi.cli.text import count, size
from raymi.errors import UserError


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@target_option
@click.option("--allow-pickle", is_flag=True, help="Take pickled weights where a model has no others.")
def command(models: tuple[str, ...], cache_dir: Path | None, allow_pickle: bool) -> None:
    """Download models into the Hugging Face cache: the files that are needed to run them, and no others.

    A MODEL is an id, or id@revision with a branch, a tag or a commit. What is there already is not downloaded again.
    The exit code is 2 when one could not be had; the others are fetched all the same.

    \b
    Examples:
      raymi fetch HuggingFaceTB/SmolLM2-135M
      raymi fetch gpt2 EleutherAI/pythia-70m@step3000
    """
    failures: list[UserError] = []
    for ref in models:
        try:
            model = catalog.fetch(ref, cache_dir, allow_pickle=allow_pickle)
        except UserError as error:
            failures.append(error)
            continue
        state = f"cannot run: {model.reason}" if model.reason else "can run"
        click.echo(f"{ref} is at {model.revision[:7]}: {count(model.parameters)}, {size(model.size_on_disk)}, {state}")
    if failures:
        raise failures[0] if len(models) == 1 else UserError("\n".join(map(str, failures)))

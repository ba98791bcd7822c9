"""The `raymi` command. It imports a verb only when that verb is asked for, so that `raymi --help` is quick."""

import gc
import sys
from difflib import get_close_matches
from importlib import import_module

import click

from raymi import outlet
from raymi.errors import UserError
from raymi.leaving import leave

VERBS = {
    "models": "List the models in the Hugging Face cache and say which can run.",
    "fetch": "Download models into the cache.",
    "knockout": "Knock out attention in one place and print what changes.",
    "validate": "Check a job file without loading a model.",
    "run": "Run a job file: the sweep.",
    "runs": "List the runs in a store.",
    "report": "Show a run's results as tables.",
    "show": "Print one failure or one row whole.",
    "sae": "List, inspect and measure sparse autoencoders.",
}
"""Each is the name of its module in `raymi.cli`."""
INTERRUPTED = 130


class Verbs(click.Group):
    """A click group that knows its commands by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order in which a user meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Imports a verb."""
        if cmd_name in VERBS:
            return import_module(f"raymi.cli.{cmd_name}").command
        near = get_close_matches(cmd_name, VERBS, n=1)
        return ctx.fail(f"No such command {cmd_name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the verbs from `VERBS`, where click would import them all."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="raymi")
def raymi() -> None:
    """Mechanistic-interpretability experiments in batches, over every cached Hugging Face model, on Ray.

    Attention knockouts of any heads and edges, and sparse autoencoders: how well they reconstruct, what is active, what
    features do that are added or taken out. Rows go into a store of Parquet files. Whatever is killed goes on where it
    stopped, when the same command is issued again.

    \b
    Examples:
      raymi models                             # what can run
      raymi knockout 'Qwen/*'                  # one place, at once
      raymi validate jobs/heads.yaml
      raymi run jobs/heads.yaml                # a sweep
      raymi report                             # what it found, also while it is going on

    \b
    Completion of verbs, models and runs, for bash (or zsh, fish):
      eval "$(_RAYMI_COMPLETE=bash_source raymi)"
    """


def main() -> None:
    """Runs the command line and exits: with a verb's own code, a mistake's code (2), or 130 after Ctrl-C.

    When standard output is gone, the code is `outlet.CLOSED`; when it cannot be written, `outlet.FULL`.
    """
    gc.set_threshold(100_000)  # imports and file headers make many small objects and no cycles: a fifth of the time
    outlet.install()
    try:
        code = _code()
        sys.stdout.flush()
    except outlet.OutputLost as lost:
        if lost.why:
            click.echo(f"Error: {lost.why}", err=True)
        code = lost.code
    except SystemExit as second:  # a signal, when another had come before
        code = second.code
    sys.stderr.flush()
    leave(code)


def _code() -> int:
    try:
        return raymi.main(prog_name="raymi", standalone_mode=False)
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return INTERRUPTED

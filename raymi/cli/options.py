"""Options that several verbs share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from raymi.cli.caches import usual
from raymi.cli.completion import MODEL
from raymi.store import DEFAULT, ENVVAR

store_option = click.option(
    "--store",
    "store_uri",
    default=DEFAULT,
    envvar=ENVVAR,
    show_default=True,
    show_envvar=True,
    metavar="PATH|URI",
    help="Where results are: a folder, or an object store such as s3://bucket/prefix.",
)

cache_option = click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    callback=usual,
    help="The cache, in place of the one HF_HOME names, or of the demo's where that is empty.",
)

target_option = click.option(
    "--cache-dir", type=click.Path(path_type=Path), help="The cache to fill, in place of the one HF_HOME names."
)

unused_option = click.option(
    "--allow-unused",
    multiple=True,
    metavar="MODEL",
    type=MODEL,
    help="Measure this model without the tensors that its files hold beyond its config.",
)

models_option = click.option(
    "--models",
    multiple=True,
    metavar="ID",
    type=MODEL,
    help="Models or patterns, in place of the job's. Repeatable.",
)

sets_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replaces a field of the job, such as experiments.0.layers=middle. Repeatable.",
)

_ALLOWING = (
    click.option(
        "--trust-remote-code", multiple=True, metavar="MODEL", type=MODEL, help="Let this model run its own code."
    ),
    click.option("--allow-pickle", multiple=True, metavar="MODEL", type=MODEL, help="Load its pickled weights."),
    unused_option,
)

_OF_RUNS = (
    store_option,
    cache_option,
    click.option(
        "--address",
        metavar="ADDRESS",
        is_eager=True,  # which cache is meant depends on it
        help="Ray cluster to join: auto or host:port. [default: starts its own]",
    ),
    click.option("--new", is_flag=True, help="Start another run of the same job."),
    click.option("--download", is_flag=True, help="Fetch models that the job names and the cache lacks."),
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        metavar="N",
        help="Take the first N prompts only, in the same run: issued without, the command goes on with the others.",
    ),
    click.option(
        "--sample",
        type=click.IntRange(min=1),
        metavar="N",
        help="Take N prompts only, drawn by the job's seed, in the same run. A larger N takes the same ones and more.",
    ),
    click.option("--dry-run", is_flag=True, help="Say what would be measured and what it would take."),
    click.option("-q", "--quiet", is_flag=True, help="Say only what is wrong: no progress, and no report at the end."),
    click.option("-v", "--verbose", is_flag=True, help="Say also what every replica does, and tracebacks."),
    click.option(
        "--inline",
        is_flag=True,
        help="Measure in this process, without Ray, one model after the other: the same numbers.",
    ),
    *_ALLOWING,
)


def allow_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is allowed of single models that is not of all."""
    for option in reversed(_ALLOWING):
        command = option(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how a job is carried out: `raymi.cli.run.How` takes them."""
    for option in reversed(_OF_RUNS):
        command = option(command)
    return command

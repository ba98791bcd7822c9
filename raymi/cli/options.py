"""Options that several verbs share."""

import click

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

"""The only room that writes results. Importing it is cheap: Polars and PyArrow come with `open`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raymi.store.reader import Store

DEFAULT = "raymi-store"
"""Where results go when nobody says otherwise: a folder of the current directory."""

ENVVAR = "RAYMI_STORE"
"""Environment variable that says otherwise."""


def open(uri: str) -> "Store":
    """The store at a path or an object-store URI (`s3://`, `gs://`, `az://`, `file://`); it need not exist yet.

    Raises:
        UserError: the path is a file, or the URI is of no known kind.
    """
    from raymi.store.objects import connect
    from raymi.store.reader import Store

    return Store(connect(uri))

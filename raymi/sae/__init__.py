"""Sparse autoencoders: many formats on disk, one arithmetic.

`raymi.sae.load(where)` opens one. Importing this package imports no torch: what is named here is imported when it is
first used, so that listing what a cache holds stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raymi.sae.autoencoder import SAE, Sparse
    from raymi.sae.description import Description, check_fits
    from raymi.sae.discover import describe, fetch, scan
    from raymi.sae.loading import load

__all__ = ["SAE", "Description", "Sparse", "check_fits", "describe", "fetch", "load", "scan"]

_HOMES = {
    "SAE": "raymi.sae.autoencoder",
    "Sparse": "raymi.sae.autoencoder",
    "Description": "raymi.sae.description",
    "check_fits": "raymi.sae.description",
    "describe": "raymi.sae.discover",
    "fetch": "raymi.sae.discover",
    "scan": "raymi.sae.discover",
    "load": "raymi.sae.loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

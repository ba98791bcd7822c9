"""Sparse autoencoders: many formats on disk, one arithmetic.

`raymi.sae.load(where)` opens one. Importing this package imports no torch: what is named here is imported when it is
first used, so that listing what a cache holds stays quick.
"""

from typing import TYPE_CHECKING

from raymi import lazily

if TYPE_CHECKING:
    from raymi.sae.autoencoder import SAE, Sparse
    from raymi.sae.description import Description, check_fits
    from raymi.sae.discover import describe, fetch, scan
    from raymi.sae.loading import load

__all__ = ["SAE", "Description", "Sparse", "check_fits", "describe", "fetch", "load", "scan"]

__getattr__, __dir__ = lazily.names(
    __name__,
    {
        "SAE": "raymi.sae.autoencoder",
        "Sparse": "raymi.sae.autoencoder",
        "Description": "raymi.sae.description",
        "check_fits": "raymi.sae.description",
        "describe": "raymi.sae.discover",
        "fetch": "raymi.sae.discover",
        "scan": "raymi.sae.discover",
        "load": "raymi.sae.loading",
    },
)

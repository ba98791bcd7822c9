"""raymi: attention-knockout and sparse-autoencoder experiments in batches.

In a notebook, `raymi.load(id)` opens a cached model; the command `raymi` does the rest. Importing this package
imports nothing else: what is named here is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raymi.errors import UserError
    from raymi.model.interventions import Mask
    from raymi.notebook import Model, load
    from raymi.prompts import Prompt

__all__ = ["Mask", "Model", "Prompt", "UserError", "load"]

_HOMES = {
    "Mask": "raymi.model.interventions",
    "Model": "raymi.notebook",
    "Prompt": "raymi.prompts",
    "UserError": "raymi.errors",
    "load": "raymi.notebook",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

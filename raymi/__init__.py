"""raymi: attention-knockout and sparse-autoencoder experiments in batches.

In a notebook, `raymi.load(id)` opens a cached model, and `raymi.interventions` has what can be done to it; the command
`raymi` does the rest. Importing this package
imports nothing else: what is named here is imported when it is first used.
"""

from typing import TYPE_CHECKING

from raymi import lazily

if TYPE_CHECKING:
    from raymi import interventions
    from raymi.errors import UserError
    from raymi.model.interventions import Mask
    from raymi.notebook import Model, load
    from raymi.prompts import Prompt

__all__ = ["Mask", "Model", "Prompt", "UserError", "interventions", "load"]

__getattr__, __dir__ = lazily.names(
    __name__,
    {
        "Mask": "raymi.model.interventions",
        "Model": "raymi.notebook",
        "Prompt": "raymi.prompts",
        "UserError": "raymi.errors",
        "interventions": "raymi.interventions",
        "load": "raymi.notebook",
    },
)

"""raymi in a notebook: one model in this process, without Ray.

What it gives are tensors, Polars frames and heat maps.
"""

from raymi.notebook.model import Model
from raymi.notebook.opening import check_device, load
from raymi.notebook.results import Ablated, Forward, Knockouts, Sweep, top_tokens

__all__ = ["Ablated", "Forward", "Knockouts", "Model", "Sweep", "check_device", "load", "top_tokens"]

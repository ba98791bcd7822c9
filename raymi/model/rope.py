"""Rotary positions that stretch with the prompt.

Transformers keeps the frequencies of the longest prompt that a model has seen for all shorter ones behind it, down to
the length that it was trained with, so that the same prompt gives other numbers after a longer one. Here each forward
has the frequencies of its own length, as in a model that was just loaded.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def forget_lengths(model: nn.Module) -> None:
    """Has every module that keeps the length of the longest prompt begin each forward without it."""
    for module in model.modules():
        if list(_dynamic(module)):
            module.register_forward_pre_hook(_forget)


def _dynamic(module: Any) -> Iterator[str]:
    """What the names of a module's frequencies begin with, where these follow the length of the prompt."""
    kinds = getattr(module, "rope_type", None)
    if not hasattr(module, "max_seq_len_cached"):
        return
    for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [("", kinds)]:
        if isinstance(kind, str) and "dynamic" in kind:
            yield f"{layer_type}_" if layer_type else ""


def _forget(module: Any, args: Any) -> None:
    for prefix in _dynamic(module):
        original, now = getattr(module, f"{prefix}original_inv_freq"), getattr(module, f"{prefix}inv_freq")
        if isinstance(original, torch.Tensor):
            setattr(module, f"{prefix}inv_freq", original.to(now.device))
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

"""What a norm gives before its weights, which is what TransformerLens calls `hook_normalized`.

There it is the same whether the weights are folded into the matrices behind or not. Here a norm is called with other
weights, ones or zeros (Gemma's are an offset from one), and those are taken with which it only centres and scales.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

_LARGE = 100.0
"""Standard deviation of the probe: a norm's epsilon is nothing beside it."""
_ROOM = 1e-4


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm that was found, and the same without weights."""

    module: nn.Module
    bare: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """What it makes of its input before its weights, in float32 at least."""
        # Not the module itself: its hooks, and accelerate's, are not to run again.
        wide = x if x.dtype == torch.float64 else x.float()
        found: Tensor = type(self.bare).forward(self.bare, wide)
        return found


def norm_among(modules: Iterable[nn.Module], like: Tensor) -> Norm | None:
    """The first of some modules that is a norm over the width of its input; None where none is.

    Args:
        modules: they are tried in turn.
        like: what they are given, [..., D].
    """
    return next((norm for module in modules if (norm := _norm(module, like)) is not None), None)


def _norm(module: nn.Module, like: Tensor) -> Norm | None:
    own = dict(module.named_parameters())
    width, dtype = like.shape[-1], torch.float64 if like.dtype == torch.float64 else torch.float32
    if len(own) > 2 or any("." in name or weight.shape != (width,) for name, weight in own.items()):
        return None
    x = _LARGE * torch.randn(8, width, generator=torch.Generator().manual_seed(0)) + _LARGE
    x = x.to(like.device, dtype)
    for values in product((1.0, 0.0), repeat=len(own)):
        bare = copy.copy(module)
        weights = {name: torch.full((width,), value).to(x) for name, value in zip(own, values, strict=True)}
        filled = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
        bare._parameters = {**module._parameters, **filled}  # pyright: ignore[reportPrivateUsage]
        norm = Norm(module, bare)
        try:
            found = norm(x)
        except Exception:  # whatever else it is, it is no norm
            return None
        if found.shape == x.shape and (_scales(found, x) or _scales(found, x - x.mean(-1, keepdim=True))):
            return norm
    return None


def _scales(found: Tensor, x: Tensor) -> bool:
    """Whether these are the same numbers, brought to a mean square of one."""
    return bool((found - x / x.square().mean(-1, keepdim=True).sqrt()).abs().max() < _ROOM)

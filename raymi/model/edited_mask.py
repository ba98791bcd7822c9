"""Cutting edges by editing the mask that an attention module is given.

The way in for families that do not dispatch their attention (GPT-J, Falcon, BLOOM, ...), and an independent second
opinion on those that do: with it, a family's own eager function computes the ablation.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from raymi.model.attention import Cut, Tap, UnsupportedAttention
from raymi.model.sites import hidden_input


def masks_of(module: nn.Module) -> list[Tensor]:
    """Masks that an attention keeps beside the one that it is given: bool, [1, 1, T, T], True where it may attend."""
    return [b for b in module.buffers() if b.dtype == torch.bool and b.dim() == 4 and b.shape[2] == b.shape[3] > 1]


@contextmanager
def edited_masks(
    tap: Tap, attention: Mapping[int, nn.Module], z: Mapping[int, nn.Module] | None, n_heads: Callable[[int], int]
) -> Iterator[None]:
    """While inside, every layer of `tap.cuts` loses its edges in whatever forward runs.

    Args:
        tap: what to cut; firings and empty lines are counted on it.
        attention: layer -> the module whose `attention_mask` is edited.
        z: layer -> its output projection, where a line left without keys is made zero; None: the tap sees to it.
        n_heads: layer -> its query heads.

    Raises:
        UnsupportedAttention: during the forward, when a module is given no mask to edit.
    """
    with ExitStack() as stack:
        for layer, cut in tap.cuts.items():
            edit = _Edit(tap, layer, cut, n_heads(layer), z is None or layer in z)
            stack.callback(attention[layer].register_forward_pre_hook(edit.mask, with_kwargs=True).remove)
            if z is not None and layer in z:
                stack.callback(z[layer].register_forward_pre_hook(edit.z).remove)
        yield


@contextmanager
def seen_through() -> Iterator[None]:
    """While inside, what a family's own eager attention gives passes by its module's tap (`Tap.pass_z`)."""
    given = AttentionInterface.get_interface

    def get_interface(
        self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]
    ) -> Callable[..., Any]:
        own = given(self, attn_implementation, default)

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            out_BQHD, *rest = own(module, *args, **kwargs)
            tap = module.__dict__.get("_raymi_tap")
            if isinstance(tap, Tap):
                out_BQHD = tap.pass_z(int(module.layer_idx), out_BQHD)  # pyright: ignore[reportArgumentType]
            return (out_BQHD, *rest)

        return call

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = given


class _Edit:
    def __init__(self, tap: Tap, layer: int, cut: Cut, n_heads: int, has_z: bool) -> None:
        self.tap, self.layer, self.cut, self.n_heads, self.has_z = tap, layer, cut, n_heads, has_z
        self.dead_3N: Tensor | None = None

    def mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = bound.arguments.get("attention_mask")
        if not isinstance(given, Tensor) or given.dim() != 4:
            raise UnsupportedAttention(f"{type(module).__name__} is given no attention mask that could be edited")
        cut = self.cut
        n_rows = len(hidden_input(args, kwargs))
        mask_BHQS = given.expand(n_rows, self.n_heads, -1, -1).clone()
        edges = (cut.row_E, cut.head_E, cut.query_E, cut.key_E)
        if mask_BHQS.dtype == torch.bool:
            # Every query may see itself, so the first entry says which of the two values means "may attend".
            attends = mask_BHQS[0, 0, 0, 0].clone()
            closed_E = mask_BHQS[edges] != attends
            mask_BHQS[edges] = ~attends
            open_NS = mask_BHQS[cut.line_3N.unbind()] == attends
        else:
            lowest = torch.finfo(mask_BHQS.dtype).min
            closed_E = mask_BHQS[edges] <= lowest / 2
            mask_BHQS[edges] = lowest
            open_NS = mask_BHQS[cut.line_3N.unbind()] > lowest / 2
        for buffer in masks_of(module):
            open_NS = open_NS & buffer[0, 0, cut.line_3N[2], : open_NS.shape[-1]].to(open_NS.device)
        dead_N = ~open_NS.any(-1)
        self.dead_3N = self.tap.dead[self.layer] = cut.line_3N[:, dead_N]
        if not self.has_z and bool(dead_N.any()):
            raise UnsupportedAttention(
                f"{type(module).__name__}: a line without keys, and no output that could be zeroed"
            )
        for buffer in masks_of(module):
            closed_E |= ~buffer[0, 0, cut.query_E, cut.key_E].to(closed_E.device)
        self.tap.count(cut, closed_E, dead_N)
        bound.arguments["attention_mask"] = mask_BHQS
        return bound.args, bound.kwargs

    def z(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.dead_3N is None or not self.dead_3N.shape[1]:
            return args
        row, head, query = self.dead_3N
        z_BTHW = args[0].unflatten(-1, (self.n_heads, -1)).clone()
        z_BTHW[row, query, head] = 0.0
        return (z_BTHW.flatten(-2), *args[1:])

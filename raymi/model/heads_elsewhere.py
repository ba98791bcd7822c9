"""Where the heads' outputs stand side by side, found a second time and in another way, for second opinions.

Where a family calls raymi's attention function, what is changed at `attn.hook_z` is changed in what that gives. Here a
matrix inside the attention is looked for whose input is the heads' outputs, by cutting edges in the family's own eager
attention. A head that sees one key alone gives that key's value, whichever query looks, and one that sees two keys
gives something on the line between their values; all of it in that head's place and nowhere else. Behind a gate that
depends on the query, or a norm, none of this holds; nor with a sink, which takes some of the attention away.

Legend: B rows, T positions, H heads, W head width.
"""

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from raymi.model.hooked import HookedModel
from raymi.model.interventions import Mask
from raymi.model.side_by_side import only_there
from raymi.model.sites import NoSuchPlace, hidden_input

_FEWEST = 4
"""Tokens."""
_ROWS = 4
"""Of each head that is tried."""


def z_module(model: HookedModel, ids_1T: Tensor, layer: int) -> nn.Module | None:
    """The matrix of a layer's attention that is fed with the heads' outputs as they are; None where none is proven."""
    attention, n_tokens, n_heads = model.blocks[layer].attention, ids_1T.shape[1], model.heads(layer)
    if attention is None or n_tokens < _FEWEST:
        return None
    # The first, the last, and one in between, which another order of heads would move.
    heads = list(dict.fromkeys((0, min(1, n_heads - 1), n_heads - 1)))
    last, one, other = n_tokens - 1, n_tokens - 3, n_tokens - 2
    tried = [(last, (one,)), (last, (other,)), (last, (one, other)), (last - 1, (one,))]
    cuts = [(), *((_only(layer, head, query, keys),) for head in heads for query, keys in tried)]
    given: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with suppress(NoSuchPlace):
            given[module] = hidden_input(args, kwargs).detach()

    with ExitStack() as stack:
        for module in attention.modules():
            if next(module.children(), None) is None and any(
                each.dim() == 2 for each in module.parameters(recurse=False)
            ):
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        model.forward(ids_1T.expand(len(cuts), -1), cuts, own_attention=True)
    fitting = [m for m, x in given.items() if _are_heads(x, heads, len(cuts), n_tokens, n_heads)]
    return fitting[0] if len(fitting) == 1 else None


def _only(layer: int, head: int, query: int, keys: tuple[int, ...]) -> Mask:
    return Mask(layer, (head,), tuple((query, key) for key in range(query + 1) if key not in keys))


def _are_heads(x: Tensor, heads: list[int], n_rows: int, n_tokens: int, n_heads: int) -> bool:
    if x.numel() % (n_rows * n_tokens * n_heads) or not x.is_floating_point():
        return False
    z_BTHW = x.reshape(n_rows, n_tokens, n_heads, -1)
    room = 16 * torch.finfo(x.dtype).eps
    for i, head in enumerate(heads):
        first = 1 + _ROWS * i
        if not all(only_there(x.float(), row, n_rows, n_tokens, n_heads, head) for row in range(first, first + 3)):
            return False
        a, b, both = (z_BTHW[row, -1, head].double() for row in range(first, first + 3))
        again = z_BTHW[first + 3, -2, head].double()
        scale, line = float(torch.stack([a, b]).abs().max()), a - b
        share = float((both - b) @ line / line.square().sum())
        off = max(float((again - a).abs().max()), float((both - b - share * line).abs().max()))
        if not off <= room * scale < float(line.abs().max()) or not 0 < share < 1:
            return False
    return True

"""Proof of where the heads' outputs stand side by side, in families that compute their attention themselves.

Where a family calls raymi's attention function, they are what that gives. Elsewhere a matrix is taken for the output
projection, and its input for the heads' outputs: they are if cutting one head of a layer changes, in that layer, just
that head's part of it, at just that query.

Legend: L layers, T positions, H heads, W head width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raymi.model import memory
from raymi.model.interventions import Mask
from raymi.model.sites import hidden_input

if TYPE_CHECKING:
    from raymi.model.hooked import HookedModel

ELSEWHERE = 0.05
"""What may change elsewhere, as a part of what changes in the head's place: rows of a batch can differ by rounding."""


def let_go_of_z(model: "HookedModel") -> None:
    """Takes back, in every layer, what only seemed to be where the heads' outputs stand side by side."""
    seemed = {layer: block.z for layer, block in enumerate(model.blocks) if block.z is not None}
    ids_1T = model.probe_ids()

    def run(cuts: Sequence[Sequence[Mask]]) -> None:
        with model.armed(cuts, ids_1T.shape[1]):
            model.run(ids_1T.expand(len(cuts), -1))

    try:
        proven = heads_stand_there(seemed, model.heads, ids_1T.shape[1], run)
    except Exception as error:  # code that does not bear its masks to be edited is refused where that is measured
        if memory.is_out_of_memory(error):
            raise
        proven = set[int]()
    for layer in seemed.keys() - proven:
        model.blocks[layer].z = None


def heads_stand_there(
    projections: Mapping[int, nn.Module],
    n_heads: Callable[[int], int],
    n_tokens: int,
    run: Callable[[Sequence[Sequence[Mask]]], object],
) -> set[int]:
    """The layers of whose projections it is true.

    Args:
        projections: layer -> the matrix whose input may be the heads' outputs.
        n_heads: layer -> its query heads.
        n_tokens: length of the prompt that is run.
        run: runs one prompt in a batch of rows, each with what is cut in it.
    """
    layers, last = list(projections), n_tokens - 1
    proven = set(layers)
    # The first, the last, and one in between, which another order of grouped heads would move.
    for of in (lambda layer: 0, lambda layer: min(1, n_heads(layer) - 1), lambda layer: n_heads(layer) - 1):
        # Row 0 is clean; in each of the others another layer is cut, so that below it nothing has changed.
        cuts = [(), *((Mask(layer, (of(layer),), ((last, last - 1),)),) for layer in layers)]
        given: dict[int, Tensor] = {}

        def note(layer: int, given: dict[int, Tensor] = given) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given[layer] = hidden_input(args, kwargs).detach().float()

            return hook

        with ExitStack() as stack:
            for layer, module in projections.items():
                stack.callback(module.register_forward_pre_hook(note(layer), with_kwargs=True).remove)
            run(cuts)
        for row, layer in enumerate(layers, start=1):
            if layer not in given or not only_there(given[layer], row, len(cuts), n_tokens, n_heads(layer), of(layer)):
                proven.discard(layer)
    return proven


def only_there(given: Tensor, row: int, n_rows: int, n_tokens: int, n_heads: int, head: int) -> bool:
    if given.numel() % (n_rows * n_tokens * n_heads):
        return False
    z_BTHW = given.reshape(n_rows, n_tokens, n_heads, -1)
    change_THW = (z_BTHW[row] - z_BTHW[0]).abs()
    there = float(change_THW[-1, head].max())
    change_THW[-1, head] = 0.0
    return there > 0 and bool(torch.isfinite(change_THW).all()) and float(change_THW.max()) <= ELSEWHERE * there

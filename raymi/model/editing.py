"""Changing activations at the sites of a block, by hooks on its modules.

Legend: B rows, T positions, D hidden size, H heads, W head width, E entries: one (row, position) or, at z, one
(row, position, head).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raymi.model.attention import FEW, Tap
from raymi.model.interventions import Edit
from raymi.model.sites import Block, NoSuchPlace, first_tensor, hidden_input


@dataclass(slots=True)
class SiteEdits:
    """All that is done at one site of one layer in one forward.

    Edits of one row at one place are applied in the order in which they were given: `rounds`, each without a place
    that occurs twice.
    """

    tap: Tap
    n_heads: int
    by_head: bool
    start: int
    """The first position that is computed."""
    n_positions: int
    """How many are."""
    rounds: list[list[tuple[int, Edit]]] = field(default_factory=list[list[tuple[int, Edit]]])

    def append(self, row: int, edit: Edit) -> int:
        """Take in an edit of a row; returns how many entries it changes."""
        for of_round in self.rounds:
            if all(other != row for other, _ in of_round):
                of_round.append((row, edit))
                break
        else:
            self.rounds.append([(row, edit)])
        return self._n_places(edit)

    def apply(self, x_BTD: Tensor) -> Tensor:
        """The activation with everything done to it; a new tensor."""
        shaped = x_BTD.unflatten(-1, (self.n_heads, -1)) if self.by_head else x_BTD
        shaped = shaped.clone()
        for of_round in self.rounds:
            self._apply(shaped, of_round)
        return shaped.flatten(-2) if self.by_head else shaped

    def _n_places(self, edit: Edit) -> int:
        return len(edit.positions) * (len(self._heads(edit)) if self.by_head else 1)

    def _heads(self, edit: Edit) -> tuple[int, ...]:
        return tuple(range(self.n_heads)) if edit.heads is None else edit.heads

    def _apply(self, x: Tensor, edits: list[tuple[int, Edit]]) -> None:
        places = self._places(edits)
        index = places.to(x.device)
        where = tuple(index.unbind(1))
        new = torch.cat([self._shift(edit, len(self._heads(edit)) if self.by_head else 1, x) for _, edit in edits])
        # A factor of 0 must make even an infinity vanish; and what is only replaced need not be read.
        if any(edit.factor != 0 for _, edit in edits):
            n_places = torch.tensor([self._n_places(edit) for _, edit in edits])
            factor_E = torch.tensor([edit.factor for _, edit in edits], dtype=x.dtype).repeat_interleave(n_places)
            factor_E1 = factor_E.to(x.device)[:, None]
            new += torch.where(factor_E1 == 0, torch.zeros_like(factor_E1), x[where] * factor_E1)
        x[where] = new
        assert self.tap.fired_B is not None
        # Counted where the prompt is, which on several devices need not be where the layer is.
        row_E = (index if index.device == self.tap.fired_B.device else places)[:, 0].to(self.tap.fired_B.device)
        self.tap.fired_B.index_add_(0, row_E, torch.ones_like(row_E))

    def _places(self, edits: list[tuple[int, Edit]]) -> Tensor:
        """(row, position) or, at z, (row, position, head) of every entry, in the order of the edits."""
        if all(len(edit.positions) <= FEW for _, edit in edits):
            return torch.tensor(
                [
                    (row, position - self.start, *head)
                    for row, edit in edits
                    for position in edit.positions
                    for head in ([(head,) for head in self._heads(edit)] if self.by_head else [()])
                ]
            )
        parts: list[Tensor] = []
        for row, edit in edits:
            axes = [torch.tensor([row]), torch.tensor(edit.positions) - self.start]
            parts.append(torch.cartesian_prod(*axes, *([torch.tensor(self._heads(edit))] if self.by_head else [])))
        return torch.cat(parts)

    def _shift(self, edit: Edit, n_heads: int, x: Tensor) -> Tensor:
        width, n = x.shape[-1], len(edit.positions)
        if edit.shift is None:
            return x.new_zeros(n * n_heads, width)
        shape = (n, n_heads, width) if self.by_head else (n, width)
        return fitted(edit, edit.shift.to(x), shape).reshape(-1, width)

    def on_heads(self, z_BQHD: Tensor) -> Tensor:
        """What an attention gives, head by head, with everything done to it."""
        return self.apply(z_BQHD.flatten(-2)).view(z_BQHD.shape)

    # -- as hooks ----------------------------------------------------------------------------------------------------

    def on_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        changed = self.apply(hidden_input(args, kwargs))
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    def on_output(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        x = first_tensor(output)
        # Some families flatten rows and positions in front of their experts.
        changed = self.apply(x.reshape(-1, self.n_positions, x.shape[-1])).view(x.shape)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])


def fitted(edit: Edit, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An edit's value as a view of this shape; NoSuchPlace when it does not fit."""
    try:
        return value.broadcast_to(shape)
    except RuntimeError:
        raise NoSuchPlace(
            f"a value of shape {list(value.shape)} does not fit blocks.{edit.layer}.{edit.site}, "
            f"which takes {list(shape)}"
        ) from None


def place(block: Block, site: str) -> tuple[nn.Module, bool]:
    """The module whose input (True) or output (False) a site is.

    Raises:
        NoSuchPlace: when this block has no such site, or it cannot be changed.
    """
    places: dict[str, tuple[nn.Module | None, bool]] = {
        "hook_resid_pre": (block.resid, True),
        "hook_resid_mid": (block.resid_mid, True),
        "hook_resid_post": (block.resid, False),
        "hook_attn_out": (block.attn_out, False),
        "hook_mlp_out": (block.mlp_out, False),
        "attn.hook_out": (block.attn_module, False),
        "mlp.hook_out": (block.mlp_module, False),
        "attn.hook_z": (block.z, True),
        "mlp.hook_in": (block.mlp_in, True),
        "ln2.hook_normalized": (block.norm and block.norm.module, True),
    }
    module, is_input = places[site]
    if module is None and block.resid is None:
        raise NoSuchPlace(f"no {site}: what its layers hand on is not one residual stream")
    if module is None and site == "attn.hook_z" and block.attn_out is not None:
        raise NoSuchPlace(f"no {site}: its heads' outputs are not side by side anywhere")
    if module is None:
        raise NoSuchPlace(f"no {site}: {block.why or block.reasons.get(site, 'it was not found')}")
    return module, is_input

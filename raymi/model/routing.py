"""Which experts a model chooses, watched, and held to what another forward has chosen.

A router takes the largest few of its scores. Where two are nearly equal, rounding decides, and a token goes to another
expert: a jump that is no mistake. Whoever compares two forwards of such a model in half precision can tell jumps from
mistakes by letting both choose alike. Nothing is known of families: what is watched is `topk` over the last dimension,
once for each row and position, while a decoder layer runs (indexers of sparse attention choose in the same way), and
the `max` of a matrix with a line for each of them, which is how some take one expert at a time.

Legend: B rows, T positions, S the last of them, K choices.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raymi.model.hooked import HookedModel
from raymi.model.sites import hidden_input

Choices = Mapping[tuple[int, int], Tensor]
"""(layer, which of its choices) -> what one row chose, [T, ..., K]."""

_TOPK, _MAX = (torch.topk, Tensor.topk), (torch.max, Tensor.max)


class _Routing(TorchFunctionMode):
    def __init__(self, follow: Sequence[Choices | None]) -> None:
        super().__init__()
        self.follow = follow
        self.chosen: dict[tuple[int, int], Tensor] = {}
        """(layer, which of its choices) -> [B, S, ..., K]."""
        self.layer: int | None = None
        self.shape, self.times = torch.Size(), 0

    def enter(self, layer: int, shape: torch.Size) -> None:
        self.layer, self.shape, self.times = layer, shape, 0

    def leave(self) -> None:
        self.layer = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.layer is None or not args or not isinstance(found, tuple):
            return found
        chooses = func in _TOPK or (func in _MAX and args[0].dim() == 2)
        return self._choice(args[0], found) if chooses else found

    def _choice(self, scores: Tensor, found: Any) -> Any:
        values, indices = found
        n_rows, n_positions = self.shape
        apart = scores.shape[:2] == self.shape
        if (
            indices.dim() != scores.dim()
            or indices.shape[:-1] != scores.shape[:-1]
            or not (apart or len(scores) == n_rows * n_positions)
        ):
            return found  # over something else than each token's own scores
        chosen = indices if apart else indices.unflatten(0, self.shape)
        key, self.times = (self.layer or 0, self.times), self.times + 1
        if any(self.follow):
            held = chosen.clone()
            for row, its in enumerate(self.follow[:n_rows]):
                if its and key in its and its[key][-n_positions:].shape == held[row].shape:
                    held[row] = its[key][-n_positions:]
            chosen, indices = held, held.reshape(indices.shape)
            values = scores.gather(-1, indices)
        self.chosen[key] = chosen
        return type(found)((values, indices))


class Watched:
    """What was chosen in a forward. A later one takes the place of it."""

    def __init__(self, mode: _Routing) -> None:
        self._mode = mode

    def of_row(self, row: int) -> Choices:
        return {key: chosen[row] for key, chosen in self._mode.chosen.items()}


@contextmanager
def routing(model: HookedModel, follow: Sequence[Choices | None] = ()) -> Iterator[Watched]:
    """While inside, choices of experts are watched.

    Args:
        model: the model.
        follow: for each row of the batch, what is chosen in it; rows without are free, and those beyond the end. Of a
            forward that computes the last positions only, these choices' last positions count.
    """
    mode = _Routing(follow)
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):

            def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
                mode.enter(layer, hidden_input(args, kwargs).shape[:2])

            # Behind all other hooks: rows may have joined.
            stack.callback(block.module.register_forward_hook(lambda *_: mode.leave()).remove)
            stack.callback(_last_hook(block.module, enter))
        stack.enter_context(mode)
        yield Watched(mode)


def _last_hook(module: nn.Module, enter: Any) -> Any:
    """Calls `enter` right before a module's own forward, whatever hooks are added to it meanwhile."""
    own = module.__dict__.get("forward")
    forward = module.forward

    def entering(*args: Any, **kwargs: Any) -> Any:
        enter(module, args, kwargs)
        return forward(*args, **kwargs)

    module.__dict__["forward"] = entering

    def undo() -> None:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own

    return undo


def flips(one: Choices, other: Choices) -> int:
    """How often a token's choice at a layer is another set in two forwards of the same positions."""
    shared = [(one[key], other[key]) for key in one.keys() & other.keys() if one[key].shape == other[key].shape]
    return sum(int((a.sort(-1).values != b.sort(-1).values).any(-1).sum()) for a, b in shared)

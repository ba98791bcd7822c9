"""Interventions as people write them, as a prompt of a model makes them mean something.

Negative positions count from the prompt's end. A value that was captured over a whole prompt stands for what was there
at the positions, and of the heads, that are changed.

Legend: D hidden size, H heads, T positions, W head width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from raymi.model.editing import fitted
from raymi.model.hooked import HookedModel
from raymi.model.interventions import BY_HEAD, Edit, Intervention, Mask
from raymi.model.sites import NoSuchPlace


def on_prompt(model: HookedModel, interventions: Iterable[Intervention], n_tokens: int) -> tuple[Intervention, ...]:
    """Interventions with all positions counted from 0, and values as they go into these; each found possible.

    Args:
        model: the model.
        interventions: what is done together.
        n_tokens: of the prompt that it is done to.

    Raises:
        NoSuchPlace: one names a site, layer, head or position that is not there, or its value does not fit there.
        ValueError: two of its positions turn out to be the same, or a key to come after its query.
    """
    counted = [_counted(model.name, one, n_tokens) for one in interventions]
    # Before anything is computed: the ways of measuring take it that every place is there.
    model.refuse_missing(counted, n_tokens)
    return tuple(_filled(model, one, n_tokens) for one in counted)


def _counted(name: str, one: Intervention, n_tokens: int) -> Intervention:
    def from_start(positions: Sequence[int]) -> tuple[int, ...]:
        if min(positions) < -n_tokens:
            raise NoSuchPlace(f"{name}: position {min(positions)}, where there are {-n_tokens} to {n_tokens - 1}")
        return tuple(at + n_tokens if at < 0 else at for at in positions)

    if isinstance(one, Edit):
        return replace(one, positions=from_start(one.positions)) if min(one.positions) < 0 else one
    if min(map(min, one.edges)) >= 0:
        return one
    return Mask(one.layer, one.heads, tuple((query, key) for query, key in map(from_start, one.edges)))


def _filled(model: HookedModel, one: Intervention, n_tokens: int) -> Intervention:
    if isinstance(one, Mask) or one.shift is None:
        return one
    value = _picked(model, one, one.shift, n_tokens) if one.captured else one.shift
    n = len(one.positions)
    if one.site == BY_HEAD:
        # How wide a head is here, only the run itself can tell.
        n_heads = model.heads(one.layer) if one.heads is None else len(one.heads)
        fitted(one, value, (n, n_heads, *value.shape[-1:]))
    else:
        fitted(one, value, (n, model.hidden_size))
    return replace(one, shift=value) if one.captured else one


def _picked(model: HookedModel, one: Edit, captured: Tensor, n_tokens: int) -> Tensor:
    """Of [1, T, D], or [1, T, H, W], what stood where the edit acts: [positions, D] or [positions, heads, W]."""
    place = f"blocks.{one.layer}.{one.site}"
    rows, length = captured.shape[:2]
    if rows != 1:
        raise NoSuchPlace(
            f"a value of shape {list(captured.shape)} was captured from {rows} prompts; {place} takes one: value[:1]"
        )
    if length != n_tokens:
        # Which of its positions stands for which of the prompt's, nobody can tell.
        raise NoSuchPlace(
            f"a value of shape {list(captured.shape)} was captured over {length} tokens, and the prompt has "
            f"{n_tokens}; choose what goes into positions {list(one.positions)} of {place}, such as value[0, [0]]"
        )
    at = captured[0, list(one.positions)]
    if one.site != BY_HEAD or one.heads is None:
        return at
    if at.shape[1] != model.heads(one.layer):
        raise NoSuchPlace(
            f"a value of shape {list(captured.shape)} is of {at.shape[1]} heads; {place} has {model.heads(one.layer)}"
        )
    return at[:, list(one.heads)]

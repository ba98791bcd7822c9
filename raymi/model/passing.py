"""Forwards of which parts are left out: layers that hand on what they are given, a backbone that has already run.

Legend: N rows, D hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from raymi.model.hooked import HookedModel
from raymi.model.linear import quick_products
from raymi.model.sites import hidden_input


class EnoughError(Exception):
    """Leaves a forward from within a hook: all that was wanted of it is there."""


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, a module's forward is another one, also where accelerate's hooks have given it one of its own."""
    names = module.__dict__
    own = names.get("forward")
    names["forward"] = forward
    try:
        yield
    finally:
        del names["forward"]
        if own is not None:
            names["forward"] = own


def passing_on(beside: int | None) -> Callable[..., Any]:
    """What a layer that is left out does instead: it returns what it is given, in the form in which it would.

    Args:
        beside: how many things it returns beside its hidden states; None where it returns no tuple.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_input(args, kwargs)
        return hidden if beside is None else (hidden, *[None] * beside)

    return forward


def returned_beside(output: Any) -> int | None:
    """How many things a layer returned beside its hidden states; None where it returned no tuple."""
    return len(output) - 1 if isinstance(output, tuple) else None


def with_hidden(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with other hidden states in the place of its own."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def unembed(model: HookedModel, hidden_ND: Tensor, ids_11: Tensor, returned: Any) -> Tensor:
    """Logits by whatever a model does behind its last layer.

    Args:
        model: the model.
        hidden_ND: hidden states behind its last layer.
        ids_11: any token id: what stands before the last layer is not computed.
        returned: what its backbone has returned in a forward.

    Returns:
        [N, V] float32.
    """
    given = copy.copy(returned)
    given.last_hidden_state = hidden_ND[:, None]
    with standing_in(model.backbone, lambda *_, **__: given), quick_products(model.linears):
        return model.run(ids_11)

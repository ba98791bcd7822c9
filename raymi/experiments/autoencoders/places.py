"""Whether a loaded model's places are what the plan took them for, by what stands there in one short forward."""

from collections.abc import Iterable

import torch

from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.model.hooked import HookedModel
from raymi.model.sites import NoSuchPlace, UnknownSite

_PROBE = 4
"""Tokens."""


def confirm_places(model: HookedModel, refs: Iterable[SaeRef]) -> None:
    """Checks that a module's output is what is added to the residual stream, where the plan said so.

    Args:
        model: as it was loaded.
        refs: the autoencoders of its experiments.

    Raises:
        UserError: an autoencoder would be fed something else than what it was trained on; names it and both places.
    """
    pairs = {(ref.written, ref.plain): ref for ref in refs if ref.plain is not None}
    for (taken, meant), ref in pairs.items():
        assert meant is not None
        ids_1T = torch.arange(1, 1 + _PROBE)[None] % model.vocab_size
        try:
            found = model.forward(ids_1T, capture=[taken, meant]).cache
        except (NoSuchPlace, UnknownSite):
            continue  # where there is no module of its own, its files mean none; what is read there fails by name
        if not torch.equal(found[taken], found[meant]):
            raise UserError(
                f"{ref.name}: its files mean what a module itself gives, {meant}, and in {model.name} that is not what "
                f"is added to the residual stream, {taken}",
                hint=f"Name the SAE with `{'site_out' if ref.site_out else 'site'}: {meant}`.",
            )

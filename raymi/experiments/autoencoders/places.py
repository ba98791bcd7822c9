"""Whether a loaded model is what the plan took it for, by what stands at its places in a few short forwards."""

from collections.abc import Iterable

import torch

from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.model.hooked import HookedModel
from raymi.model.interventions import add
from raymi.model.sites import NoSuchPlace, UnknownSite

_PROBE = 4
"""Tokens."""
_SEEN = 0.2
"""Of the logits' scale: a stream whose mean is moved by twice its spread moves them by more than this where norms see
the mean, and otherwise by what rounding makes of it."""


def confirm_places(model: HookedModel, refs: Iterable[SaeRef]) -> None:
    """Checks what the plan said of a model: that a module's output is what is added to the residual stream, and that
    its weights can be centred, since no norm sees the mean of the stream.

    Args:
        model: as it was loaded.
        refs: the autoencoders of its experiments.

    Raises:
        UserError: an autoencoder would be fed something else than what it was trained on; names it and both places.
    """
    refs = list(refs)
    centred = next((ref for ref in refs if ref.centred), None)
    if centred is not None and sees_mean(model):
        raise UserError(
            f"{centred.name}: its files say that it was trained on {model.name} with centred weights, which has norms "
            "that see the mean: there TransformerLens centres nothing",
            hint="Its config.json does not say that these are RMS norms; with an `rms_norm_eps` in it they are known.",
        )
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


def sees_mean(model: HookedModel) -> bool:
    """Whether what a model says depends on the mean of its residual stream over the width."""
    ids_1T = torch.arange(1, 1 + _PROBE)[None] % model.vocab_size
    site = "hook_resid_pre"
    clean = model.forward(ids_1T, capture=[f"blocks.0.{site}"])
    by = 2 * clean.cache[f"blocks.0.{site}"].float().std() * torch.ones(model.hidden_size, device=model.device)
    moved = model.forward(ids_1T, [[add(0, site, tuple(range(_PROBE)), by)]])
    here, there = (out.logits_BV - out.logits_BV.mean(-1, keepdim=True) for out in (clean, moved))
    return float((there - here).abs().max()) > _SEEN * float(here.abs().max())

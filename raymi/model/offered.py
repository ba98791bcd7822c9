"""Which sites a model has, and which of them can be changed."""

from contextlib import ExitStack

import torch

from raymi.model.hooked import HookedModel
from raymi.model.interventions import EDITABLE, Edit
from raymi.model.sites import NAMES, NoSuchPlace, Site


def offered(model: HookedModel) -> list[tuple[Site, bool]]:
    """All that can be captured, the embedding first, then layer by layer; with each, whether it can be changed."""
    of_layers = [Site(layer, name) for layer in range(model.n_layers) for name in NAMES]
    return [(site, _changes(model, site)) for site in [Site(None, "hook_embed"), *of_layers] if _has(model, site)]


def _has(model: HookedModel, site: Site) -> bool:
    """Whether it is found when it is asked for; nothing is run."""
    try:
        with ExitStack() as stack:
            model.watch([site], torch.Size((1, 1)), stack)
    except NoSuchPlace:
        return False
    finally:
        model.tap.captures.clear()
    return True


def _changes(model: HookedModel, site: Site) -> bool:
    if site.layer is None or site.name not in EDITABLE:
        return False
    try:
        model.refuse_missing([Edit(site.layer, site.name, (0,), None, 0.0, None)], 1)
    except NoSuchPlace:
        return False
    return True

"""Where in a model an autoencoder's files mean, when they name modules of it. No torch: plans are made without it.

sparsify and dictionary_learning train on what a module gives. Where the model adds that to the residual stream as it
stands, it is `hook_mlp_out` or `hook_attn_out`; where a norm or a factor comes between, it is `mlp.hook_out` or
`attn.hook_out`. Which of the two is judged by the names of a model's tensors and the numbers of its config, and
confirmed when it is loaded.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from raymi import snapshot
from raymi.catalog import CachedModel
from raymi.sae.description import Description
from raymi.snapshot import DamagedError

_OF_MODULE = {"hook_mlp_out": "mlp.hook_out", "hook_attn_out": "attn.hook_out"}
_BEHIND = re.compile(
    r"[._](post_?(feed_?forward|ff|ffw|ffn|mlp|moe|self_attn|self_attention|attn)_?\w*norm\w*"
    r"|(ffn|ff|mlp|attn|attention)_post_norm|layer_?scale\w*|layer_scalar)(\.|$)"
)
"""Norms and factors behind a module. `post_attention_layernorm` is none: most families call the MLP's own norm so."""
_FACTORS = re.compile(
    r"residual_multiplier|residual_scale|scale_depth|mlp_multipliers?|attention_out_multiplier|"
    r"mlp_out_multiplier|resid(ual)?_(pdrop_)?scal\w+"
)
"""Numbers of a config that a module's output is multiplied with."""

_Z_MOVED = frozenset(
    (
        *("afmoe", "bailing_hybrid", "beam", "bert", "bert-generation", "bitnet", "camembert", "data2vec-text"),
        *("electra", "ernie", "jetmoe", "laguna", "lfm3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
        *("qwen3_5_text", "qwen3_next", "roberta", "roberta-prelayernorm", "roc_bert", "xlm-roberta"),
        *("xlm-roberta-xl", "xmod"),
    )
)
"""Families of which `attn.hook_z` was once taken to be something else: their values, or what a gate or norm makes."""


def in_model(about: Description, model: CachedModel) -> Description:
    """The same with sites as this model has them."""
    if not about.of_modules or not something_behind(model):
        return about
    return replace(about, site=_own(about.site), site_out=_own(about.site_out))


def meant(about: Description) -> str | None:
    """The module's own output that an autoencoder writes by another name; None where its files mean no module."""
    own = _own(about.site_out or about.site) if about.of_modules else None
    return own if own != (about.site_out or about.site) else None


def z_moved(about: Description, model: CachedModel) -> bool:
    """Whether an older raymi fed it something else in this model, under the same name of a site."""
    named = {config_of(model).get("model_type"), model.model_type}
    return any((site or "").endswith(".attn.hook_z") for site in (about.site, about.site_out)) and bool(
        named & _Z_MOVED
    )


def something_behind(model: CachedModel) -> bool:
    """Whether norms or factors seem to stand between a model's modules and its residual stream."""
    config = config_of(model)
    factors = (value for key, value in config.items() if _FACTORS.fullmatch(key))
    if any(value not in (None, 1, 1.0, [1.0, 1.0]) for value in factors):
        return True
    return any(_has_norms_behind(model.path / name) for name in model.weight_files)


def config_of(model: CachedModel) -> Mapping[str, Any]:
    """What its config.json says of its text part, as one object; nothing where there is none."""
    try:
        config = snapshot.read_json(model.path / snapshot.CONFIG)
    except DamagedError:
        return {}
    inner = config.get("text_config")
    return {**config, **cast(Mapping[str, Any], inner)} if isinstance(inner, dict) else config


def has_rms_norms(model: CachedModel) -> bool:
    """Whether its norms are RMS norms, which see the mean of what they are given: its weights cannot be centred.

    A config.json may leave out what is its family's default. Some families name the norm otherwise, which a loaded
    model tells (`places.confirm_places`).
    """
    config = config_of(model)
    return any("rms" in key for key in config) or _rms_by_default(str(config.get("model_type") or model.model_type))


@lru_cache(maxsize=256)
def _rms_by_default(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING and any("rms" in name for name in dir(CONFIG_MAPPING[model_type]))


@lru_cache(maxsize=256)
def _has_norms_behind(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    try:
        return any(_BEHIND.search(name) for name in snapshot.safetensors_header(file))
    except DamagedError:
        return False


def _own(site: str | None) -> str | None:
    if site is None:
        return None
    block, _, name = site.rpartition(".")
    return f"{block}.{_OF_MODULE[name]}" if name in _OF_MODULE else site

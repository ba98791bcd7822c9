"""How many tokens a model's context has, where its config says that rotary positions are stretched. No torch."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

from raymi.snapshot import text_config

_STRETCHED = ("yarn", "dynamic")
"""Kinds of scaling by which a `factor` stands for what `max_position_embeddings` may leave out. By other kinds the
latter is what a model was made for (llama3, longrope), or it cannot be told (linear)."""


def context(config: Mapping[str, Any], stated: int | None) -> int | None:
    """The longest prompt in tokens.

    Args:
        config: the content of config.json.
        stated: its `max_position_embeddings`.
    """
    if stated is None:
        return None
    return max([stated, *_extended(config, stated)])


def _extended(config: Mapping[str, Any], stated: int) -> Iterator[int]:
    for scaling in _scalings(text_config(config)):
        kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
        if kind not in _STRETCHED or not isinstance(factor, int | float) or not math.isfinite(factor):
            continue
        # Where it is not said, what is stated is the length before.
        original = scaling.get("original_max_position_embeddings")
        yield int((original if type(original) is int else stated) * factor)


def _scalings(text: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Of a config, which may have one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = text.get(name)
        if isinstance(found, dict):
            its = cast(dict[str, Any], found)
            yield its
            yield from (cast(dict[str, Any], each) for each in its.values() if isinstance(each, dict))

"""How many heads each layer has, as a config says it in one of several ways. No torch."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from raymi.snapshot import LISTED_HEADS, MOST_COUNTED, NAMES, config_defaults, first_int, model_type, text_config


def heads_by_layer(config: Mapping[str, Any], n_layers: int | None, n_heads: int | None) -> tuple[int, ...] | None:
    """Query heads of each layer; None: `n_heads` everywhere, as far as the config tells.

    They stand in configs of single layers (`per_layer_config`), in a list, or under another name for the layers with a
    window, which the config of the family may state.
    """
    if n_layers is None or n_heads is None:
        return None
    text = text_config(config)
    defaults = config_defaults(model_type(config), model_type(text))
    # A field that the family's config class does not declare is one that its model does not read.
    stated = {
        **defaults,
        **{
            name: value
            for name, value in text.items()
            if not name.startswith("swa_") or not defaults or name in defaults
        },
    }
    found = [n_heads] * n_layers
    for name in LISTED_HEADS:
        match stated.get(name):
            case [*numbers] if len(numbers) == n_layers and all(type(number) is int for number in numbers):
                found = cast(list[int], numbers)
            case _:
                pass
    if (with_window := _heads_with_window(stated)) is not None:
        has_window = _has_window(stated)
        found = [with_window if has_window(layer) else found[layer] for layer in range(n_layers)]
    for layer, apart in _of_single_layers(stated):
        number = first_int(apart, NAMES["n_heads"])
        if number is not None and layer < n_layers:
            found[layer] = number
    # Loading tells of the heads that there are, where what is written is no number of heads.
    return None if set(found) == {n_heads} or max(found) > MOST_COUNTED else tuple(found)


def _heads_with_window(stated: Mapping[str, Any]) -> int | None:
    if "per_layer_config" in stated:  # what those of a layer with a window come to is written there
        return None
    match stated:
        case {"swa_num_attention_heads": int(number)} | {"num_sliding_attention_heads": int(number)}:
            return number
        case {"attention_other_setting": {"num_attention_heads": int(number)}}:
            return number
        case _:
            return None


def _has_window(stated: Mapping[str, Any]) -> Callable[[int], bool]:
    """What tells of a layer whether it looks back over a window only."""
    match stated:
        case {"layer_types": [_, *_] as kinds}:
            return lambda layer: "sliding" in str(kinds[layer % len(kinds)])
        case {"local_layer_ids": [*indices]}:
            return lambda layer: layer in indices
        case {"sliding_window_pattern": int(period)} if period > 0:
            return lambda layer: (layer + 1) % period != 0
        case {"hybrid_layer_pattern": [_, *_] as kinds}:
            return lambda layer: kinds[layer % len(kinds)] == 1
        case _:
            return lambda layer: (layer + 1) % 6 != 0  # what the families make of a config that does not say it


def _of_single_layers(stated: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """Layers that have a config of their own, with what is in it."""
    apart = stated.get("per_layer_config")
    items = cast(dict[object, Any], apart).items() if isinstance(apart, dict) else ()
    return [(int(str(layer)), own) for layer, own in items if str(layer).isdigit() and isinstance(own, dict)]

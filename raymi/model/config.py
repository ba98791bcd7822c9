"""What a model's config says of each of its layers.

Layers of one model may differ: transformers keeps what does in a config of each layer (`per_layer_config`) and refuses
to read it from the whole one; others list a number for each layer, or prefix the name of those with a window (`swa_`).
"""

from typing import Any, cast

REACHES = (
    *("sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size"),
    *("local_attention", "window_size"),
)
"""What configs call how far back a layer can look."""
HEADS = ("num_attention_heads_per_layer", "num_attention_heads", "num_query_heads")
"""What configs call query heads."""


def of_layers(config: object, n_layers: int, *names: str) -> list[int | None]:
    """For each layer, the first of these fields that is a whole number there; None where none is."""
    given = cast(Any, config)
    apart: bool = getattr(given, "is_heterogeneous", False)
    layers = [given.per_layer_config[layer] if apart else given for layer in range(n_layers)]
    return [_first(layers[layer], layer, n_layers, names) for layer in range(n_layers)]


def values(config: object, n_layers: int, *names: str) -> list[int]:
    """What any layer has of any of these fields, ascending."""
    return sorted({value for name in names for value in of_layers(config, n_layers, name) if value is not None})


def whole(config: object, name: str) -> Any:
    """A field of the whole config, whether or not layers have another of their own; None where there is none."""
    given = cast(Any, config)
    if getattr(given, "is_heterogeneous", False):
        return given._getattr_without_heterogeneous_validation(name, None)
    return getattr(given, name, None)


def _first(of_layer: object, layer: int, n_layers: int, names: tuple[str, ...]) -> int | None:
    for name in names:
        value: object = getattr(of_layer, name, None)
        if isinstance(value, list | tuple) and len(cast(list[object], value)) == n_layers:
            value = cast(list[object], value)[layer]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None

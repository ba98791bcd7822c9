"""Which layers of a model are alike."""

from typing import cast

from raymi.model.config import REACHES, of_layers, whole
from raymi.model.hooked import HookedModel


def layer_kinds(model: HookedModel) -> list[tuple[object, ...]]:
    """Of every layer, what tells it from others: its modules, heads, widths, kind, and how far it looks back."""
    config = model.model.config.get_text_config()
    named: object = whole(config, "layer_types")
    kinds = cast(list[object], named) if isinstance(named, list) else []
    reaches = [of_layers(config, model.n_layers, name) for name in REACHES]
    return [
        (
            type(block.module),
            type(block.attention),
            getattr(block.attention, "sliding_window", None),
            model.heads(layer) if block.attention is not None else None,
            model.head_shapes.get(layer),
            kinds[layer] if layer < len(kinds) else None,
            *(reach[layer] for reach in reaches),
        )
        for layer, block in enumerate(model.blocks)
    ]

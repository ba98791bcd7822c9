"""What a model is made of, from its config and from what its attention is called with: heads, sizes, masks."""

from collections.abc import Mapping, Sequence

from torch import nn

from raymi.heads import Heads
from raymi.model.attention import HeadShape
from raymi.model.config import HEADS, REACHES, of_layers, values, whole
from raymi.model.edited_mask import masks_of
from raymi.model.sites import NoSuchPlace
from raymi.model.sizes import Shape

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
"""What configs call how wide an MLP is."""


def usual_heads(config: object, name: str) -> int:
    """Query heads of the model, as its config says for the whole of it (of the first layer, where it only lists them).

    Raises:
        NoSuchPlace: there are none.
    """
    n_heads = whole(config, "num_attention_heads")
    if n_heads is None or isinstance(n_heads, list):
        n_heads = of_layers(config, whole(config, "num_hidden_layers") or 1, *HEADS)[0] or n_heads
    if not isinstance(n_heads, int):
        raise NoSuchPlace(f"{name} has no attention heads: its config gives num_attention_heads as {n_heads}")
    return n_heads


def heads_by_layer(
    config: object, n_layers: int, usual: int, shapes: Mapping[int, HeadShape]
) -> tuple[int, ...] | None:
    """Query heads of each layer, None where all have the usual number: those of `shapes`, else what the config says."""
    said = of_layers(config, n_layers, *HEADS)
    found = [shapes[layer].n_heads if layer in shapes else said[layer] or usual for layer in range(n_layers)]
    return None if set(found) == {usual} else tuple(found)


def largest(
    config: object,
    heads: Heads,
    shapes: Mapping[int, HeadShape],
    *,
    hidden_size: int,
    vocab_size: int,
    itemsize: int,
    n_layers: int,
) -> Shape:
    """The most of everything that any layer has: what memory is counted with."""
    widths = (found[-1] for name in _INNER if (found := values(config, n_layers, name)))
    n_heads = max(heads.by_layer or (heads.usual,))
    width = max(values(config, n_layers, "head_dim"), default=hidden_size // n_heads)
    n_key_heads = max(values(config, n_layers, "num_key_value_heads"), default=n_heads)
    keys = [shape.n_key_heads * max(shape.width, shape.value_width) for shape in shapes.values()]
    return Shape(
        n_heads=n_heads,
        hidden_size=hidden_size,
        intermediate_size=next(widths, 4 * hidden_size),
        vocab_size=vocab_size,
        itemsize=itemsize,
        n_layers=n_layers,
        key_width=max([n_key_heads * width, *keys]),
    )


def shows_its_masks(config: object, n_layers: int, attention: Sequence[nn.Module]) -> bool:
    """Whether a family that computes its attention itself has no window, or has it in masks that can be seen."""
    return not any(values(config, n_layers, name) for name in REACHES) or all(map(masks_of, attention))

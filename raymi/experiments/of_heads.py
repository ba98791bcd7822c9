"""Experiments that name layers and heads of a model: what they come to mean on one, and whether it has them."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.axes import Axis, Head, Layer, Window
from raymi.experiments.kind import Spec
from raymi.heads import Heads, as_heads


def _all_heads_together(value: object) -> object:
    return {"together": ["all"]} if value == "all" else value


class OfHeads(Spec):
    """An experiment on heads of a model's attention."""

    layers: Axis[Layer]
    """Of a model in which only some layers have attention, `all` and windows mean those alone, as if there were no
    others; `middle` and fractions of depth mean the next layer that has it (the last that has, where none follows); an
    index of a layer that has none is an error."""
    heads: Annotated[Axis[Head], BeforeValidator(_all_heads_together)] = Axis[Head](together=("all",))

    def check(self, model: CachedModel) -> None:
        check(self, *shape(model))

    def confirm(self, model: CachedModel, attention_layers: Sequence[int], heads: Heads | None) -> None:
        confirm_layers(self, model.n_layers or 0, model.attention_layers, attention_layers)
        if heads is not None and model.heads is not None:
            confirm_heads(self, model.n_layers or 0, attention_layers, model.heads, heads)


def shape(model: CachedModel) -> tuple[int, Heads, tuple[int, ...] | None]:
    """Its layers, their heads, and which layers have attention (None: all)."""
    if model.n_layers is None or model.heads is None:
        raise UserError(f"{model.id}: its config.json does not say how many layers and heads it has")
    return model.n_layers, model.heads, model.attention_layers


def check(spec: OfHeads, n_layers: int, heads: int | Heads, attention: Sequence[int] | None = None) -> None:
    """Whether a model of so many layers and heads has what the experiment names; UserError with what it has not.

    `attention` is the layers that have attention, ascending; None: all.
    """
    layers_and_heads(spec, n_layers, as_heads(heads), attention)


def confirm_layers(spec: OfHeads, n_layers: int, planned: Sequence[int] | None, found: Sequence[int]) -> None:
    """Whether the experiment cuts the same layers of the loaded model as it was planned to.

    Args:
        spec: the experiment.
        n_layers: how many layers the model has.
        planned: those that have attention, ascending, as its config.json was understood; None: all.
        found: those that have attention.

    Raises:
        UserError: it would cut where nothing is, or leave something out.
    """
    if _layer_groups(spec, n_layers, planned) != _layer_groups(spec, n_layers, found):
        understood = "all layers" if planned is None else f"layers {_listed(planned)}"
        # By index, too, only layers can be named that the config.json is understood to give attention.
        if planned is None or set(found) <= set(planned):
            hint = "Name layers by index in an experiment for this model."
        else:
            hint = "Not all of them can be named, even by index: please report it to raymi with the config.json."
        raise UserError(
            f"experiment {spec.name!r}: layers: config.json was understood to say that {understood} have attention, "
            f"but in the loaded model it is layers {_listed(found)} that have",
            hint=hint,
        )


def confirm_heads(spec: OfHeads, n_layers: int, attention: Sequence[int], planned: Heads, found: Heads) -> None:
    """Whether the layers that the experiment cuts have as many heads as it was planned with.

    Args:
        spec: the experiment.
        n_layers: how many layers the model has.
        attention: those that have attention, ascending.
        planned: heads as its config.json was understood.
        found: heads of the loaded model.

    Raises:
        UserError: a layer has others.
    """
    cut = {layer for group in _layer_groups(spec, n_layers, attention) for layer in group}
    wrong = [layer for layer in sorted(cut) if planned.of(layer) != found.of(layer)]
    if wrong:
        layer = wrong[0]
        raise UserError(
            f"experiment {spec.name!r}: heads: config.json was understood to say that layer {layer} has "
            f"{planned.of(layer)} heads, but in the loaded model it has {found.of(layer)}",
            hint="Name other layers for this model, and please report it to raymi with the config.json.",
        )


def _layer_groups(spec: OfHeads, n_layers: int, attention: Sequence[int] | None) -> list[tuple[int, ...]]:
    having = range(n_layers) if attention is None else attention
    if not having:
        raise UserError(f"experiment {spec.name!r}: layers: no layer of the model has attention")

    def from_here_on(layer: int) -> int:
        return next((each for each in having if each >= layer), having[-1])

    def resolve(layer: Layer) -> Iterable[int]:
        match layer:
            case "all":
                return having
            case "middle":
                return (from_here_on(n_layers // 2),)
            case float():
                # Decimal, since 0.29 * 100 is 28.999... as floats.
                return (from_here_on(min(n_layers - 1, int(Decimal(str(layer)) * n_layers))),)
            case int():
                return (_with_attention(layer, n_layers, having, spec),)
            case Window():
                return ()

    groups = [group for group in spec.layers.groups(resolve) if group]
    for element in spec.layers.elements:
        if isinstance(element, Window):
            below, above = element.window // 2, element.window - element.window // 2
            groups += [tuple(having[max(0, at - below) : at + above]) for at in range(len(having))]
    return sorted(set(groups))


def _with_attention(index: int, n_layers: int, having: Sequence[int], spec: OfHeads) -> int:
    layer = _index(index, n_layers, spec, "layers")
    if layer not in having:
        raise UserError(
            f"experiment {spec.name!r}: layers: {index} has no attention to cut; layers {_listed(having)} have"
        )
    return layer


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


Cut = tuple[tuple[int, ...], tuple[int, ...] | None]
"""Layers, and which heads of each of them (None: all)."""


def layers_and_heads(spec: OfHeads, n_layers: int, heads: Heads, attention: Sequence[int] | None) -> list[Cut]:
    """Layers and heads of every measurement, none twice."""
    groups = _layer_groups(spec, n_layers, attention)
    return list(dict.fromkeys(cut for layers in groups for cut in _cuts_of(spec, layers, heads)))


def _cuts_of(spec: OfHeads, layers: tuple[int, ...], heads: Heads) -> Iterable[Cut]:
    """Of layers that are cut together. Where they do not have as many heads each, `all` are those of each; taken each,
    a head is cut in those layers that have it.
    """
    if spec.heads.together == ("all",):
        return [(layers, None)]
    numbers = {layer: heads.of(layer) for layer in layers}
    if spec.heads.elements == ("all",):
        every = range(max(numbers.values()))
        return [(tuple(layer for layer in layers if head < numbers[layer]), (head,)) for head in every]

    def resolve(head: Head) -> Iterable[int]:
        assert isinstance(head, int)
        found = {_head(head, layer, numbers[layer], heads, spec) for layer in layers}
        if len(found) > 1:
            raise UserError(
                f"experiment {spec.name!r}: heads: {head} is another head in each of the layers {_listed(layers)}, "
                f"which are cut together and have {_listed(list(numbers.values()))} heads",
                hint="Count the heads from 0, or cut the layers each.",
            )
        return found

    return [(layers, chosen) for chosen in spec.heads.groups(resolve)]


def _head(index: int, layer: int, size: int, heads: Heads, spec: OfHeads) -> int:
    return _index(index, size, spec, "heads", "the model" if heads.by_layer is None else f"layer {layer}")


def _index(index: int, size: int, spec: OfHeads, field: Literal["layers", "heads"], of: str = "the model") -> int:
    if not -size <= index < size:
        raise UserError(
            f"experiment {spec.name!r}: {field}: {index} is out of range: "
            f"{of} has {size} {field} (0 to {size - 1}, or -{size} to -1)"
        )
    return index % size

"""Attention knockout: which edges of which heads in which layers are cut, and what a row of the result says."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from itertools import groupby
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BeforeValidator, Field, model_validator

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.axes import Axis, Head, Layer, Position, Window, positions
from raymi.experiments.columns import EFFECTS, HOW
from raymi.experiments.kind import Facts, Kind, Spec, Table, Work
from raymi.fields import problem
from raymi.heads import Heads, as_heads
from raymi.prompts import TokenizedPrompt


@dataclass(frozen=True, slots=True)
class Ablation(Work):
    """One row to measure: at every one of `layers`, every one of `heads` loses every one of `edges`, all together."""

    layers: tuple[int, ...]
    """Ascending, non-negative."""
    heads: tuple[int, ...] | None
    """Query heads, ascending; None: all heads."""
    edges: tuple[tuple[int, int], ...]
    """(query position, key position), key <= query, ascending, non-negative."""

    def said(self, heads: Heads | None) -> Sequence[object]:
        # All heads, where layers have a number of their own, have another name than where that was not known.
        named = heads.named(self.layers, None) if heads is not None and self.heads is None else self.heads
        return self.layers, named, self.edges

    def starts_at(self) -> tuple[int, int]:
        return self.layers[0], self.edges[0][0]

    def cut_edges(self) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        return self.layers, self.edges


Company = list[tuple[TokenizedPrompt, tuple[Ablation, ...]]]
"""Ablations that are measured together: of prompts of one length."""


def _all_heads_together(value: object) -> object:
    return {"together": ["all"]} if value == "all" else value


class KnockoutSpec(Spec):
    """One knockout experiment of a job: the product of its axes is measured on every prompt it chooses."""

    kind: Literal["knockout"]
    name: str = Field(default="knockout", min_length=1)
    layers: Axis[Layer]
    """Of a model in which only some layers have attention, `all` and windows mean those alone, as if there were no
    others; `middle` and fractions of depth mean the next layer that has it (the last that has, where none follows); an
    index of a layer that has none is an error."""
    heads: Annotated[Axis[Head], BeforeValidator(_all_heads_together)] = Axis[Head](together=("all",))
    queries: Axis[Position] = Axis[Position](each=("last",))
    keys: Axis[Position] = Axis[Position](each=("first",))

    @model_validator(mode="after")
    def _keys_not_after_queries(self) -> "KnockoutSpec":
        for query in self.queries.elements:
            for key in self.keys.elements:
                if _surely_after(key, query):
                    raise problem(
                        f"found key {key!r} after query {query!r}; allowed: keys at or before the query",
                        "keys",
                    )
        return self

    @property
    def table(self) -> str:
        return "ablations"

    def check(self, model: CachedModel) -> None:
        check(self, *_shape(model))

    def check_prompt(self, prompt: TokenizedPrompt) -> None:
        places(self, prompt)

    def confirm(self, model: CachedModel, attention_layers: Sequence[int], heads: Heads | None) -> None:
        confirm_layers(self, model.n_layers or 0, model.attention_layers, attention_layers)
        if heads is not None and model.heads is not None:
            confirm_heads(self, model.n_layers or 0, attention_layers, model.heads, heads)

    def work(self, prompt: TokenizedPrompt, model: CachedModel, saes: Sequence[SaeRef]) -> list[Ablation]:
        return ablations(self, prompt, *_shape(model))


def _shape(model: CachedModel) -> tuple[int, Heads, tuple[int, ...] | None]:
    """Its layers, their heads, and which layers have attention (None: all)."""
    if model.n_layers is None or model.heads is None:
        raise UserError(f"{model.id}: its config.json does not say how many layers and heads it has")
    return model.n_layers, model.heads, model.attention_layers


def _surely_after(key: Position, query: Position) -> bool:
    """Whether `key` is after `query` in prompts of every length (first and last count as different places)."""
    q, k = (({"first": 0, "last": -1}.get(p, p) if isinstance(p, str) else p) for p in (query, key))
    if not isinstance(q, int) or not isinstance(k, int):
        return False
    return k > q if (k < 0) == (q < 0) else (q, k) == (0, -1)


def check(spec: KnockoutSpec, n_layers: int, heads: int | Heads, attention: Sequence[int] | None = None) -> None:
    """Whether a model of so many layers and heads has what the experiment names; UserError with what it has not.

    `attention` is the layers that have attention, ascending; None: all.
    """
    _cuts(spec, n_layers, as_heads(heads), attention)


def confirm_layers(spec: KnockoutSpec, n_layers: int, planned: Sequence[int] | None, found: Sequence[int]) -> None:
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


def confirm_heads(spec: KnockoutSpec, n_layers: int, attention: Sequence[int], planned: Heads, found: Heads) -> None:
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


def ablations(
    spec: KnockoutSpec,
    prompt: TokenizedPrompt,
    n_layers: int,
    heads: int | Heads,
    attention: Sequence[int] | None = None,
) -> list[Ablation]:
    """Every ablation of one prompt, none twice, ordered by (first query, layers, heads, edges).

    Args:
        spec: the experiment.
        prompt: as the model reads it.
        n_layers: how many layers the model has.
        heads: how many query heads each has.
        attention: the layers that have attention, ascending; None: all.

    Raises:
        UserError: the model lacks a layer or head, or the layer attention, or the prompt a position, or a key stands
            after its query.
    """
    cuts = _cuts(spec, n_layers, as_heads(heads), attention)
    return [
        Ablation(layers, its_heads, edges)
        for _, at_query in groupby(_edge_groups(spec, prompt), key=lambda edges: edges[0][0])
        for group in [list(at_query)]
        for layers, its_heads in cuts
        for edges in group
    ]


def ablation_id(model_id: str, token_ids: Sequence[int], ablation: Ablation, heads: int | Heads) -> str:
    """16 hexadecimal digits that name the cell in every run, revision and dtype.

    All heads, whether listed or None, are the same cell.
    """
    named = as_heads(heads).named(ablation.layers, ablation.heads)
    cell = [sorted(set(ablation.layers)), named, sorted(set(ablation.edges))]
    name = _named_prompt(model_id, tuple(token_ids)).copy()
    name.update(b"," + json.dumps(cell, separators=(",", ":"))[1:].encode())
    return name.hexdigest()[:16]


@lru_cache(maxsize=16)
def _named_prompt(model_id: str, token_ids: tuple[int, ...]) -> Any:
    """The beginning that all ablations of a prompt share: writing out a long prompt for each of them takes longest."""
    return hashlib.sha256(json.dumps(["knockout", model_id, token_ids], separators=(",", ":"))[:-1].encode())


def _layer_groups(spec: KnockoutSpec, n_layers: int, attention: Sequence[int] | None) -> list[tuple[int, ...]]:
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


def _with_attention(index: int, n_layers: int, having: Sequence[int], spec: KnockoutSpec) -> int:
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


def _cuts(spec: KnockoutSpec, n_layers: int, heads: Heads, attention: Sequence[int] | None) -> list[Cut]:
    """Layers and heads of every measurement, none twice."""
    groups = _layer_groups(spec, n_layers, attention)
    return list(dict.fromkeys(cut for layers in groups for cut in _cuts_of(spec, layers, heads)))


def _cuts_of(spec: KnockoutSpec, layers: tuple[int, ...], heads: Heads) -> Iterable[Cut]:
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


def _head(index: int, layer: int, size: int, heads: Heads, spec: KnockoutSpec) -> int:
    return _index(index, size, spec, "heads", "the model" if heads.by_layer is None else f"layer {layer}")


def _index(index: int, size: int, spec: KnockoutSpec, field: Literal["layers", "heads"], of: str = "the model") -> int:
    if not -size <= index < size:
        raise UserError(
            f"experiment {spec.name!r}: {field}: {index} is out of range: "
            f"{of} has {size} {field} (0 to {size - 1}, or -{size} to -1)"
        )
    return index % size


def _edge_groups(spec: KnockoutSpec, prompt: TokenizedPrompt) -> list[tuple[tuple[int, int], ...]]:
    """The edges of every measurement on a prompt, ascending. With `all`, only those of a causal model are taken."""
    found: list[tuple[tuple[int, int], ...]] = []
    query_groups, key_groups = places(spec, prompt)
    for queries in query_groups:
        for keys in key_groups:
            if edges := tuple((query, key) for query in queries for key in keys if key <= query):
                found.append(edges)
    return sorted(found)


def places(spec: KnockoutSpec, prompt: TokenizedPrompt) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The queries and the keys of every measurement on a prompt.

    Raises:
        UserError: the prompt has not one of them, or a key stands after its query.
    """
    query_groups, key_groups = (positions(spec.name, axis, prompt) for axis in (spec.queries, spec.keys))
    if "all" in spec.queries.elements or "all" in spec.keys.elements:
        return query_groups, key_groups
    for queries in query_groups:
        for keys in key_groups:
            if queries and keys and max(keys) > min(queries):
                raise UserError(
                    f"experiment {spec.name!r}: prompt {prompt.prompt.id!r}: "
                    f"key position {max(keys)} is after query position {min(queries)}",
                    hint=f"Its tokens are {list(prompt.tokens)}.",
                )
    return query_groups, key_groups


SCHEMA = pa.schema(
    [
        ("unit_id", pa.string()),
        ("ablation_id", pa.string()),
        ("experiment", pa.string()),
        ("model_id", pa.string()),
        ("revision", pa.string()),
        ("dtype", pa.string()),
        ("prompt_id", pa.string()),
        ("n_tokens", pa.int32()),
        # What was cut. A null list of heads means all of them; queries and keys are parallel, one pair an edge.
        ("layers", pa.list_(pa.int16())),
        ("heads", pa.list_(pa.int16())),
        ("queries", pa.list_(pa.int32())),
        ("keys", pa.list_(pa.int32())),
        # The same, where there is exactly one of it: what people group by.
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("query", pa.int32()),
        ("key", pa.int32()),
        *EFFECTS,
        ("empty_rows", pa.int32()),
        *HOW,
    ]
)
"""Table `ablations`: one row an ablation. Ranks count from 0; probabilities are of the last position."""


def _gone(facts: Facts, planned: Sequence[Work]) -> str | None:
    now: defaultdict[int, set[int]] = defaultdict(set)
    for work in planned:
        if isinstance(work, Ablation):
            for layer in work.layers:
                now[layer].update(work.heads or ())
    cut = sorted((layer, head) for layer, head in facts if layer is not None and head is not None)
    for layer, head in cut:
        if head not in now[layer]:
            return f"layer {layer} has {len(now[layer])} heads to cut, without head {head}"
    return None


KIND = Kind(
    "knockout",
    KnockoutSpec,
    {"ablations": Table(SCHEMA, facts=("layer", "head"), gone=_gone)},
    running="raymi.experiments.knockout.run",
)

"""Attention knockout: which edges of which heads in which layers are cut, and what a row of the result says."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.axes import Axis, Position, positions
from raymi.experiments.columns import of_cells
from raymi.experiments.kind import Facts, Kind, Table, Work
from raymi.experiments.of_heads import OfHeads, layers_and_heads, shape
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


class KnockoutSpec(OfHeads):
    """One knockout experiment of a job: the product of its axes is measured on every prompt it chooses."""

    kind: Literal["knockout"]
    name: str = Field(default="knockout", min_length=1)
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

    def check_prompt(self, prompt: TokenizedPrompt) -> None:
        places(self, prompt)

    def work(self, prompt: TokenizedPrompt, model: CachedModel, saes: Sequence[SaeRef]) -> list[Ablation]:
        return ablations(self, prompt, *shape(model))


def _surely_after(key: Position, query: Position) -> bool:
    """Whether `key` is after `query` in prompts of every length (first and last count as different places)."""
    q, k = (({"first": 0, "last": -1}.get(p, p) if isinstance(p, str) else p) for p in (query, key))
    if not isinstance(q, int) or not isinstance(k, int):
        return False
    return k > q if (k < 0) == (q < 0) else (q, k) == (0, -1)


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
    cuts = layers_and_heads(spec, n_layers, as_heads(heads), attention)
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


SCHEMA = of_cells(
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

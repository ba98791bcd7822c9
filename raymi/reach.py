"""How far back layers can look, as a config tells; and what of a plan cuts edges that are closed anyway. No torch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymi import snapshot
from raymi.experiments.unit import Unit

_EVERY_LAYER = ("mistral", "mixtral", "phi3", "starcoder2")
"""Families that have their window in every layer, where their config states one."""
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
"""Families of which one layer in so many looks back without end, where their config does not say it."""


@dataclass(frozen=True, slots=True)
class Reach:
    """What one layer's own mask leaves open."""

    n_tokens: int
    chunked: bool = False
    """Whether a query sees just its own chunk of so many tokens, and not the last so many."""

    def closes(self, query: int, key: int) -> bool:
        """Whether it keeps a query from a key at or before it."""
        if self.chunked:
            return query // self.n_tokens != key // self.n_tokens
        return query - key >= self.n_tokens


def reaches(config: Mapping[str, Any], n_layers: int) -> list[Reach | None]:
    """Of every layer; None: without end, or the config does not tell. What it does not tell, nobody is warned of."""
    text = snapshot.text_config(config)
    kind = snapshot.model_type(text) or snapshot.model_type(config) or ""
    stated = {**snapshot.config_defaults(snapshot.model_type(config), snapshot.model_type(text)), **text}
    window, chunk = stated.get("sliding_window"), stated.get("attention_chunk_size")
    match stated.get("layer_types"):
        case [*kinds] if len(kinds) == n_layers:
            kinds = [str(each) for each in kinds]
        case _ if kind in _EVERY_LAYER:
            kinds = ["sliding_attention"] * n_layers
        case _ if kind in _PATTERNS:
            period = stated.get("sliding_window_pattern")
            period = period if type(period) is int and period > 0 else _PATTERNS[kind]
            kinds = ["sliding_attention" if (at + 1) % period else "full_attention" for at in range(n_layers)]
        case _:
            kinds = ["full_attention"] * n_layers
    of_kind: dict[str, Reach] = {}
    if type(window) is int and window > 0:
        of_kind["sliding_attention"] = Reach(window)
    if type(chunk) is int and chunk > 0:
        of_kind["chunked_attention"] = Reach(chunk, chunked=True)
    return [of_kind.get(each) for each in kinds]


def closed(path: Path, n_layers: int, units: Iterable[Unit], lengths: Mapping[str, int]) -> list[str]:
    """What a plan cuts of edges that a model's own mask has closed, in words: one line an experiment that does.

    Args:
        path: the snapshot's folder; where it is on another machine, nothing is told.
        n_layers: how many layers the model has.
        units: what is planned.
        lengths: prompt id -> its number of tokens.
    """
    try:
        found = reaches(snapshot.read_json(path / snapshot.CONFIG), n_layers)
    except snapshot.DamagedError:
        return []
    shortest = min((each.n_tokens for each in found if each is not None), default=None)
    if shortest is None or max(lengths.values(), default=0) <= shortest:
        return []
    total, nothing, part = Counter[str](), Counter[str](), Counter[str]()
    known: dict[object, int] = {}  # heads that are cut one by one share layers and edges
    for unit in units:
        for _, work in unit.items:
            for one in work:
                layers, edges = place = one.cut_edges()
                if not edges:
                    continue
                total[unit.experiment] += 1
                if place not in known:
                    known[place] = _n_closed(layers, edges, found)
                n_closed = known[place]
                nothing[unit.experiment] += n_closed == len(layers) * len(edges)
                part[unit.experiment] += 0 < n_closed < len(layers) * len(edges)
    return [_said(name, total[name], nothing[name], part[name]) for name in total if nothing[name] or part[name]]


def _n_closed(layers: Sequence[int], edges: Sequence[tuple[int, int]], found: Sequence[Reach | None]) -> int:
    here = [each for layer in layers if (each := found[layer]) is not None]
    return sum(each.closes(query, key) for each in here for query, key in edges)


def _said(experiment: str, total: int, nothing: int, part: int) -> str:
    parts = [f"{nothing:,} cut nothing"] * (nothing > 0) + [f"{part:,} less than they name"] * (part > 0)
    return (
        f"experiment {experiment!r}: of {total:,} ablations {' and '.join(parts)}: the model's own mask (a window or "
        "chunks) has closed those edges"
    )

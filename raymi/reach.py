"""What of a plan cuts edges that a model's own mask has closed anyway. No torch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from raymi import snapshot
from raymi.experiments.unit import Unit
from raymi.windows import Reach, reaches


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

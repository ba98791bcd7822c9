"""Where in a model knockouts have an effect: bars over its layers, and a table of layers and heads."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from raymi.cli.text import bars, number

if TYPE_CHECKING:
    import polars as pl

_LABEL = 16
"""Characters before the bars."""
_PEAK = 24
"""Characters that are kept free for the largest value behind them."""
_GRIDS = 4
"""Models whose tables of layers and heads are printed: `heads.csv` has those of all."""


def by_layer(layers: "pl.DataFrame", width: int) -> Iterator[str]:
    """Means of each group of layers as bars, all of them however many; those below zero have a line of their own.

    Args:
        layers: of one experiment (`raymi.report.tables.per_layer`).
        width: of the terminal in characters; 0 folds nothing.
    """
    yield "\nmeans by layer; each bar by its size relative to the largest of its kind"
    for (model_id,), of_model in layers.group_by("model_id", maintain_order=True):
        yield str(model_id)
        for name, column, sign in (("KL", "mean_kl", ""), ("logit diff", "mean_logit_diff", "+")):
            found = of_model.drop_nulls(column)
            if found.is_empty():
                continue
            at = found[column].abs().arg_max() or 0
            peak = f"largest L{short(found['layers'][at])} {number(found[column][at], sign)}"
            for label, shown in _signs(name, _axis(found, column)):
                yield from _folded(label, shown, peak, width)
                peak = ""


def _signs(name: str, values: Sequence[float | None]) -> Iterator[tuple[str, str]]:
    """Bars without their signs: those above zero, and those below where there are any."""
    cells = bars(values)
    if not any(value is not None and value < 0 for value in values):
        yield name, "".join(cells)
        return
    above = [value is None or value >= 0 for value in values]
    if any(value is not None and value > 0 for value in values):
        yield f"{name} +", "".join(cell if shown else " " for cell, shown in zip(cells, above, strict=True))
        yield f"{name} -", "".join(cell[1:] or " " for cell in cells)
    else:
        yield f"{name} -", "".join(cell[-1] for cell in cells)


def _folded(label: str, shown: str, peak: str, width: int) -> Iterator[str]:
    room = max(8, width - _LABEL - _PEAK) if width else len(shown)
    for start in range(0, len(shown), room):
        head = label if start == 0 else f"  from {start}"
        yield f"  {head:<{_LABEL - 2}}{shown[start : start + room]}  {peak if start == 0 else ''}".rstrip()


def _axis(layers: "pl.DataFrame", column: str) -> list[float | None]:
    """A value for each layer, None where it was not ablated; where layers go together, for each group."""
    values = layers[column].to_list()
    if (layers["first_layer"] != layers["last_layer"]).any():
        return values
    at: dict[int, float] = dict(zip(layers["first_layer"], values, strict=True))
    return [at.get(layer) for layer in range(max(at) + 1)]


def by_head(heads: "pl.DataFrame", width: int) -> Iterator[str]:
    """For each model a line a layer and a place a head: the logit diff where there is an answer, else the KL.

    Args:
        heads: of one experiment (`raymi.report.tables.per_head`).
        width: of the terminal in characters; 0 folds nothing.
    """
    models = list(heads.group_by("model_id", maintain_order=True))
    for (model_id,), of_model in models[:_GRIDS]:
        if of_model["head"].n_unique() < 2 or of_model["layer"].n_unique() < 2:
            continue
        answered = of_model["mean_logit_diff"].count() > 0
        column, sign = ("mean_logit_diff", "+") if answered else ("mean_kl", "")
        found = of_model.drop_nulls(column)
        peak = found.row(found[column].abs().arg_max() or 0, named=True)
        at = f"L{peak['layer']} H{peak['head']} {number(peak[column], sign)}"
        yield f"\n{model_id}"
        dot = "·" if bars([1.0]) == ["█"] else "."
        yield f"{'logit diff' if answered else 'KL'} by layer and head; largest {at}; {dot} is near zero"
        yield from _grid(found, column, dot, width)
    if len(models) > _GRIDS:
        yield f"\n... and {len(models) - _GRIDS} more models: --csv FOLDER writes heads.csv with all"


def _grid(heads: "pl.DataFrame", column: str, dot: str, width: int) -> Iterator[str]:
    layers, n_heads = sorted(heads["layer"].unique()), int(heads["head"].max()) + 1  # pyright: ignore[reportArgumentType]
    at = dict(zip(heads.select("layer", "head").iter_rows(), heads[column], strict=True))
    places = [(layer, head) for layer in layers for head in range(n_heads)]
    shown = dict(zip(places, bars([at.get(place) for place in places]), strict=True))
    shown |= {place: dot for place in at if shown[place][-1] in "▁1"}
    shown |= {place: "" for place in places if place not in at}
    most = min(n_heads, max(1, (width - 5) // 2)) if width else n_heads
    for first in range(0, n_heads, most):
        chosen = range(first, min(n_heads, first + most))
        yield "     " + "".join(f" {head % 10}" for head in chosen) + (f"  (heads from {first})" if first else "")
        for layer in layers:
            yield (f"{f'L{layer}':<5}" + "".join(f"{shown[layer, head]:>2}" for head in chosen)).rstrip()


def strongest(layers: str | None, heads: str | None) -> str:
    """A cell in short: `L23 H4`."""
    if layers is None or heads is None:  # all that was cut had been closed before
        return "-"
    return f"L{short(layers)} " + ("all heads" if heads == "all" else f"H{short(heads)}")


def short(label: str) -> str:
    """Of a long list of layers or heads the beginning."""
    return label if len(label) <= 9 else f"{label[:8]}…"

"""Heat maps of knockouts. Altair draws them, which is an extra: `pip install 'raymi[plots]'`."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from raymi.errors import UserError
from raymi.fields import near
from raymi.outlet import clean

if TYPE_CHECKING:
    import altair as alt

AXES = {"layer": "layers", "head": "heads", "query": "queries", "key": "keys"}
"""What knockouts can differ in, and the column that says it in full; in the order in which axes are chosen."""
SIGNED = ("logit_diff", "margin_diff")


def heatmap(
    frame: pl.DataFrame, tokens: Sequence[str], value: str, x: str | None, y: str | None, title: str
) -> "alt.Chart":
    """A heat map of one prompt's knockouts.

    Args:
        frame: their rows, with the columns of table `ablations`.
        tokens: of the prompt.
        value: the column that is the colour.
        x: an axis (`AXES`), or None to take one in which the rows differ.
        y: as `x`.
        title: what stands above it.

    Raises:
        UserError: altair is missing, there is no such column or axis, or nothing to draw.
    """
    alt = _altair()
    _check_value(frame, value)
    labels = {axis: _labels(frame[column], _names(axis, tokens)) for axis, column in AXES.items()}
    x, y = _choose([axis for axis in AXES if len(set(labels[axis])) > 1], x, y)
    shown = [axis for axis in (y, x) if axis is not None]
    cells = pl.DataFrame({axis: labels[axis] for axis in shown}).with_columns(frame[value])
    means = cells.group_by(shown, maintain_order=True).agg(pl.col(value).mean(), pl.len().alias("cells"))
    several = int(means["cells"].cast(pl.Int64).max()) > 1  # pyright: ignore[reportArgumentType]
    legend = f"mean {value}" if several else value
    scale = alt.Scale(scheme="viridis")
    if value in SIGNED:  # white is no change, and red and blue are equally dark at equal distances from it
        widest = max(map(abs, means[value].drop_nulls())) or 1.0
        scale = alt.Scale(scheme="redblue", domain=[-widest, widest])
    # As values: altair refuses frames of more than 5,000 rows, which layers times heads can be.
    chart = alt.Chart(alt.Data(values=means.rows(named=True))).mark_rect()
    places = {
        name: channel(f"{axis}:O", sort=_sorted(frame, axis, labels[axis]), title=axis)
        for name, channel, axis in (("x", alt.X, x), ("y", alt.Y, y))
        if axis is not None
    }
    colour = alt.Color(f"{value}:Q", scale=scale, title=legend)
    tips = [*(alt.Tooltip(f"{axis}:O") for axis in shown), alt.Tooltip(f"{value}:Q", format=".6f", title=legend)]
    step = alt.Step(16)  # pyright: ignore[reportUnknownVariableType]
    return chart.encode(**places, color=colour, tooltip=tips).properties(title=_inert(title), width=step, height=step)


def _inert(text: str) -> str:
    """`text` to be seen as it is, with nothing in it for a browser to obey.

    A page holds a chart as JSON within a script, and neither altair nor a notebook keeps a `</script>` in it from
    ending that. So what could end it, or begin a comment, gets a joiner, which has no width, after its `<`.
    """
    return clean(re.sub("<(?=[/!])", "<\u2060", text))


def _altair() -> Any:
    try:
        import altair
    except ModuleNotFoundError as error:
        if error.name != "altair":
            raise
        raise UserError(
            "heat maps are drawn by altair, which is not installed", hint="pip install 'raymi[plots]'"
        ) from None
    return altair


def _check_value(frame: pl.DataFrame, value: str) -> None:
    numbers = [name for name, dtype in frame.schema.items() if dtype.is_numeric()]
    if value not in numbers:
        raise UserError(f"{value!r} is no column of numbers{near(value, numbers)}", hint=f"There are {numbers}.")
    if frame[value].null_count() == frame.height:
        wants = "a wrong answer" if value.startswith(("wrong", "margin")) else "an answer"
        raise UserError(f"{value} is null in every row", hint=f"Give the prompt {wants}, or draw value='kl'.")


def _choose(varying: list[str], x: str | None, y: str | None) -> tuple[str, str | None]:
    """The axes; those not asked for are the first in which rows differ, y before x. What is left over is averaged."""
    for axis in (x, y):
        if axis is not None and axis not in AXES:
            raise UserError(f"{axis!r} is no axis{near(axis, AXES)}; allowed: {', '.join(AXES)}")
    free = [axis for axis in varying if axis not in (x, y)]
    if y is None and len(free) > (x is None):
        y = free.pop(0)
    if x is None and free:
        x = free.pop(0)
    if x is None:
        x, y = y, None
    if x is None:
        raise UserError("there is one ablation, and nothing to draw", hint="Let layers, heads, queries or keys vary.")
    return x, y


def _names(axis: str, tokens: Sequence[str]) -> Sequence[str]:
    """What indices of an axis are called; positions with their tokens."""
    return [_inert(f"{at} {token}") for at, token in enumerate(tokens)] if axis in ("query", "key") else []


def _labels(column: pl.Series, names: Sequence[str]) -> list[str]:
    return [_label(indices, names) for indices in column.to_list()]


def _label(indices: list[int] | None, names: Sequence[str]) -> str:
    """`all`, `5`, `4  is`, `3-7` or `0, 2`."""
    if indices is None:
        return "all"
    found = sorted(set(indices))
    if len(found) == 1:
        return names[found[0]] if names else str(found[0])
    unbroken = len(found) > 2 and found[-1] - found[0] == len(found) - 1
    return f"{found[0]}-{found[-1]}" if unbroken else ", ".join(map(str, found))


def _sorted(frame: pl.DataFrame, axis: str, labels: list[str]) -> list[str]:
    """The labels, none twice, in the order of what they stand for."""
    keys = {
        label: sorted(set(indices or ())) for label, indices in zip(labels, frame[AXES[axis]].to_list(), strict=True)
    }
    return sorted(keys, key=keys.__getitem__)

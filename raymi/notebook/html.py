"""Results as HTML. Texts of models and prompts are hostile: all of it is escaped."""

from html import escape

import polars as pl

from raymi.outlet import clean

_AS_IT_IS = "tex2jax_ignore mathjax_ignore"
"""Classes of what a notebook is not to take for formulas: `$` is a token like others."""


def block(*parts: str | pl.DataFrame) -> str:
    """Lines of text and tables, one below the other."""
    written = "".join(
        f"<div>{part._repr_html_()}</div>"  # which escapes  # pyright: ignore[reportPrivateUsage]
        if isinstance(part, pl.DataFrame)
        else f'<div style="white-space: pre-wrap">{escape(part)}</div>'
        for part in parts
    )
    return clean(f'<div class="{_AS_IT_IS}">{written}</div>')

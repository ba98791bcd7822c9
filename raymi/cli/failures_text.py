"""What failed, as a list: alike failures in one line, which has the number by which `raymi show --failure` finds it."""

from collections import Counter
from collections.abc import Iterator
from textwrap import fill
from typing import TYPE_CHECKING, Any

from raymi.cli.text import plural
from raymi.errors import told

if TYPE_CHECKING:
    import polars as pl

PROMPTS_SAID = 3
"""Of the prompts that a model can never measure, so many are said in full."""


def lines(failures: "pl.DataFrame", width: int) -> Iterator[str]:
    """The list, folded to `width` characters; 0 folds nothing."""
    from raymi.report.single import alike

    of_prompts: Counter[str] = Counter()
    for number, failure in enumerate(alike(failures).iter_rows(named=True), 1):
        if failure["stage"] == "prompt":
            of_prompts[failure["model_id"]] += 1
            if of_prompts[failure["model_id"]] > PROMPTS_SAID:
                continue
        yield fill(_line(number, failure), width or 10_000, initial_indent="  ", subsequent_indent="     ")
    for model, n in of_prompts.items():
        if n > PROMPTS_SAID:
            yield f"  {model}: prompt: ... and {n - PROMPTS_SAID:,} more that cannot be measured"


def _line(number: int, failure: dict[str, Any]) -> str:
    stage = plural(failure["n"], "unit") if failure["stage"] == "unit" else failure["stage"]
    tries = f" ({failure['attempts']} attempts)" if failure["attempts"] > 1 else ""
    said = told(failure["model_id"] or "the run", stage, failure["kind"], failure["message"])
    return f"{number}. {said}{tries}"

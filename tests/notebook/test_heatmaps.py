import math
import sys
from typing import Any

import polars as pl
import pytest

from raymi import Model, UserError
from raymi.heatmap import heatmap

TEXT = "The capital of France is"


@pytest.mark.parametrize(
    ("axes", "asked", "x", "y", "cells"),
    [
        ({"layers": "all", "heads": {"each": "all"}}, {}, "head", "layer", 8),
        ({"layers": "all", "keys": {"each": "all"}}, {}, "key", "layer", 10),
        ({"layers": 0, "queries": "all", "keys": "all"}, {}, "key", "query", 15),
        ({"layers": "all"}, {}, "layer", None, 2),
        ({"layers": "all"}, {"y": "layer"}, "layer", None, 2),
        ({"layers": "all", "heads": {"each": "all"}}, {"x": "layer"}, "layer", "head", 8),
        ({"layers": "all", "heads": {"each": "all"}}, {"y": "head"}, "layer", "head", 8),
        ({"layers": "all", "heads": {"each": "all"}, "keys": "all"}, {}, "head", "layer", 8),
        ({"layers": "all", "heads": {"each": "all"}, "keys": "all"}, {"x": "key", "y": "head"}, "key", "head", 20),
        ({"layers": 0}, {"x": "layer"}, "layer", None, 1),
    ],
)
def test_heat_map_takes_the_axes_that_vary(
    tiny: Model, axes: dict[str, Any], asked: dict[str, str], x: str, y: str | None, cells: int
) -> None:
    found = tiny.knockout(TEXT, answer=" Paris", **axes)
    chart = found.heatmap(**asked).to_dict()
    assert chart["encoding"]["x"]["field"] == x
    assert chart["encoding"].get("y", {}).get("field") == y
    values = next(iter(chart.get("datasets", {0: chart["data"].get("values")}).values()))
    assert len(values) == cells
    assert math.fsum(cell["logit_diff"] for cell in values) * found.frame.height == pytest.approx(
        found.frame["logit_diff"].sum() * cells, abs=1e-9
    )
    averaged = cells < found.frame.height
    assert chart["encoding"]["color"]["title"] == ("mean logit_diff" if averaged else "logit_diff")


def test_no_change_is_white(tiny: Model) -> None:
    found = tiny.knockout(TEXT, answer=" Paris", layers="all", heads={"each": "all"})
    low, high = found.heatmap().to_dict()["encoding"]["color"]["scale"]["domain"]
    assert -low == high == max(map(abs, found.frame["logit_diff"]))
    assert "domain" not in found.heatmap("kl").to_dict()["encoding"]["color"]["scale"]


def test_heat_map_orders_by_number_and_names_tokens() -> None:
    windows = [[9, 10, 11], [0, 1], [2], [1, 3]]
    frame = pl.DataFrame(
        {
            "layers": [layers for layers in windows for _ in range(2)],
            "heads": [None] * 8,
            "queries": [[1]] * 8,
            "keys": [[0], [1]] * 4,
            "kl": [float(n) for n in range(8)],
        }
    )
    encoding = heatmap(frame, ["The", "end"], "kl", None, None, "title").to_dict()["encoding"]
    assert encoding["y"]["sort"] == ["0, 1", "1, 3", "2", "9-11"]
    assert encoding["x"]["sort"] == ["0 The", "1 end"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "kll"}, "did you mean 'kl'"),
        ({"value": "prompt_id"}, "no column of numbers"),
        ({"value": "margin_diff"}, "null in every row\nGive the prompt a wrong answer"),
        ({"x": "heads"}, "did you mean 'head'"),
        ({}, "there is one ablation"),
    ],
)
def test_what_cannot_be_drawn(tiny: Model, options: dict[str, str], message: str) -> None:
    found = tiny.knockout(TEXT, answer=" Paris")
    with pytest.raises(UserError, match=message):
        found.heatmap(**options)  # pyright: ignore[reportArgumentType]


def test_heat_map_without_altair_says_what_to_install(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny.knockout(TEXT, layers="all")
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(UserError, match=r"pip install 'raymi\[plots\]'"):
        found.heatmap("kl")

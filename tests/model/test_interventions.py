"""What no intervention may be, whatever the model."""

from typing import Any

import numpy as np
import pytest
import torch

from raymi.model.interventions import EDITABLE, Edit, Mask, add, mean, replace, scale, zero


@pytest.mark.parametrize(
    "wrong",
    [
        {"edges": ()},
        {"heads": ()},
        {"heads": []},
        {"edges": ((2, 3),)},
        {"edges": ((-2, -1),)},
        {"layer": -1},
        {"heads": (0, -1)},
    ],
    ids=str,
)
def test_a_mask_that_cuts_nothing_or_something_else_cannot_be_made(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=r"Mask\("):
        Mask(**{"layer": 0, "heads": None, "edges": ((5, 2),), **wrong})


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"positions": ()}, "changes nothing: it names no positions"),
        ({"heads": ()}, "changes nothing: it names no heads"),
        ({"layer": -1}, "count from 0"),
        ({"positions": (3, -1, -1)}, "names position -1 more than once"),
        ({"heads": (0, -1)}, "count from 0"),
        ({"positions": (4, 3, 4)}, "names position 4 more than once"),
        ({"heads": (1, 2, 1)}, "names head 1 more than once"),
    ],
    ids=str,
)
def test_an_edit_that_changes_nothing_or_something_else_cannot_be_made(wrong: dict[str, Any], why: str):
    with pytest.raises(ValueError, match=rf"Edit\(.*{why}"):
        Edit(
            **{
                "layer": 0,
                "site": "attn.hook_z",
                "positions": (3,),
                "heads": (0,),
                "factor": 0.0,
                "shift": None,
                **wrong,
            }
        )


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: zero(3, "hook_mlp_out", 4), r"positions are a tuple of ints, such as \(4,\); found 4"),
        (lambda: zero(3, "hook_mlp_out", [4]), r"positions are a tuple of ints.*; found \[4\]"),
        (lambda: zero(3, "hook_mlp_out", (4.0,)), r"positions are a tuple of ints.*; found \(4\.0,\)"),
        (lambda: zero(3, "hook_mlp_out", (True,)), r"positions are a tuple of ints.*; found \(True,\)"),
        (lambda: zero(3, "hook_mlp_out", "4"), "positions are a tuple of ints.*; found '4'"),
        (lambda: zero(3, "attn.hook_z", (4,), 2), "heads are a tuple of ints.*; found 2"),
        (lambda: zero(3, "attn.hook_z", (4,), ("2",)), r"heads are a tuple of ints.*; found \('2',\)"),
        (lambda: zero("3", "hook_mlp_out", (4,)), "a layer is an int; found '3'"),
        (lambda: scale(3, "hook_mlp_out", (4,), torch.ones(2)), "a factor is a number; found tensor.*"),
        (lambda: scale(3, "hook_mlp_out", (4,), "0.5"), "a factor is a number; found '0.5'"),
        (lambda: add(3, "hook_mlp_out", (4,), 1.0), "a value is a tensor; found 1.0"),
        (lambda: replace(3, "hook_mlp_out", (4,), [1.0]), r"a value is a tensor; found \[1\.0\]"),
    ],
)
def test_an_edit_of_other_types_is_refused_in_words(make: Any, why: str):
    with pytest.raises(TypeError, match=rf"^Edit\(.*: {why}$"):
        make()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"layer": "0"}, "a layer is an int; found '0'"),
        ({"layer": True}, "a layer is an int; found True"),
        ({"heads": 0}, r"heads are a tuple of ints.*; found 0"),
        ({"heads": "all"}, r"heads are a tuple of ints.*; found 'all'"),
        ({"heads": (1.0,)}, r"heads are a tuple of ints.*; found \(1\.0,\)"),
        ({"edges": (5, 2)}, r"edges are pairs \(query, key\) of ints.*; found \(5, 2\)"),
        ({"edges": ((5, 2, 1),)}, r"edges are pairs.*; found \(\(5, 2, 1\),\)"),
        ({"edges": (("5", "2"),)}, r"edges are pairs.*; found \(\('5', '2'\),\)"),
        ({"edges": "52"}, r"edges are pairs.*; found '52'"),
        ({"edges": 5}, r"edges are pairs.*; found 5"),
    ],
    ids=str,
)
def test_a_mask_of_other_types_is_refused_in_words(wrong: dict[str, Any], why: str):
    with pytest.raises(TypeError, match=rf"^Mask\(.*: {why}$"):
        Mask(**{"layer": 0, "heads": None, "edges": ((5, 2),), **wrong})


def test_a_mask_takes_lists_and_the_integers_of_numpy():
    one = Mask(np.int64(1), [np.int32(2)], [[np.int64(5), 2], (-1, 0)])  # pyright: ignore
    assert one.first_query == -1


@pytest.mark.parametrize("site", [site for site in EDITABLE if site != "attn.hook_z"])
def test_heads_are_refused_where_they_would_be_passed_over(site: str):
    value = torch.zeros(8)
    for make in (
        lambda heads: zero(2, site, (13,), heads),
        lambda heads: mean(2, site, (13,), value, heads),
        lambda heads: replace(2, site, (13,), value, heads),
        lambda heads: add(2, site, (13,), value, heads),
        lambda heads: scale(2, site, (13,), 2.0, heads),
    ):
        assert make(None).first_query == 13
        with pytest.raises(ValueError, match=rf"Edit\(.*{site} is of all heads together; only attn\.hook_z"):
            make((1,))


def test_what_is_wrong_is_said_in_one_line():
    with pytest.raises(ValueError, match="more than once") as error:
        add(0, "hook_mlp_out", (1, 1), torch.zeros(2, 64))
    assert "\n" not in str(error.value)

"""Layers with numbers of heads of their own: what an experiment cuts, and what its cells are called."""

from typing import Any

import pytest

from raymi.errors import UserError
from raymi.experiments.knockout.spec import Ablation, KnockoutSpec, ablation_id, ablations
from raymi.experiments.of_heads import check, confirm_heads
from raymi.heads import Heads
from raymi.prompts import Prompt, TokenizedPrompt

HEADS = Heads(4, (4, 8, 2))
PROMPT = TokenizedPrompt(Prompt("p", "a b c"), (5, 6, 7), ("a", "b", "c"), False, None, None, {})
EDGE = ((2, 0),)


def spec(**fields: Any) -> KnockoutSpec:
    return KnockoutSpec.model_validate({"kind": "knockout", "queries": "last", "keys": "first", **fields})


def cut(**fields: Any) -> list[tuple[tuple[int, ...], tuple[int, ...] | None]]:
    return [(each.layers, each.heads) for each in ablations(spec(**fields), PROMPT, 3, HEADS)]


def test_all_heads_are_all_of_each_layer():
    assert cut(layers="all", heads="all") == [((0,), None), ((1,), None), ((2,), None)]
    assert cut(layers={"together": "all"}, heads="all") == [((0, 1, 2), None)]


def test_each_head_is_one_of_the_layer_s_own():
    found = cut(layers="all", heads={"each": "all"})
    assert found == [((layer,), (head,)) for layer, n in enumerate((4, 8, 2)) for head in range(n)]


def test_a_head_of_layers_together_is_cut_where_it_is():
    found = cut(layers={"together": [1, 2]}, heads={"each": "all"})
    assert found == [((1, 2), (0,)), ((1, 2), (1,)), *(((1,), (head,)) for head in range(2, 8))]


def test_indices_count_in_the_layer_s_own_number():
    assert cut(layers={"each": [0, 1]}, heads=-1) == [((0,), (3,)), ((1,), (7,))]
    with pytest.raises(UserError, match=r"heads: -1 is another head in each of the layers 0, 1"):
        cut(layers={"together": [0, 1]}, heads=-1)
    with pytest.raises(UserError, match=r"heads: 5 is out of range: layer 0 has 4 heads \(0 to 3"):
        cut(layers=0, heads=5)
    check(spec(layers=1, heads=5), 3, HEADS)


def test_cells_have_other_names_only_where_the_number_is_another():
    def name(layers: tuple[int, ...], its: tuple[int, ...] | None, heads: int | Heads) -> str:
        return ablation_id("m", (5, 6, 7), Ablation(layers, its, EDGE), heads)

    assert name((0,), None, HEADS) == name((0,), None, 4) == name((0,), (0, 1, 2, 3), HEADS)
    assert name((1,), (5,), HEADS) == name((1,), (5,), 8)
    assert name((1,), None, HEADS) != name((1,), None, 4)
    assert name((1,), None, HEADS) == name((1,), tuple(range(8)), HEADS)
    assert name((1,), (0, 1, 2, 3), HEADS) != name((1,), None, HEADS)
    assert name((0, 1), None, HEADS) != name((0, 1), None, 4)
    assert name((0, 1), None, Heads(4)) == name((0, 1), None, 4)


def test_the_loaded_model_confirms_what_was_planned():
    confirm_heads(spec(layers="all"), 3, (0, 1, 2), HEADS, Heads(4, (4, 8, 2)))
    confirm_heads(spec(layers=0), 3, (0, 1, 2), Heads(4), HEADS)
    with pytest.raises(UserError, match=r"layer 1 has 4 heads, but in the loaded model it has 8"):
        confirm_heads(spec(layers=1), 3, (0, 1, 2), Heads(4), HEADS)

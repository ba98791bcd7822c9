"""What a knockout experiment means on a model and a prompt of known sizes."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raymi.errors import UserError
from raymi.experiments.knockout.spec import SCHEMA, Ablation, KnockoutSpec, ablation_id, ablations
from raymi.experiments.of_heads import check, confirm_layers
from raymi.prompts import Prompt, TokenizedPrompt

L, H = 12, 4


def spec(**fields: Any) -> KnockoutSpec:
    return KnockoutSpec.model_validate({"kind": "knockout", "layers": "middle", **fields})


def prompt(size: int = 5, pieces: Mapping[str, tuple[int, ...]] = MappingProxyType({})) -> TokenizedPrompt:
    names = tuple(f"t{index}" for index in range(size))
    return TokenizedPrompt(Prompt("p", " ".join(names)), tuple(range(size)), names, False, None, None, dict(pieces))


def layers(value: Any, n_layers: int = L) -> list[tuple[int, ...]]:
    return [ablation.layers for ablation in ablations(spec(layers=value), prompt(), n_layers, H)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", [(layer,) for layer in range(L)]),
        ({"together": "all"}, [tuple(range(L))]),
        ("middle", [(6,)]),
        (3, [(3,)]),
        (-1, [(11,)]),
        ([5, 0, -12], [(0,), (5,)]),
        ({"together": [5, 0, -1]}, [(0, 5, 11)]),
        (0.5, [(6,)]),
        ([0.0, 0.25, 1.0], [(0,), (3,), (11,)]),
        ({"each": ["middle", 0.5, 6]}, [(6,)]),
        ({"window": 1}, [(layer,) for layer in range(L)]),
    ],
    ids=str,
)
def test_layers(value: Any, expected: list[tuple[int, ...]]) -> None:
    assert layers(value) == expected


def test_middle_of_an_odd_number() -> None:
    assert layers("middle", 5) == layers(0.5, 5) == [(2,)]


def test_fractions_are_decimal() -> None:
    assert layers(0.29, 100) == [(29,)]  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 9, 40])
def test_windows_are_those_of_geva_et_al(k: int) -> None:
    centred = [range(max(0, at - k // 2), min(L, at + -(-k // 2))) for at in range(L)]
    assert layers({"window": k}) == sorted({tuple(window) for window in centred})


def test_windows_and_layers_side_by_side() -> None:
    assert layers([{"window": 3}, 0], 3) == [(0,), (0, 1), (0, 1, 2), (1, 2)]


SOME = (2, 3, 7)
"""Of twelve layers, those with attention."""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", [(2,), (3,), (7,)]),
        ({"together": "all"}, [(2, 3, 7)]),
        ({"window": 1}, [(2,), (3,), (7,)]),
        ({"window": 2}, [(2,), (2, 3), (3, 7)]),
        ({"window": 3}, [(2, 3), (2, 3, 7), (3, 7)]),
        ({"window": 40}, [(2, 3, 7)]),
        ("middle", [(7,)]),
        ([0.0, 0.25, 0.3, 0.6, 0.7, 1.0], [(2,), (3,), (7,)]),
        ({"together": [0.1, 0.5]}, [(2, 7)]),
        ([3, -5], [(3,), (7,)]),
        ([{"window": 2}, 7], [(2,), (2, 3), (3, 7), (7,)]),
    ],
    ids=str,
)
def test_layers_where_only_some_have_attention(value: Any, expected: list[tuple[int, ...]]) -> None:
    found = ablations(spec(layers=value), prompt(), L, H, SOME)
    assert [ablation.layers for ablation in found] == expected
    check(spec(layers=value), L, H, SOME)


@pytest.mark.parametrize("value", ["all", "middle", 0.3, -1, {"window": 3}, {"together": [0, 5]}], ids=str)
def test_all_layers_are_the_same_however_they_are_said(value: Any) -> None:
    assert ablations(spec(layers=value), prompt(), L, H, tuple(range(L))) == ablations(
        spec(layers=value), prompt(), L, H
    )


@pytest.mark.parametrize("value", [[2, 4], {"together": [2, -8]}], ids=str)
def test_a_layer_without_attention_is_named_with_those_that_have(value: Any) -> None:
    index = max(value, key=abs) if isinstance(value, list) else -8
    with pytest.raises(UserError) as error:
        check(spec(layers=value), L, H, SOME)
    said = f"experiment 'knockout': layers: {index} has no attention to cut; layers 2, 3, 7 have"
    assert str(error.value) == said


@pytest.mark.parametrize("value", ["all", "middle", 3, {"window": 2}], ids=str)
def test_a_model_without_attention_has_nothing_to_cut(value: Any) -> None:
    with pytest.raises(UserError, match="experiment 'knockout': layers: no layer of the model has attention"):
        check(spec(layers=value), L, H, ())


@pytest.mark.parametrize(
    ("value", "planned", "found"),
    [
        ("all", None, SOME),
        ("all", SOME, (2, 3)),
        ("all", (2, 3), SOME),
        ({"window": 2}, SOME, (2, 3, 8)),
        ("middle", SOME, (2, 3, 6)),
    ],
    ids=str,
)
def test_a_loaded_model_that_would_be_cut_elsewhere(value: Any, planned: Any, found: Any) -> None:
    with pytest.raises(UserError, match=r"experiment 'knockout': layers: config\.json was understood") as error:
        confirm_layers(spec(layers=value), L, planned, found)
    understood = "all layers" if planned is None else f"layers {', '.join(map(str, planned))}"
    assert f"{understood} have attention, but in the loaded model it is layers " in str(error.value)
    assert f"layers {', '.join(map(str, found))} that have" in str(error.value)
    confirm_layers(spec(layers=value), L, planned, planned or range(L))


@pytest.mark.parametrize(
    ("planned", "found", "named"),
    [(None, SOME, True), ((2, 3, 7), (2, 7), True), ((2, 3), SOME, False), ((2, 3), (2, 7), False)],
    ids=str,
)
def test_naming_layers_by_index_is_advised_only_where_that_helps(planned: Any, found: Any, named: bool) -> None:
    with pytest.raises(UserError) as error:
        confirm_layers(spec(layers="all"), L, planned, found)
    assert ("Name layers by index" in str(error.value.hint)) == named
    assert ("report it to raymi with the config.json" in str(error.value.hint)) != named
    by_index = spec(layers=list(found))
    if named:
        confirm_layers(by_index, L, planned, found)
    else:
        with pytest.raises(UserError, match="7 has no attention to cut; layers 2, 3 have"):
            check(by_index, L, H, planned)


def test_a_loaded_model_is_not_refused_for_layers_that_nothing_asks_for() -> None:
    confirm_layers(spec(layers=[2, 7]), L, None, SOME)
    with pytest.raises(UserError, match="layers: 4 has no attention to cut; layers 2, 3, 7 have"):
        confirm_layers(spec(layers=[2, 4]), L, None, SOME)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", [None]),
        ({"together": "all"}, [None]),
        ({"each": "all"}, [(0,), (1,), (2,), (3,)]),
        (2, [(2,)]),
        ([-1, 0], [(0,), (3,)]),
        ({"together": [3, 1]}, [(1, 3)]),
    ],
    ids=str,
)
def test_heads(value: Any, expected: list[tuple[int, ...] | None]) -> None:
    assert [ablation.heads for ablation in ablations(spec(heads=value), prompt(), L, H)] == expected


PIECES = {"subject": (1, 2), "text:t3": (3,)}


@pytest.mark.parametrize(
    ("queries", "keys", "expected"),
    [
        ("last", "first", [[(4, 0)]]),
        (-2, 1, [[(3, 1)]]),
        (["last", 4, -1], [0, -5], [[(4, 0)]]),
        ("last", "subject", [[(4, 1)], [(4, 2)]]),
        ("last", {"together": "subject"}, [[(4, 1), (4, 2)]]),
        ({"text": "t3"}, {"together": ["subject", "first"]}, [[(3, 0), (3, 1), (3, 2)]]),
        ({"together": [3, 4]}, {"together": [0, 1]}, [[(3, 0), (3, 1), (4, 0), (4, 1)]]),
        ({"together": [3, 4]}, [0, 1], [[(3, 0), (4, 0)], [(3, 1), (4, 1)]]),
        ([3, 4], {"together": [0, 1]}, [[(3, 0), (3, 1)], [(4, 0), (4, 1)]]),
        (1, "all", [[(1, 0)], [(1, 1)]]),
        (1, {"together": "all"}, [[(1, 0), (1, 1)]]),
        # With `all`, what is not causal is left out, and so is a query that no key is left for.
        ("all", {"together": "subject"}, [[(1, 1)], [(2, 1), (2, 2)], [(3, 1), (3, 2)], [(4, 1), (4, 2)]]),
        ("all", "last", [[(4, 4)]]),
        ({"together": "all"}, 3, [[(3, 3), (4, 3)]]),
    ],
    ids=str,
)
def test_edges(queries: Any, keys: Any, expected: list[list[tuple[int, int]]]) -> None:
    found = ablations(spec(queries=queries, keys=keys), prompt(pieces=PIECES), L, H)
    assert [list(ablation.edges) for ablation in found] == expected


def test_every_causal_pair() -> None:
    found = ablations(spec(queries="all", keys="all"), prompt(7), L, H)
    assert [ablation.edges for ablation in found] == [((q, k),) for q in range(7) for k in range(q + 1)]


def test_defaults_are_the_whole_attention_from_last_to_first() -> None:
    assert ablations(spec(), prompt(), L, H) == [Ablation((6,), None, ((4, 0),))]


def test_order_is_by_first_query_then_layers_heads_edges() -> None:
    wide = spec(layers="all", heads={"each": "all"}, queries=["last", 2, 3], keys=[1, 0])
    found = ablations(wide, prompt(), L, H)
    assert found == sorted(found, key=lambda a: (a.edges[0][0], a.layers, a.heads, a.edges))
    assert len(set(found)) == len(found) == 3 * L * H * 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"layers": [3, 12]},
            "experiment 'knockout': layers: 12 is out of range: the model has 12 layers (0 to 11, or -12 to -1)",
        ),
        ({"layers": -13}, "layers: -13 is out of range"),
        ({"heads": 4}, "heads: 4 is out of range: the model has 4 heads"),
        ({"heads": {"together": [0, -5]}}, "heads: -5 is out of range"),
    ],
    ids=str,
)
def test_what_a_model_has_not(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        check(spec(**fields), L, H)
    assert expected in str(error.value)
    check(spec(**fields), 99, 99)


@pytest.mark.parametrize(
    ("queries", "keys", "expected"),
    [
        (5, 0, "experiment 'knockout': prompt 'p': position 5 is out of range: the prompt has 5 tokens"),
        ("last", -6, "position -6 is out of range"),
        (-3, 3, "prompt 'p': key position 3 is after query position 2"),
        (1, "subject", "key position 2 is after query position 1"),
        ("subject", {"together": "subject"}, "key position 2 is after query position 1"),
        ("last", {"text": "nowhere"}, "prompt 'p' has no piece 'text:nowhere'"),
    ],
)
def test_what_a_prompt_has_not(queries: Any, keys: Any, expected: str) -> None:
    with pytest.raises(UserError) as error:
        ablations(spec(queries=queries, keys=keys), prompt(pieces=PIECES), L, H)
    assert expected in str(error.value)


LAYERS = "allowed: all, middle, an index, a negative index, a fraction of depth from 0.0 to 1.0, {window: k}"


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"layers": "midle"}, ("layers",), f"found 'midle'; {LAYERS} (did you mean 'middle'?)"),
        ({"layers": True}, ("layers",), f"found True; {LAYERS}"),
        ({"layers": None}, ("layers",), f"found nothing; {LAYERS}"),
        ({"layers": 1.5}, ("layers",), f"found 1.5; {LAYERS}"),
        ({"layers": {"widow": 3}}, ("layers",), f"found {{'widow': 3}}; {LAYERS} (did you mean 'window'?)"),
        ({"layers": {"ech": 3}}, ("layers",), f"found {{'ech': 3}}; {LAYERS} (did you mean 'each'?)"),
        ({"layers": {"window": 0}}, ("layers", "each", 0, "window"), "greater than or equal to 1"),
        ({"layers": {"window": 2.0}}, ("layers", "each", 0, "window"), "valid integer"),
        ({"layers": {"together": {"window": 3}}}, ("layers", "together"), "found a window; windows are taken each"),
        ({"layers": []}, ("layers", "each"), "found an empty list, which cuts nothing"),
        ({"heads": {"together": []}}, ("heads", "together"), "found an empty list, which cuts nothing"),
        ({"heads": 0.5}, ("heads",), "found 0.5; allowed: all, an index, a negative index"),
        ({"heads": ["all", 1]}, ("heads", "each"), "found all among others"),
        ({"heads": {"each": 1, "together": 2}}, ("heads",), "allowed: one of each and together"),
        (
            {"heads": {"each": 1, "togther": 2}},
            ("heads", "togther"),
            "unknown field; allowed: each, together (did you mean 'together'?)",
        ),
        ({"keys": "frist"}, ("keys",), "(did you mean 'first'?)"),
        ({"keys": {"text": ""}}, ("keys", "each", 0, "text"), "at least 1 character"),
        ({"queries": "first", "keys": "last"}, ("keys",), "found key 'last' after query 'first'"),
        ({"queries": 2, "keys": {"together": [0, 5]}}, ("keys",), "found key 5 after query 2"),
        ({"queries": [-1, -3], "keys": -1}, ("keys",), "found key -1 after query -3"),
        ({"queries": "first", "keys": 1}, ("keys",), "found key 1 after query 'first'"),
        ({"layrs": "all"}, ("layrs",), "unknown field"),
        ({"kind": "knockot"}, ("kind",), "knockout"),
        ({"prompts": []}, ("prompts",), "at least one"),
    ],
    ids=str,
)
def test_bad_fields(fields: dict[str, Any], place: tuple[str | int, ...], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        spec(**fields)
    [only] = error.value.errors()
    assert only["loc"][: len(place)] == place
    assert message in only["msg"]


@pytest.mark.parametrize(
    "fields",
    [
        {"queries": 2, "keys": 2},
        {"queries": "first", "keys": "first"},
        {"queries": "all", "keys": 3},
        {"queries": -3, "keys": 2},
    ],
    ids=str,
)
def test_keys_that_may_be_before_their_query(fields: dict[str, Any]) -> None:
    assert ablations(spec(**fields), prompt(), L, H)


AXES = {
    "layers": ["all", "middle", [0, -1], 1.0, {"window": 3}, {"together": [0.5, 1]}],
    "heads": ["all", {"each": "all"}, [0, 2], {"together": [1, 3]}],
    "queries": ["last", [3, 4], "all", {"together": [-1, {"text": "t3"}]}],
    "keys": ["first", "all", {"together": "all"}, {"each": [0, {"text": "t3"}]}],
}


@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in AXES.items()}))
def test_specs_survive_json_and_rows_are_what_they_say(fields: dict[str, Any]) -> None:
    one = spec(**fields)
    again = KnockoutSpec.model_validate(json.loads(json.dumps(one.model_dump(mode="json"))))
    assert (again, again.canonical) == (one, one.canonical)
    text = prompt(pieces=PIECES)
    try:
        found = ablations(one, text, L, H)
    except UserError:
        return
    assert found
    assert len({ablation_id("m", text.token_ids, ablation, H) for ablation in found}) == len(found)
    for ablation in found:
        assert list(ablation.layers) == sorted(set(ablation.layers))
        assert set(ablation.layers) <= set(range(L))
        assert ablation.edges
        assert all(0 <= key <= query < 5 for query, key in ablation.edges)


def test_canonical_is_the_same_however_written() -> None:
    plain = spec(layers="all", heads="all", queries="last", keys="first", name="knockout")
    full = spec(layers={"each": ["all"]}, heads={"together": ["all"]}, queries={"each": "last"})
    assert plain.canonical == full.canonical
    assert len({one.canonical for one in (plain, spec(layers=0), spec(layers=0.0), spec(heads={"each": "all"}))}) == 4


def test_ablation_id() -> None:
    one = Ablation((1, 2), None, ((4, 0), (4, 1)))
    known = ablation_id("org/model", (7, 8, 9, 10, 11), one, H)
    assert known == ablation_id("org/model", [7, 8, 9, 10, 11], Ablation((1, 2), (0, 1, 2, 3), one.edges), H)
    assert known == "a210edb30785024a"  # runs of years are joined by it: it never changes
    others = [
        ablation_id("org/other", (7, 8, 9, 10, 11), one, H),
        ablation_id("org/model", (7, 8, 9, 10, 12), one, H),
        ablation_id("org/model", (7, 8, 9, 10, 11), Ablation((1,), None, one.edges), H),
        ablation_id("org/model", (7, 8, 9, 10, 11), Ablation((1, 2), (0, 1, 2), one.edges), H),
        ablation_id("org/model", (7, 8, 9, 10, 11), Ablation((1, 2), (0, 1, 2, 3), one.edges), H + 1),
        ablation_id("org/model", (7, 8, 9, 10, 11), Ablation((1, 2), None, ((4, 0),)), H),
    ]
    assert len({known, *others}) == 7


def test_a_null_list_of_heads_is_kept_in_rows() -> None:
    assert SCHEMA.field("heads").nullable
    assert SCHEMA.names[:9] == [
        "unit_id", "ablation_id", "experiment", "model_id", "revision", "dtype", "prompt_id", "n_tokens", "layers",
    ]  # fmt: skip

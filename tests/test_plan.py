"""Which models run, and which units they are given."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.costs import Cost, full_forward_flops
from raymi.experiments.knockout.spec import Ablation, KnockoutSpec, ablation_id, ablations
from raymi.experiments.sae.spec import TABLES, Injection
from raymi.experiments.unit import Unit
from raymi.job import Job, load_job, make_job
from raymi.plan.estimate import EFFICIENCY, Rates, estimate
from raymi.plan.selection import Rejected, selected
from raymi.plan.units import CutRule, units
from raymi.plan.verification import COMPANY_FORWARDS, company, drawn
from raymi.prompts import Prompt, TokenizedPrompt, tokenize
from tests.tiny_tokenizers import words

JOBS = Path(__file__).parent.parent / "jobs"


def model(id: str = "org/small", **fields: Any) -> CachedModel:
    """SmolLM2 135M, as the catalog describes it, or another."""
    return dataclasses.replace(
        CachedModel(
            id=id,
            revision="a" * 40,
            path=Path("/cache") / id,
            model_type="llama",
            n_layers=30,
            n_heads=9,
            hidden_size=576,
            vocab_size=49_152,
            context=2_048,
            parameters=134_515_008,
            size_on_disk=269_000_000,
            dtype="bfloat16",
            reason=None,
        ),
        **fields,
    )


def job(*experiments: dict[str, Any], **fields: Any) -> Job:
    given = [{"kind": "knockout", **experiment} for experiment in experiments or ({"layers": "all"},)]
    return make_job({"name": "j", "prompts": [{"text": "a"}], "experiments": given, **fields})


def prompt(id: str = "a", size: int = 5, start: int = 0, **fields: Any) -> TokenizedPrompt:
    ids = tuple(range(start, start + size))
    text = TokenizedPrompt(Prompt(id, id), ids, tuple(map(str, ids)), False, 1, None, {"subject": (1, 2)})
    return dataclasses.replace(text, **fields)


# Models.

CATALOG = [
    model("a/big", parameters=7_000_000_000),
    model("a/broken", reason="no tokenizer"),
    model("a/small"),
    model("b/shallow", n_layers=4),
    model("b/unknown", parameters=None),
]


def find(reference: str) -> CachedModel:
    name, _, revision = reference.partition("@")
    for known in CATALOG:
        if known.id == name:
            return dataclasses.replace(known, revision=revision * 40 if revision else known.revision)
    raise UserError(f"no model {reference}")


def ids(models: Sequence[CachedModel]) -> list[str]:
    return [each.id for each in models]


def test_patterns_skip_what_cannot_run_and_say_so() -> None:
    chosen, rejected = selected(job(models="a/*"), CATALOG, find)
    assert ids(chosen) == ["a/big", "a/small"]
    assert rejected == [Rejected("a/broken", "no tokenizer", named=False)]


@pytest.mark.parametrize("include", [["a/small", "a/broken"], ["a/*", "a/broken"], ["a/broken", "a/*"]])
def test_a_named_model_that_cannot_run_is_a_failure(include: list[str]) -> None:
    chosen, rejected = selected(job(models=include), CATALOG, find)
    assert "a/small" in ids(chosen)
    assert rejected == [Rejected("a/broken", "no tokenizer", named=True)]


def test_a_named_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no model a/smal"):
        selected(job(models=["a/*", "a/smal"]), CATALOG, find)


def test_layers_without_attention_are_an_error_of_the_models_that_have_such() -> None:
    some = [*CATALOG, model("c/hybrid", attention_layers=(2, 5)), model("c/states", attention_layers=())]
    chosen, rejected = selected(job({"layers": 4, "name": "four"}, models=["a/small", "c/*"]), some, find)
    assert ids(chosen) == ["a/small"]
    assert rejected == [
        Rejected("c/hybrid", "experiment 'four': layers: 4 has no attention to cut; layers 2, 5 have", named=True),
        Rejected("c/states", "experiment 'four': layers: no layer of the model has attention", named=True),
    ]
    assert ids(selected(job({"layers": "all"}, models=["a/small", "c/*"]), some, find)[0]) == ["a/small", "c/hybrid"]


def test_each_model_once_in_the_order_of_the_job() -> None:
    chosen, _ = selected(job(models=["b/shallow", "*", "a/small"]), CATALOG, find)
    assert ids(chosen) == ["b/shallow", "a/big", "a/small", "b/unknown"]


def test_revisions() -> None:
    chosen, _ = selected(job(models=["a/small@b", "a/small", "a/small@c"]), CATALOG, find)
    assert [each.revision[0] for each in chosen] == ["b", "a", "c"]
    excluding = {"include": ["a/small@b", "a/small"], "exclude": ["a/*@bbb"]}
    assert [each.revision[0] for each in selected(job(models=excluding), CATALOG, find)[0]] == ["a"]


def test_exclude_and_largest_size() -> None:
    chosen, rejected = selected(job(models={"exclude": ["b/s*", "*broken"], "max_parameters": "1B"}), CATALOG, find)
    assert ids(chosen) == ["a/small"]
    assert rejected == [
        Rejected("a/big", "7,000,000,000 parameters, where the job allows 1,000,000,000", named=False),
        Rejected("b/unknown", "an unknown number of parameters, where the job allows 1,000,000,000", named=False),
    ]


def test_a_pattern_that_matches_nothing_is_told() -> None:
    _, rejected = selected(job(models=["a/small", "c/*"]), CATALOG, find)
    assert rejected == [Rejected("c/*", "matches no cached model", named=False)]


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"layers": [0, 29]}, "'knockout': layers: 29 is out of range: the model has 4 layers (0 to 3, or -4 to -1)"),
        ({"layers": 0, "heads": 8, "name": "deep"}, None),
    ],
)
def test_models_without_a_layer_fail_by_name_and_others_run(axes: dict[str, Any], reason: str | None) -> None:
    chosen, rejected = selected(job(axes, models=["a/small", "b/sh*"]), CATALOG, find)
    assert rejected == ([Rejected("b/shallow", f"experiment {reason}", named=True)] if reason else [])
    assert ids(chosen) == (["a/small"] if reason else ["a/small", "b/shallow"])


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ("a/broken", ["no model to run", "a/broken: no tokenizer"]),
        ("c/*", ["no model to run", "c/*: matches no cached model", "raymi fetch"]),
        ({"include": "a/*", "exclude": "*"}, ["no model to run"]),
    ],
)
def test_no_model_left(models: Any, expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        selected(job(models=models), CATALOG, find)
    assert all(part in str(error.value) for part in expected)


def test_an_empty_cache() -> None:
    with pytest.raises(UserError, match=r"no model to run\n  \*: the cache is empty\n.*raymi fetch"):
        selected(job(), [], find)


def test_more_models_do_not_help_a_job_that_no_model_can_serve() -> None:
    with pytest.raises(UserError, match="out of range") as error:
        selected(job({"layers": 99}, models="a/small"), CATALOG, find)
    assert error.value.hint is None


# Units.

HEADS = {"layers": "all", "heads": {"each": "all"}, "queries": "all", "keys": {"together": "all"}}


def cells(cut: Sequence[Unit]) -> list[tuple[str, Ablation]]:
    return [(id, ablation) for unit in cut for id, part in unit.items for ablation in part]


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    most=st.integers(1, 100),
    budget=st.integers(1, 10**13),
)
def test_units_hold_everything_once(sizes: list[int], most: int, budget: int) -> None:
    one, small = job({**HEADS, "heads": "all"}), model(n_layers=3, n_heads=2)
    prompts = [prompt(f"p{index}", size) for index, size in enumerate(sizes)]
    rule = CutRule(unit_ablations=most, unit_flops=budget)
    cut = units(one, one.experiments[0], small, prompts, rule)
    expected = [(p.prompt.id, a) for p in prompts for a in ablations(one.experiments[0], p, 3, 2)]
    assert sorted(cells(cut), key=str) == sorted(expected, key=str)
    assert len({unit.unit_id for unit in cut}) == len(cut)
    length = {p.prompt.id: len(p.token_ids) for p in prompts}
    for unit in cut:
        [n_tokens] = {length[id] for id, _ in unit.items}
        cost = Cost.of(small, n_tokens)
        measured = sum(cost.restarted(*a.starts_at()) for _, part in unit.items for a in part)
        assert unit.n_ablations <= most
        assert unit.n_ablations == 1 or measured <= budget
        assert unit.flops == measured + len(unit.items) * full_forward_flops(small, n_tokens)
    assert units(one, one.experiments[0], small, prompts, rule) == cut


def test_units_follow_length_then_prompt_then_ablation() -> None:
    one = job({"layers": "all"})
    cut = units(one, one.experiments[0], model(), [prompt("b", 5), prompt("long", 7), prompt("a", 5)], CutRule(40))
    assert [[(id, len(part)) for id, part in unit.items] for unit in cut] == [
        [("b", 30)],  # "a" would not fit behind it, and is not split
        [("a", 30)],
        [("long", 30)],
    ]
    assert [a.layers[0] for _, a in cells(cut)] == [*range(30)] * 3


def test_the_job_says_how_many_ablations_a_unit_holds() -> None:
    one = job({"layers": "all"}, unit_ablations=7)
    assert [u.n_ablations for u in units(one, one.experiments[0], model(), [prompt()])] == [7, 7, 7, 7, 2]


def test_only_the_prompts_that_an_experiment_chooses() -> None:
    one = make_job(
        {
            "name": "j",
            "prompts": [{"id": "x/1", "text": "a"}, {"id": "y/1", "text": "a"}],
            "experiments": [{"kind": "knockout", "layers": "all", "prompts": "x/*"}],
        }
    )
    cut = units(one, one.experiments[0], model(), [prompt("x/1"), prompt("y/1")])
    assert {id for id, _ in cells(cut)} == {"x/1"}


def test_unit_ids_are_pinned() -> None:
    """A run that goes on after an upgrade must find its units again."""
    one = job({"layers": "middle"})
    [unit] = units(one, one.experiments[0], model(), [prompt()])
    assert unit.unit_id == "2ed62de4a13866a0"


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (experiment, job, model, prompt)
    "experiment": ({"layers": "middle", "heads": 0}, {}, {}, {}),
    "name": ({"layers": "middle", "name": "other"}, {}, {}, {}),
    "dtype": ({}, {"dtype": "bfloat16"}, {}, {}),
    "top_k": ({}, {"top_k": 3}, {}, {}),
    "model": ({}, {}, {"id": "org/other"}, {}),
    "commit": ({}, {}, {"revision": "b" * 40}, {}),
    "layers": ({}, {}, {"n_layers": 28}, {}),
    "prompt": ({}, {}, {}, {"id": "other"}),
    "tokens": ({}, {}, {}, {"start": 1}),
    "answer": ({}, {}, {}, {"answer_id": 7}),
    "wrong": ({}, {}, {}, {"wrong_id": 7}),
}


def test_a_unit_is_another_when_its_rows_would_be() -> None:
    def unit_id(experiment: dict[str, Any], fields: dict[str, Any], of: dict[str, Any], text: dict[str, Any]) -> str:
        one = job(experiment or {"layers": "middle"}, **fields)
        [unit] = units(one, one.experiments[0], model(**of), [prompt(**text)])
        return unit.unit_id

    found = {name: unit_id(*change) for name, change in CHANGES.items()}
    assert len({unit_id({}, {}, {}, {}), *found.values()}) == len(CHANGES) + 1
    same = unit_id({"layers": "middle"}, {"device": "cpu", "seed": 3, "models": "x/*"}, {"size_on_disk": 1}, {})
    assert same == unit_id({}, {}, {}, {})


def test_prompts_that_do_not_fit() -> None:
    one = job({"layers": "all"})
    with pytest.raises(UserError, match="org/small: prompt 'a' has 9 tokens, more than the model's context of 8"):
        units(one, one.experiments[0], model(context=8), [prompt(size=9)])
    for context in (9, None):
        assert units(one, one.experiments[0], model(context=context), [prompt(size=9)])


def test_a_config_that_does_not_say_how_large_the_model_is() -> None:
    one = job({"layers": "all"})
    with pytest.raises(UserError, match=r"org/small: its config\.json does not say how many layers"):
        units(one, one.experiments[0], model(n_layers=None), [prompt()])


def test_a_hundred_thousand_ablations_are_planned_at_once() -> None:
    one = job({"layers": "all", "heads": {"each": "all"}, "queries": "all", "keys": "all"})
    begin = time.process_time()
    cut = units(one, one.experiments[0], model(), [prompt(size=28)])
    assert time.process_time() - begin < 4  # about 1 s on an idle core
    assert sum(unit.n_ablations for unit in cut) == 30 * 9 * 28 * 29 // 2 > 100_000


# The jobs that ship, by their numbers of rows.


def rows(name: str, n_layers: int, n_heads: int) -> dict[str, int]:
    """Rows of every experiment of a shipped job on a model whose tokenizer knows all the words."""
    one = load_job(JOBS / f"{name}.yaml")
    known = [word for p in one.prompts for word in f"{p.text} {p.answer} {p.wrong}".split()]
    tokenizer = words(list(dict.fromkeys(known)))
    prompts = tokenize(one.prompts, tokenizer, bos="auto", chat_template=False, pieces=one.pieces, model_id="m")
    of = model(n_layers=n_layers, n_heads=n_heads)
    found: dict[str, int] = {}
    for spec in (spec for spec in one.experiments if isinstance(spec, KnockoutSpec)):
        cut = units(one, spec, of, prompts)
        texts = {p.prompt.id: p.token_ids for p in prompts}
        names = {ablation_id("m", texts[id], ablation, n_heads) for id, ablation in cells(cut)}
        assert len(names) == len(cells(cut))
        found[spec.name] = len(names)
    return found


@pytest.mark.parametrize(("n_layers", "n_heads"), [(30, 9), (4, 4), (12, 1), (1, 2)])
def test_rows_of_the_jobs_that_ship(n_layers: int, n_heads: int) -> None:
    assert rows("knockout", n_layers, n_heads) == {"knockout": 1}
    assert rows("heads", n_layers, n_heads) == {"heads": n_layers * n_heads}
    assert rows("demo", n_layers, n_heads) == {"heads": 2 * n_layers * n_heads, "middle": 54}
    # Windows of 5 around every layer; in a model of few layers some of them are the same.
    windows = len({(max(0, at - 2), min(n_layers, at + 3)) for at in range(n_layers)})
    assert rows("subject", n_layers, n_heads) == {"subject": 54 * windows}
    assert windows == n_layers or n_layers < 5


def test_the_reference_cell() -> None:
    one = load_job(JOBS / "knockout.yaml")
    [spec], [text] = one.experiments, one.prompts
    assert (text.text, text.answer) == ("The capital of France is", " Paris")
    assert ablations(spec, prompt(size=5), 16, 32) == [Ablation((8,), None, ((4, 0),))]


# What it costs.


def test_flops_of_a_full_forward() -> None:
    body, embedding = 134_515_008 - 49_152 * 576, 49_152 * 576
    exact = 2 * body * 5 + 4 * 25 * 576 * 30 + 2 * embedding
    assert full_forward_flops(model(), 5) == pytest.approx(exact, rel=1e-6)
    assert full_forward_flops(model(parameters=None, hidden_size=None, vocab_size=None, n_layers=None), 5) == 0


def test_flops_of_a_cone() -> None:
    cost = Cost.of(model(), 100)

    def cone(ablation: Ablation) -> int:
        return cost.restarted(*ablation.starts_at())

    everything = cone(Ablation((0,), None, ((0, 0),)))
    assert everything == cost.full
    head = 2 * 49_152 * 576
    assert cone(Ablation((15, 20), (3,), ((99, 0),))) - head == (everything - head) // 2 // 100
    assert cone(Ablation((0,), None, ((50, 3), (99, 0)))) - head == (everything - head) // 2


RATES = Rates(
    flops=1e11,
    load_bytes=1e9,
    start_seconds=3,
    step_seconds=1e-3,
    process_bytes=500_000_000,
    device="cpu",
    free_bytes=8 * 2**30,
)


def test_estimate() -> None:
    one = job({"layers": "all"})
    texts = {"a": prompt()}
    cut = units(one, one.experiments[0], model(), list(texts.values()))
    found = estimate(one, model(), cut, texts, RATES)
    weights = 134_515_008 * 4
    assert found.forwards == 2  # the clean run, and one sweep of 30 ablations
    work = cut[0].flops / (EFFICIENCY * 1e11)
    twice = 8 * (2 + 1 + COMPANY_FORWARDS) * full_forward_flops(model(), 5) / (EFFICIENCY * 1e11)
    assert found.seconds == pytest.approx(3 + weights / 1e9 + 2 * 30 * 1e-3 + work + twice)
    assert estimate(job({"layers": "all"}, verify=0), model(), cut, texts, RATES).seconds < found.seconds - 0.9 * twice
    assert 500_000_000 + weights < found.peak_bytes < 2**31
    half = estimate(job({"layers": "all"}, dtype="bfloat16"), model(), cut, texts, RATES)
    assert found.peak_bytes - half.peak_bytes >= weights // 2

    slow = job({"layers": "all"}, engine="full")
    by_full = estimate(slow, model(), units(slow, slow.experiments[0], model(), [texts["a"]]), texts, RATES)
    assert by_full.seconds > found.seconds


def test_verified_ablations_are_drawn_by_seed_from_what_is_measured() -> None:
    one = job({"layers": "all", "heads": {"each": "all"}}, verify=5)
    texts = [prompt("a"), prompt("b", start=3)]
    measured = {(p.prompt.id, a) for p in texts for a in ablations(one.experiments[0], p, 30, 9)}
    found = [(p.prompt.id, a) for _, p, a in drawn(one, model(), texts)]
    assert len(found) == 5
    assert set(found) <= measured
    assert found == [(p.prompt.id, a) for _, p, a in drawn(one, model(), texts)]
    again = job({"layers": "all", "heads": {"each": "all"}}, verify=5, seed=1)
    assert found != [(p.prompt.id, a) for _, p, a in drawn(again, model(), texts)]
    assert drawn(job({"layers": "all"}, verify=0), model(), texts) == []


def test_what_is_verified_is_measured_in_the_company_of_its_unit() -> None:
    one = job({"layers": "all", "heads": {"each": "all"}}, verify=5)
    spec, shape = one.experiments[0], model()
    texts = [prompt("a"), prompt("b", start=3), prompt("longer", size=9), prompt("c", start=1)]
    its = ablations(spec, texts[1], 30, 9)
    found = company(one, spec, shape, texts, texts[1], its[40])
    assert its[40] in {p.prompt.id: part for p, part in found}["b"]
    cost = Cost.of(shape, 5)
    assert 8 < sum(len(part) for _, part in found) <= 512
    assert sum(cost.restarted(*each.starts_at()) for _, part in found for each in part) <= 2 * cost.full
    assert "longer" not in [p.prompt.id for p, _ in found]
    # Others of its length make up for a prompt that has but few.
    few = job({"layers": 3})
    spec = few.experiments[0]
    together = company(few, spec, shape, texts, texts[1], ablations(spec, texts[1], 30, 9)[0])
    assert [p.prompt.id for p, _ in together] == ["b", "c", "a"]
    many = [prompt(f"p{i}", start=i) for i in range(50)]
    assert len(company(few, spec, shape, many, many[48], ablations(spec, many[48], 30, 9)[0])) == 4
    with pytest.raises(ValueError, match="does not measure"):
        company(few, spec, shape, texts, texts[1], its[40])


# Autoencoders.

SAES = [
    SaeRef("org/s:a", "org/s@c:a", "c", "blocks.3.hook_resid_post", None, 1000),
    SaeRef("org/s:b", "org/s@c:b", "c", "blocks.9.hook_resid_post", None, 4000),
]


def saes_job(measure: str = "quality", **fields: Any) -> Job:
    given = {"features": [1, 2], "strengths": [5.0, 50.0]} if measure == "injection" else {}
    top = {key: fields.pop(key) for key in list(fields) if key in Job.model_fields}
    experiment = {"kind": "sae", "measure": measure, "saes": "*", **given, **fields}
    return make_job({"name": "j", "prompts": [{"text": "a"}], "experiments": [experiment], **top})


def saes_units(one: Job, *prompts: TokenizedPrompt, saes: Sequence[SaeRef] = SAES, **fields: Any) -> list[Unit]:
    return units(one, one.experiments[0], model(**fields), list(prompts) or [prompt()], None, saes)


@pytest.mark.parametrize("measure", ["features", "quality", "ablation"])
def test_every_text_is_read_by_every_autoencoder(measure: str) -> None:
    cut = saes_units(saes_job(measure), prompt("b", 5), prompt("long", 7), prompt("a", 5))
    assert [id for unit in cut for id, _ in unit.items] == ["b", "a", "long"]
    assert all(work == tuple(SAES) for unit in cut for _, work in unit.of(SaeRef))
    assert sum(unit.n_ablations for unit in cut) == 6


def test_injections_are_cut_like_ablations() -> None:
    cut = saes_units(saes_job("injection", unit_ablations=3), prompt("a"), prompt("b"))
    assert [unit.n_ablations for unit in cut] == [3, 3, 2, 3, 3, 2]
    found = [each for unit in cut for _, work in unit.of(Injection) for each in work]
    asked = Injection(SAES[0], 1, 5.0, (4,))
    assert (len(found), len(set(found)), found[0]) == (16, 8, asked)


def test_units_of_texts_end_where_the_arithmetic_says() -> None:
    texts = [prompt(f"p{index}", 128, start=index) for index in range(100)]
    sizes = {measure: [len(u.items) for u in saes_units(saes_job(measure), *texts)] for measure in TABLES}
    assert sizes["features"] == [100]
    assert len(sizes["ablation"]) >= 100  # every one of them is hundreds of forwards
    assert 2 < len(sizes["quality"]) < 100
    assert all(sum(sizes) == 100 for measure, sizes in sizes.items() if measure not in ("ablation",))
    costs = {measure: sum(u.flops for u in saes_units(saes_job(measure), *texts)) for measure in TABLES}
    assert costs["features"] < costs["injection"] < costs["quality"] < costs["ablation"]
    by_full = sum(unit.flops for unit in saes_units(saes_job("quality", engine="full"), *texts))
    assert by_full > costs["quality"]


def test_no_autoencoder_no_unit() -> None:
    assert saes_units(saes_job(), saes=[]) == []


SAE_CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (experiment and job, model, prompt, autoencoder)
    "experiment": ({"skip": {"first": 1}}, {}, {}, {}),
    "dtype": ({"dtype": "bfloat16"}, {}, {}, {}),
    "model": ({}, {"id": "org/other"}, {}, {}),
    "commit": ({}, {"revision": "b" * 40}, {}, {}),
    "prompt": ({}, {}, {"id": "other"}, {}),
    "tokens": ({}, {}, {"start": 1}, {}),
    "answer": ({}, {}, {"answer_id": 7}, {}),
    "name": ({}, {}, {}, {"name": "org/s:c"}),
    "version": ({}, {}, {}, {"version": "d"}),
    "site": ({}, {}, {}, {"site": "blocks.4.hook_resid_post"}),
    "scale": ({}, {}, {}, {"input_scale": 2.0}),
}


@pytest.mark.parametrize("measure", ["quality", "ablation"])
def test_a_unit_with_autoencoders_is_another_when_its_rows_would_be(measure: str) -> None:
    def unit_id(fields: dict[str, Any], of: dict[str, Any], text: dict[str, Any], sae: dict[str, Any]) -> str:
        saes = [dataclasses.replace(SAES[0], **sae)]
        [unit] = saes_units(saes_job(measure, **fields), prompt(**text), saes=saes, **of)
        return unit.unit_id

    found = {name: unit_id(*change) for name, change in SAE_CHANGES.items()}
    assert len({unit_id({}, {}, {}, {}), *found.values()}) == len(SAE_CHANGES) + 1
    assert unit_id({}, {}, {}, {"where": "/elsewhere"}) == unit_id({"seed": 3}, {}, {}, {})
    # How many changed tokens are listed matters where tokens change.
    assert (unit_id({"top_k": 3}, {}, {}, {}) == unit_id({}, {}, {}, {})) == (measure == "quality")


def test_units_with_autoencoders_are_pinned() -> None:
    """A run that goes on after an upgrade must find its units again."""
    cut = {measure: saes_units(saes_job(measure))[0].unit_id for measure in TABLES}
    assert cut == {
        "features": "71e81d97fd019521",
        "quality": "8456921586b89637",
        "injection": "15e9886c39512ace",
        "ablation": "82ebe01892e8126f",
    }


def test_a_corpus_brings_its_chunks_and_prompts_stay_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("some text")
    one = make_job(
        {
            "name": "j",
            "prompts": [{"id": "a", "text": "a"}],
            "experiments": [
                {"kind": "knockout", "layers": "middle"},
                {"kind": "sae", "measure": "quality", "corpus": {"file": tmp_path / "c.txt"}},
                {"kind": "sae", "measure": "features"},
            ],
        }
    )
    chunk = f"{one.corpora[0].id}/000000"
    texts = [prompt("a"), prompt(chunk, start=2)]
    cut = [units(one, spec, model(), texts, None, SAES) for spec in one.experiments]
    assert [[id for unit in its for id, _ in unit.items] for its in cut] == [["a"], [chunk], ["a"]]


def test_every_experiment_is_verified_however_many_texts_another_has() -> None:
    one = make_job(
        {
            "name": "j",
            "prompts": [{"id": "one", "text": "a"}, *({"id": f"many/{i}", "text": "a"} for i in range(99))],
            "experiments": [
                {"kind": "knockout", "layers": "all", "prompts": "one"},
                {"kind": "sae", "measure": "quality", "prompts": "many/*"},
                {"kind": "sae", "measure": "injection", "features": 1, "strengths": 1.0, "prompts": "many/*"},
                {"kind": "sae", "measure": "features", "name": "of none"},
            ],
            "verify": 8,
        }
    )
    texts = [prompt(text.id) for text in one.prompts]
    found = drawn(one, model(), texts, {"quality": SAES, "injection": SAES})
    kinds = {spec.name: {type(work) for other, _, work in found if other is spec} for spec in one.experiments}
    assert kinds == {"knockout": {Ablation}, "quality": {SaeRef}, "injection": {Injection}, "of none": set()}
    assert all(one.chooses(spec, text.prompt.id) for spec, text, _ in found)
    assert found == drawn(one, model(), texts, {"quality": SAES, "injection": SAES})


@pytest.mark.parametrize("measure", list(TABLES))
def test_estimates_with_autoencoders(measure: str) -> None:
    one, texts = saes_job(measure), {f"p{i}": prompt(f"p{i}", 64, start=i) for i in range(4)}
    cut = saes_units(one, *texts.values())
    found = estimate(one, model(), cut, texts, RATES)
    assert found.seconds > 3
    # The clean run, with each autoencoder's output and without anything; or with all changes side by side.
    assert found.forwards == {"features": 1, "quality": 5, "injection": 2}.get(measure, found.forwards)
    wide = [dataclasses.replace(ref, d_sae=10**6) for ref in SAES]
    more = estimate(one, model(), saes_units(one, *texts.values(), saes=wide), texts, RATES)
    assert more.peak_bytes - found.peak_bytes > 1.9 * 10**6 * 2 * 576 * 4


# Layers without attention.

UNIT_IDS = ["7bb4ff1756009cc1", "bc33f20d772284ef"]
"""As they were before there was anything to know of layers without attention."""


def test_units_and_what_is_measured_twice_keep_to_layers_that_have_attention() -> None:
    hybrid = model(attention_layers=(2, 5, 11))
    sweep = job({"layers": "all", "heads": {"each": "all"}}, verify=40)
    cut = units(sweep, sweep.experiments[0], hybrid, [prompt()])
    measured = [work.layers for unit in cut for _, its in unit.of(Ablation) for work in its]
    assert measured == [(layer,) for layer in (2, 5, 11) for _ in range(9)]
    assert {work.layers for _, _, work in drawn(sweep, hybrid, [prompt()]) if isinstance(work, Ablation)} == {*measured}


def test_units_of_models_that_have_it_everywhere_are_called_what_they_were() -> None:
    sweep = job({"layers": "all"}, {"layers": {"window": 3}, "name": "windows"})
    known = [unit.unit_id for spec in sweep.experiments for unit in units(sweep, spec, model(), [prompt()])]
    assert known == UNIT_IDS
    said = model(attention_layers=tuple(range(30)))
    assert [unit.unit_id for spec in sweep.experiments for unit in units(sweep, spec, said, [prompt()])] == UNIT_IDS


def test_a_plan_is_confirmed_for_each_experiment_on_attention() -> None:
    asked = job({"layers": 2, "name": "two"}, {"layers": "all", "name": "all"})

    def confirm(model: CachedModel, found: list[int]) -> None:
        for spec in asked.experiments:
            spec.confirm(model, found, None)

    confirm(model(attention_layers=(2, 5)), [2, 5])
    with pytest.raises(
        UserError, match=r"experiment 'all': layers: config\.json was understood to say that all layers"
    ):
        confirm(model(), [2, 5])
    with pytest.raises(UserError, match="experiment 'two': layers: 2 has no attention to cut; layers 5 have"):
        confirm(model(), [5])

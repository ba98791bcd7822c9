"""Features added and taken out: rows against plain forwards with plain hooks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae import cells
from raymi.experiments.sae.run import run
from raymi.experiments.sae.spec import SCHEMAS, Injection, SaeSpec, cell_id
from raymi.experiments.unit import Unit
from raymi.model.engine import Engine, Way
from raymi.model.hooked import HookedModel, NotFinite
from tests import oracles
from tests.experiments.sae.scene import GIVEN, REFS, SAES, SPECIAL, TEXTS, Change, Plain, counts, measured, part, unit
from tests.experiments.sae.test_run import EVERY, spec
from tests.families import PROMPT, build
from tests.sae.making import sae

WAYS: tuple[Way, ...] = ("cone", "layers", "full")
INJECTION = spec("injection", features=[3, 41], strengths=[6, -2.5], positions={"each": ["last", 3]})
TOGETHER = spec("injection", features=3, strengths=6, positions={"together": [2, 5]})


def check(row: dict[str, Any], plain: Plain, changes: dict[str, Change]) -> None:
    """What a row says was changed, by a plain forward in which it was."""
    of = TEXTS[row["prompt_id"]]
    clean_V, changed_V = (plain.logits(of.token_ids, each)[-1] for each in ({}, changes))
    shift = float((changed_V - clean_V).abs().max())
    assert row["logit_shift"] == pytest.approx(shift, abs=1e-4)
    assert row["kl"] == pytest.approx(oracles.kl(clean_V, changed_V), rel=1e-3, abs=1e-6)
    for token, name in ((5, "answer"), (11, "wrong")):
        assert row[f"{name}_id"] == token
        assert row[f"{name}_logit_clean"] == pytest.approx(float(clean_V[token]), abs=1e-4)
        assert row[f"{name}_logit_ablated"] == pytest.approx(float(changed_V[token]), abs=1e-4)
    assert row["logit_diff"] == pytest.approx(float(clean_V[5] - changed_V[5]), abs=1e-4)
    assert len(row["changed"]) == 4
    assert 0 <= row["clean_error"] < 1e-4


# -- injections --------------------------------------------------------------------------------------------------------


def adding(ref: SaeRef, feature: int, strength: float, positions: list[int]) -> dict[str, Change]:
    made = SAES[ref.name]

    def change(x_TD: Tensor) -> Tensor:
        x_TD = x_TD.clone()
        x_TD[positions, part(made)] += strength * made._stored["W_dec"][feature] / (made.about.output_scale or 1)
        return x_TD

    return {ref.written: change}


@pytest.mark.oracle
@pytest.mark.parametrize(("asked_for", "n_rows"), [(INJECTION, 16), (TOGETHER, 2)], ids=["each", "together"])
@pytest.mark.parametrize("ref", EVERY, ids=list(REFS))
def test_injections_are_plain_forwards_with_a_vector_added(
    ref: SaeRef, asked_for: SaeSpec, n_rows: int, engine: Engine, plain: Plain
) -> None:
    of = unit(asked_for, [ref], "ab")
    rows = measured(engine, asked_for, of, top_k=4)
    asked = [(name, each) for name, its in of.items for each in its]
    assert len(rows) == len(asked) == n_rows
    shifts = []
    for row, (name, each) in zip(rows, asked, strict=True):
        assert isinstance(each, Injection)
        assert (row["prompt_id"], row["feature"], row["strength"]) == (name, each.feature, each.strength)
        assert row["positions"] == list(each.positions)
        assert (row["sae"], row["site"], row["layer"]) == (ref.name, ref.site, int(ref.written.split(".")[1]))
        assert row["ablation_id"] == cell_id(
            "org/tiny", TEXTS[name].token_ids, ref, ["injection", each.feature, each.strength, each.positions]
        )
        check(row, plain, adding(ref, each.feature, each.strength, row["positions"]))
        heads = 4 if ref.name == "heads" else 1
        assert row["fired"] == len(each.positions) * heads
        shifts.append(row["logit_shift"])
    assert max(shifts) > 0.1
    assert len({row["ablation_id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same(way: Way, engine: Engine) -> None:
    refs = [REFS["resid"], REFS["middle"], REFS["heads"], REFS["head"]]
    of = unit(INJECTION, refs)
    expected = measured(engine, INJECTION, of)
    rows = measured(Engine(engine.model, engine.capability, way), INJECTION, of)
    for row, other in zip(rows, expected, strict=True):
        assert row["engine"] == way
        assert (row["ablation_id"], row["fired"]) == (other["ablation_id"], other["fired"])
        assert row["logit_shift"] == pytest.approx(other["logit_shift"], abs=1e-4)


@pytest.mark.parametrize(
    ("site", "why"),
    [
        ("hook_embed", "nothing can be added there"),
        ("blocks.1.ln2.hook_normalized", "nothing can be added there"),
        ("blocks.9.hook_resid_post", "its layers are 0 to 3"),
    ],
)
def test_a_site_that_cannot_be_written_is_named_with_its_autoencoder(site: str, why: str, engine: Engine) -> None:
    ref = SaeRef("org/odd:layer", "/odd", "v", site, None, 60)
    of = Unit("u", "injection", (("a", (Injection(ref, 3, 1.0, (2,)),)),), 1)
    made = sae("relu", d_in=32, d_sae=60, site=site)
    with pytest.raises(UserError, match=f"org/odd:layer writes at {site}, .* in org/tiny: {why}"):
        run(engine, INJECTION, of, TEXTS, lambda _: made, special=SPECIAL, **GIVEN)


@pytest.mark.parametrize("measure", ["injection", "ablation"])
def test_a_model_without_such_a_place_is_named(measure: str, engine: Engine) -> None:
    """GPT-J's attention and MLP are side by side: nothing is between them."""
    model = HookedModel(build("gptj"), "org/parallel")
    ref = SaeRef("between", "/b", "v", "blocks.1.hook_resid_mid", None, 60)
    work = Injection(ref, 3, 1.0, (2,)) if measure == "injection" else ref
    asked = INJECTION if measure == "injection" else spec("ablation")
    of = Unit("u", measure, (("a", (work,)),), 1)
    made = sae("relu", d_in=32, d_sae=60)
    with pytest.raises(
        UserError, match=r"between writes at blocks.1.hook_resid_mid, .* in org/parallel: no hook_resid"
    ):
        run(Engine(model, engine.capability, "layers"), asked, of, TEXTS, lambda _: made, special=SPECIAL, **GIVEN)


def test_an_injection_that_overflows_is_an_error_that_names_the_prompt(engine: Engine) -> None:
    of = Unit("u", "injection", (("b", (Injection(REFS["resid"], 3, float("inf"), (2,)),)),), 1)
    with pytest.raises(NotFinite, match=r"org/tiny: .*prompts b"):
        measured(engine, INJECTION, of)


# -- ablations ---------------------------------------------------------------------------------------------------------


def taking_out(plain: Plain, ref: SaeRef, ids: tuple[int, ...], feature: int, first: int) -> dict[str, Change]:
    """What the site is less when the feature's activation is zero wherever tokens count."""
    made, at = SAES[ref.name], counts(ids, first)
    x_ND = plain.at(ids, ref.site)[at][:, part(made)]
    features_NF = made.encode(x_ND)
    without_NF = features_NF.clone()
    without_NF[:, feature] = 0
    less_NO = made.decode(features_NF, like=x_ND) - made.decode(without_NF, like=x_ND)

    def change(x_TD: Tensor) -> Tensor:
        x_TD = x_TD.clone()
        x_TD[at, part(made)] -= less_NO
        return x_TD

    return {ref.written: change}


@pytest.mark.oracle
@pytest.mark.parametrize("ref", EVERY, ids=list(REFS))
def test_ablations_are_plain_forwards_without_a_feature(ref: SaeRef, engine: Engine, plain: Plain) -> None:
    asked = spec("ablation", skip={"first": 6})
    rows = measured(engine, asked, unit(asked, [ref], "ab"), top_k=4)
    expected: list[tuple[str, int]] = []
    active: dict[tuple[str, int], tuple[list[int], list[float]]] = {}
    for name in "ab":
        ids = TEXTS[name].token_ids
        at = counts(ids, 6)
        dense_NF = SAES[ref.name].encode(plain.at(ids, ref.site)[at][:, part(SAES[ref.name])])
        for feature in dense_NF.any(0).nonzero()[:, 0].tolist():
            on = dense_NF[:, feature].nonzero()[:, 0].tolist()
            expected.append((name, feature))
            active[name, feature] = [at[i] for i in on], dense_NF[on, feature].tolist()
    assert [(row["prompt_id"], row["feature"]) for row in rows] == expected
    assert len(rows) > 20
    for row in rows[::5]:
        positions, values = active[row["prompt_id"], row["feature"]]
        assert row["positions"] == positions
        assert row["values"] == pytest.approx(values, rel=1e-4, abs=1e-4)
        ids = TEXTS[row["prompt_id"]].token_ids
        check(row, plain, taking_out(plain, ref, ids, row["feature"], 6))
        assert row["fired"] == len(positions) * (4 if ref.name == "heads" else 1)
        assert row["skipped"] == "special tokens and the first 6"
        assert row["ablation_id"] == cell_id("org/tiny", ids, ref, ["ablation", row["feature"], row["skipped"]])
    assert max(row["logit_shift"] for row in rows) > 0.01
    assert {row["layer"] for row in rows} == {int(ref.written.split(".")[1])}


def test_several_autoencoders_and_few_vectors_at_a_time_give_what_each_gives_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spec("ablation", skip={"first": 9})
    refs = [REFS["resid"], REFS["heads"], REFS["transcoder"]]
    alone = [measured(engine, asked, unit(asked, [ref], name)) for name in "abc" for ref in refs]
    monkeypatch.setattr(cells, "_NUMBERS", 32 * 20)
    together = measured(engine, asked, unit(asked, refs, "abc"))
    expected = [row for rows in alone for row in rows]
    assert [row["ablation_id"] for row in together] == [row["ablation_id"] for row in expected]
    for row, other in zip(together, expected, strict=True):
        assert row["logit_shift"] == pytest.approx(other["logit_shift"], abs=1e-4)


def test_a_prompt_in_which_nothing_is_active_has_a_row_without_a_feature(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = sae("relu", d_in=32, d_sae=60, site="blocks.1.hook_resid_post")
    silent._stored["b_enc"].fill_(-1e6)
    monkeypatch.setitem(SAES, "middle", silent)
    asked = spec("ablation", skip={"first": PROMPT - 2})
    table = run(
        engine, asked, unit(asked, [REFS["middle"], REFS["resid"]]), TEXTS, lambda ref: SAES[ref.name],
        special=SPECIAL, **GIVEN,
    )  # fmt: skip
    assert table.schema.equals(SCHEMAS["sae_ablations"])
    rows = table.to_pylist()
    for name in TEXTS:
        of_text = [row for row in rows if row["prompt_id"] == name]
        assert [row["sae"] for row in of_text] == ["middle", *["resid"] * (len(of_text) - 1)]
        assert of_text[0]["layer"] == 2
        for column in ("ablation_id", "feature", "positions", "values", "kl", "logit_shift", "fired", "changed"):
            assert of_text[0][column] is None, column
        assert all(row["feature"] is not None for row in of_text[1:])
    assert torch.tensor([row["kl"] for row in rows if row["kl"] is not None]).isfinite().all()

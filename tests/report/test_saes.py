"""What reports say of autoencoders, on rows made up, against sums over tokens that numpy makes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.testing
import pytest

import raymi.store
from raymi.report import saes, tables
from raymi.report.query import View
from raymi.store import schemas
from raymi.store.reader import Store
from tests.rows import MODEL, REVISION, cell, take
from tests.sae_rows import SAE, D, F, Tokens, ablated, injected, moved, seen, text


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return raymi.store.open(str(tmp_path))


def put(store: Store, table: str, *rows: Mapping[str, Any], **others: Sequence[Mapping[str, Any]]) -> None:
    with take(store) as run:
        for name, each in {table: rows, **others}.items():
            run.add(name, "m", schemas.rows(name, each))
        run.close("done")


def only(frame: pl.DataFrame, **values: Any) -> dict[str, Any]:
    (row,) = (frame.filter(**values) if values else frame).to_dicts()
    return row


def test_quality_of_units_is_that_of_all_their_tokens(store: Store) -> None:
    rng = np.random.default_rng(0)
    texts = [Tokens(rng, n) for n in (7, 40, 3)]
    put(store, "sae_quality", *(text.row(f"u{i}") for i, text in enumerate(texts)))
    x, out, features = (np.concatenate([getattr(text, name) for text in texts]) for name in ("x", "out", "features"))
    clean, sae, zeros = (np.concatenate([getattr(text, n)[:-1] for text in texts]) for n in ("clean", "sae", "zeros"))
    kl, kl_zeros = (np.concatenate([getattr(text, name) for text in texts]) for name in ("kl", "kl_zeros"))
    variance = ((x - x.mean(0)) ** 2).sum(1).mean()
    mse = ((x - out) ** 2).sum(1).mean()
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(out, axis=1)
    expected = {
        "tokens": 50,
        "texts": 3,
        "l0": (features > 0).sum(1).mean(),
        "l1": features.sum(1).mean(),
        "mse": mse,
        "mse_per_element": mse / D,
        "explained_variance": 1 - mse / variance,
        "fvu": mse / variance,
        "cossim": ((x * out).sum(1) / norms[0] / norms[1]).mean(),
        "l2_ratio": (norms[1] / norms[0]).mean(),
        "relative_reconstruction_bias": (out**2).sum() / (x * out).sum(),
        "dead_features": ((features > 0).sum(0) == 0).sum(),
        "ce_loss_without_sae": clean.mean(),
        "ce_loss_with_sae": sae.mean(),
        "ce_loss_with_ablation": zeros.mean(),
        "ce_loss_score": (zeros.mean() - sae.mean()) / (zeros.mean() - clean.mean()),
        "kl_div_with_sae": kl.mean(),
        "kl_div_score": (kl_zeros.mean() - kl.mean()) / kl_zeros.mean(),
    }
    row = only(tables.report(store).saes.quality)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_what_is_not_alike_is_not_added_up(store: Store) -> None:
    text = Tokens(np.random.default_rng(0), 9)
    others = [{"sae": "org/other"}, {"experiment": "more"}, {"definitions": "of old"}, {"model_id": "org/two"}]
    put(store, "sae_quality", text.row("u"), *(text.row(f"u{i}", **other) for i, other in enumerate(others)))
    found = saes.quality(View(store, store.find()))
    assert found["tokens"].to_list() == [9] * 5


def test_densities_count_features_and_the_dead_apart(store: Store) -> None:
    text = Tokens(np.random.default_rng(0), 1000)
    fired = {"fired_features": [0, 3, 4, 5], "fired_tokens": [1000, 100, 90, 1], "fired_texts": [1] * 4}
    put(store, "sae_quality", text.row("u", **fired))
    found = saes.densities(View(store, store.find()))
    assert found["features"].to_list() == [4, 1, 0, 0, 1, 1, 0, 1]
    assert found["at_least"].to_list() == pytest.approx([0, *(10 ** (k / 2) for k in range(-6, 1))])
    assert found["below"].to_list()[1:-1] == found["at_least"].to_list()[2:]


def test_injections_are_means_over_prompts_and_positions(store: Store) -> None:
    put(
        store,
        "sae_injections",
        injected(50.0, "a", kl=1.0, logit_shift=2.0, logit_diff=1.0, answer_prob_clean=0.5, answer_prob_ablated=0.25,
                 answer_rank_clean=0, top1_clean=1, top1_ablated=1, changed=moved(t1=0.5, t2=-0.25)),
        injected(50.0, "b", kl=3.0, logit_shift=6.0, logit_diff=None, top1_clean=1, top1_ablated=2,
                 changed=moved(t3=0.25, t2=-0.25)),
        injected(5.0, "a"),
        injected(50.0, "a", feature=4),
        vocabulary=[
            {"model_id": MODEL, "revision": REVISION, "token_id": 1, "token": " one"},
            {"model_id": MODEL, "revision": REVISION, "token_id": 2, "token": "\n"},
        ],
    )  # fmt: skip
    found = saes.injections(View(store, store.find()))
    assert found.select("feature", "strength").rows() == [(3, 5.0), (3, 50.0), (4, 50.0)]
    row = only(found, feature=3, strength=50.0)
    assert (row["injections"], row["prompts"]) == (2, 2)
    assert (row["mean_kl"], row["max_kl"], row["mean_logit_shift"], row["max_logit_shift"]) == (2.0, 3.0, 4.0, 6.0)
    assert (row["mean_logit_diff"], row["answer_prob_clean"], row["answer_prob"]) == (1.0, 0.5, 0.25)
    assert row["top1_changed"] == 0.5
    # What moves in one prompt of two moves by half in the mean; a token without a text is called by its id.
    assert row["raised"] == '" one" +25.0, "#3" +12.5'
    assert row["lowered"] == '"\\n" -25.0'
    assert only(found, strength=5.0)["raised"] is None


def test_ablated_features_are_ordered_by_their_effect_over_all_prompts(store: Store) -> None:
    put(
        store,
        "sae_ablations",
        ablated(1, "a", logit_diff=3.0, kl=0.1),  # once, and strongly
        ablated(2, "a", (1.0, 5.0), logit_diff=2.0, kl=0.2),
        ablated(2, "b", (3.0,), logit_diff=-2.0, kl=0.4),
        ablated(7, "b", logit_diff=0.5, kl=9.0),
        ablated(None, "c"),
    )
    found = saes.ablations(View(store, store.find()))
    assert found["feature"].to_list() == [2, 1, 7]
    row = only(found, feature=2)
    assert (row["prompts"], row["of_prompts"], row["tokens"]) == (2, 3, 3)
    assert (row["mean_value"], row["max_value"], row["mean_logit_diff"]) == (3.0, 5.0, 0.0)
    assert row["effect"] == pytest.approx(4 / 3)
    assert (row["mean_kl"], row["max_kl"]) == (pytest.approx(0.3), 0.4)


def test_without_an_answer_the_divergence_orders_them(store: Store) -> None:
    put(store, "sae_ablations", ablated(1, "a", kl=0.3), ablated(2, "a", kl=0.2), ablated(2, "b", kl=0.2))
    found = saes.ablations(View(store, store.find()))
    assert found.select("feature", "effect").rows() == [(2, None), (1, None)]


def test_activity_counts_tokens_without_features_and_texts_without_tokens(store: Store) -> None:
    put(
        store,
        "sae_features",
        seen("a", 1, {3: 1.0, 5: 2.0}),
        seen("a", 2, {}),
        seen("b", 1, {3: 4.0}),
        seen("b", 2, {3: 0.5}),
        seen("c", None, {}),
    )
    report = tables.report(store)
    row = only(report.saes.activity)
    assert (row["texts"], row["tokens"], row["mean_l0"], row["features"]) == (3, 4, 1.0, 2)
    row = only(report.saes.features, feature=3)
    assert (row["tokens"], row["density"], row["max"]) == (3, 0.75, 4.0)
    assert row["mean"] == pytest.approx(5.5 / 3)
    assert report.measured == 3


def test_an_autoencoder_that_was_never_active_has_a_row(store: Store) -> None:
    put(store, "sae_features", seen("a", 1, {}), seen("a", 2, {}))
    row = only(saes.activity(View(store, store.find())))
    assert (row["tokens"], row["mean_l0"], row["features"]) == (2, 0.0, 0)
    assert saes.features(View(store, store.find())).is_empty()
    assert saes.examples(View(store, store.find())).is_empty()


def test_examples_show_the_strongest_tokens_in_their_context(store: Store) -> None:
    words = [f" w{i}" for i in range(30)]
    put(
        store,
        "sae_features",
        *(seen("a", at, {3: float(at), 6: 1.0}) for at in range(1, 30)),
        seen("b", 1, {3: 100.0}),
        seen("lost", 1, {3: 50.0}),
        prompts=[text("a", words), text("b", ["Hello", " there"])],
    )
    found = saes.examples(View(store, store.find()), top=4)
    of_3 = found.filter(feature=3)
    assert of_3.select("rank", "prompt_id", "position", "value").rows() == [
        (1, "b", 1, 100.0),
        (2, "lost", 1, 50.0),
        (3, "a", 29, 29.0),
        (4, "a", 28, 28.0),
    ]
    assert of_3["context"].to_list() == [
        "Hello« there»",
        None,
        "".join(words[17:29]) + "« w29»",
        "".join(words[16:28]) + "« w28» w29",
    ]
    assert of_3["token"].to_list() == [" there", None, " w29", " w28"]
    # Of equal ones the first, so that reports of one run are equal.
    assert found.filter(feature=6)["position"].to_list() == [1, 2, 3, 4]
    assert found.filter(feature=6)["context"][3] == "".join(words[:4]) + "« w4»" + "".join(words[5:11])


def test_batches_of_units_give_what_all_units_together_give(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [
        seen("a", at, {int(f): float(rng.random()) for f in rng.choice(F, 3, replace=False)}, unit_id=f"f{at % 5}")
        for at in range(25)
    ]
    put(store, "sae_features", *rows, seen("b", 1, {}, unit_id="f9"), prompts=[text("a", ["x"] * 25)])
    view = View(store, store.find())
    whole = saes.features(view), saes.examples(view, top=3), saes.activity(view)
    monkeypatch.setattr(saes, "_PAIRS", 20)
    assert len(list(saes._batches(view))) > 2
    assert saes.examples(view, top=3).equals(whole[1])
    pl.testing.assert_frame_equal(saes.features(view), whole[0])
    # And both are what the rows say.
    values = sorted(
        (value, row["position"])
        for row in rows
        for f, value in zip(row["features"], row["values"], strict=True)
        if f == 3
    )
    best = whole[1].filter(feature=3)
    assert best["position"].to_list() == [position for _, position in values[:-4:-1]]
    assert only(whole[0], feature=3)["mean"] == pytest.approx(np.mean([value for value, _ in values]))


def test_rows_that_stand_twice_for_an_instant_count_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = Tokens(np.random.default_rng(0), 5).row("u")
    with take(store) as run:
        run.add("sae_quality", "m", schemas.rows("sae_quality", [quality]))
        run.add("sae_features", "m", schemas.rows("sae_features", [seen("a", 1, {3: 1.0}), seen("a", 2, {3: 1.0})]))
        run.add("sae_injections", "m", schemas.rows("sae_injections", [injected(1.0, "a")]))
        run.add("sae_ablations", "m", schemas.rows("sae_ablations", [ablated(1, "a"), ablated(None, "b")]))
        run.flush()
        once = store.scan
        monkeypatch.setattr(store, "scan", lambda table, run, **more: pl.concat([once(table, run, **more)] * 2))
        report = tables.report(store)
    found = report.saes
    assert only(found.quality)["tokens"] == 5
    assert only(found.injections)["injections"] == 1
    assert (only(found.ablations)["prompts"], only(found.ablations)["of_prompts"]) == (1, 2)
    assert (only(found.activity)["tokens"], only(found.features)["tokens"]) == (2, 2)
    assert found.examples.height == 2
    assert report.measured == 1 + 1 + 2 + 1


def test_a_run_counts_what_was_measured_of_every_kind_and_knows_its_units(store: Store) -> None:
    tokens = Tokens(np.random.default_rng(0), 5)
    put(
        store,
        "ablations",
        cell("k", 0),
        sae_quality=[tokens.row("q", texts=7), tokens.row("q", texts=7, sae="org/other")],
        sae_features=[seen("a", 1, {}), seen("a", 2, {}), seen("a", 1, {}, sae="org/other")],
        sae_injections=[injected(1.0, "a"), injected(2.0, "a")],
        sae_ablations=[ablated(1, "a"), ablated(2, "a"), ablated(None, "b")],
    )
    assert tables.runs(store)["measured"].to_list() == [1 + 14 + 2 + 2 + 2]


def test_models_without_knockouts_are_summed_up_too(store: Store) -> None:
    of_prompt = {"answer_prob_clean": 0.5, "answer_rank_clean": 0}
    put(store, "sae_injections", injected(1.0, "a", **of_prompt), injected(2.0, "a", **of_prompt))
    row = only(tables.report(store).models)
    assert (row["model_id"], row["experiment"], row["ablations"]) == (MODEL, None, 0)
    assert (row["revision"], row["dtype"], row["engine"]) == (REVISION, "float32", "cone")
    answers = only(tables.report(store).answers)
    assert (answers["prompts"], answers["answer_prob"], answers["answer_top1"]) == (1, 0.5, 1.0)


def test_a_run_without_autoencoders_has_empty_tables_of_the_same_columns(store: Store) -> None:
    put(store, "ablations", cell("k", 0))
    empty = saes.saes(View(store, store.find())).tables
    assert all(frame.is_empty() for frame in empty.values())
    put(
        store,
        "sae_quality",
        Tokens(np.random.default_rng(0), 5).row("q"),
        sae_features=[seen("a", 1, {1: 1.0})],
        sae_injections=[injected(1.0, "a", changed=moved(t1=0.5, t2=-0.5))],
        sae_ablations=[ablated(1, "a")],
        prompts=[text("a", ["x", "y"])],
        saes=[{"model_id": "org/other", "revision": REVISION, "experiment": "quality", "note": "none fits"}],
    )
    full = saes.saes(View(store, store.find())).tables
    assert {name: frame.schema for name, frame in empty.items()} == {n: frame.schema for n, frame in full.items()}
    assert all(not frame.is_empty() for frame in full.values())


def test_what_an_mlp_is_fed_is_one_place_under_both_its_names(store: Store) -> None:
    """Rows of before it had its own name, of an autoencoder that reads it, beside new ones."""
    rng = np.random.default_rng(3)
    once, now = "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in"
    known = {"model_id": MODEL, "revision": REVISION, "experiment": "quality"}
    put(
        store,
        "sae_quality",
        Tokens(rng, 4).row("u0", site=once),
        Tokens(rng, 5).row("u1", site=now),
        Tokens(rng, 6).row("u2", sae="org/lens", site=once),
        saes=[known | {"sae": SAE, "site": now}, known | {"sae": "org/lens", "site": once}],
    )
    found = saes.quality(View(store, store.find()))
    assert {(row["sae"], row["site"], row["tokens"]) for row in found.to_dicts()} == {
        (SAE, now, 9),
        ("org/lens", once, 6),
    }

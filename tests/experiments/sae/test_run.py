"""Rows of features and of quality, against dense encoding on plainly captured activations and plain forwards."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae import quality as quality_module
from raymi.experiments.sae import texts
from raymi.experiments.sae.run import run
from raymi.experiments.sae.spec import SCHEMAS, SaeSpec, Skip
from raymi.experiments.unit import Unit
from raymi.model.engine import Engine, OutOfMemory
from raymi.model.hooked import NotFinite
from raymi.model.restart import Restart
from raymi.model.sites import NoSuchPlace
from raymi.sae.evaluate import DEFINITIONS
from raymi.sae.metrics import SUMMED, merged, metrics
from tests.experiments.sae.scene import (
    GIVEN,
    IDS,
    REFS,
    SAES,
    SPECIAL,
    TEXTS,
    Plain,
    counts,
    measured,
    part,
    unit,
)  # fmt: skip
from tests.families import PROMPT
from tests.sae.making import sae

EVERY = tuple(REFS.values())


def spec(measure: str, **more: Any) -> SaeSpec:
    return SaeSpec.model_validate({"kind": "sae", "measure": measure, **more})


def plain_features(plain: Plain, ref: SaeRef, ids: Sequence[int]) -> Tensor:
    made = SAES[ref.name]
    return made.encode(plain.at(ids, ref.site)[:, part(made)])


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("ref", EVERY, ids=list(REFS))
def test_features_are_those_of_plainly_captured_activations(ref: SaeRef, engine: Engine, plain: Plain) -> None:
    rows = measured(engine, spec("features", skip={"first": 2}), unit(spec("features"), [ref]))
    expected = [(name, at) for name, of in TEXTS.items() for at in counts(of.token_ids, first=2)]
    assert [(row["prompt_id"], row["position"]) for row in rows] == expected
    n_active = 0
    for name, of in TEXTS.items():
        dense_TF = plain_features(plain, ref, of.token_ids)
        for row in (row for row in rows if row["prompt_id"] == name):
            at = row["position"]
            assert row["token_id"] == of.token_ids[at]
            found = torch.zeros(ref.d_sae)
            found[row["features"]] = torch.tensor(row["values"])
            torch.testing.assert_close(found, dense_TF[at], rtol=1e-4, atol=1e-4)
            assert row["values"] == sorted(row["values"], reverse=True)
            n_active += len(row["features"])
    assert n_active > len(rows)
    about = {**GIVEN, "unit_id": "u" * 16, "experiment": "features", "sae": ref.name, "sae_version": ref.version,
             "site": ref.site, "n_tokens": PROMPT, "skipped": "special tokens and the first 2"}  # fmt: skip
    assert all({key: row[key] for key in about} == about for row in rows)


def test_several_autoencoders_in_one_pass_give_what_each_gives_alone(engine: Engine) -> None:
    together = run(engine, spec("features"), unit(spec("features"), EVERY), TEXTS, open_sae, special=SPECIAL, **GIVEN)
    alone = [
        run(engine, spec("features"), unit(spec("features"), [ref]), TEXTS, open_sae, special=SPECIAL, **GIVEN)
        for ref in EVERY
    ]
    assert together.schema.equals(SCHEMAS["sae_features"])
    assert together.equals(pa.concat_tables(alone))


def open_sae(ref: SaeRef) -> Any:
    return SAES[ref.name]


def test_a_text_without_a_token_that_counts_has_one_row(engine: Engine) -> None:
    special = SPECIAL | set(IDS[1])
    counted = {name: counts(of.token_ids, special=special) for name, of in TEXTS.items()}
    rows = measured(engine, spec("features"), unit(spec("features"), [REFS["resid"], REFS["head"]]), special=special)
    of_b = [row for row in rows if row["prompt_id"] == "b"]
    assert [row["sae"] for row in of_b] == ["resid", "head"]
    for row in of_b:
        assert {row[column] for column in ("position", "token_id")} == {None}
        assert (row["features"], row["values"]) == (None, None)
    for name in ("resid", "head"):
        of_sae = [row["prompt_id"] for row in rows if row["sae"] == name]
        assert of_sae == [text for text in TEXTS for _ in (counted[text] or [0])]


def test_nothing_counts_but_units_give_a_row(engine: Engine) -> None:
    for measure, n_rows in (("features", 2), ("quality", 1), ("ablation", 2)):
        of = unit(spec(measure), [REFS["resid"]], "ab")
        rows = measured(engine, spec(measure, skip={"first": PROMPT}), of)
        assert len(rows) == n_rows, measure
    [row] = measured(engine, spec("quality", skip={"first": PROMPT}), unit(spec("quality"), [REFS["resid"]], "ab"))
    assert (row["texts"], row["tokens"], row["kl_tokens"], row["sum_kl_sae"]) == (2, 0, 0, 0.0)
    assert metrics(row)["ce_loss_score"] is None


def test_features_stop_behind_the_last_site(engine: Engine) -> None:
    ran: list[int] = []
    blocks = engine.model.blocks
    handles = [b.module.register_forward_hook(lambda *_, at=at: ran.append(at)) for at, b in enumerate(blocks)]
    try:
        measured(engine, spec("features"), unit(spec("features"), [REFS["resid"], REFS["transcoder"]]))
    finally:
        for handle in handles:
            handle.remove()
    assert max(ran, default=0) <= 1


# -- quality -----------------------------------------------------------------------------------------------------------


def plain_sums(plain: Plain, ref: SaeRef, ids: Sequence[int]) -> dict[str, float]:
    """Sums of one text, every one from its definition, with plain forwards."""
    made, at, sums = SAES[ref.name], counts(ids), dict.fromkeys(SUMMED, 0.0)
    x_ND = plain.at(ids, ref.site)[at][:, part(made)]
    target_ND = plain.at(ids, ref.written)[at][:, part(made)]
    features_NF = made.encode(x_ND)
    out_ND = made.decode(features_NF, like=x_ND)

    def splice(x_TD: Tensor) -> Tensor:
        x_TD = x_TD.clone()
        x_TD[at, part(made)] = out_ND
        return x_TD

    def nothing(x_TD: Tensor) -> Tensor:
        x_TD = x_TD.clone()
        x_TD[:, part(made)] = 0
        return x_TD

    x, out = target_ND.double(), out_ND.double()
    sums |= {
        "texts": 1,
        "tokens": len(at),
        "sum_x2": float(x.square().sum()),
        "sum_residual2": float((x - out).square().sum()),
        "sum_out2": float(out.square().sum()),
        "sum_x_out": float((x * out).sum()),
        "sum_norm_in": float(x.norm(dim=-1).sum()),
        "sum_norm_out": float(out.norm(dim=-1).sum()),
        "sum_norm_ratio": float((out.norm(dim=-1) / x.norm(dim=-1)).sum()),
        "sum_cosine": float(torch.cosine_similarity(x, out).sum()),
        "sum_l0": float((features_NF != 0).sum()),
        "sum_l1": float(features_NF.double().sum()),
        "kl_tokens": len(at),
        "loss_tokens": len([t for t in at if t + 1 < len(ids)]),
    }
    clean = plain.logits(ids, {}).double().log_softmax(-1)
    for name, change in (("clean", {}), ("sae", {ref.written: splice}), ("ablated", {ref.written: nothing})):
        log_q = plain.logits(ids, change).double().log_softmax(-1)
        sums[f"sum_loss_{name}"] = -sum(float(log_q[t, ids[t + 1]]) for t in at if t + 1 < len(ids))
        if name != "clean":
            sums[f"sum_kl_{name}"] = float((clean.exp() * (clean - log_q)).sum(-1)[at].sum())
    return sums


@pytest.mark.oracle
@pytest.mark.parametrize("ref", EVERY, ids=list(REFS))
def test_every_sum_is_that_of_plain_forwards(ref: SaeRef, engine: Engine, plain: Plain) -> None:
    [row] = measured(engine, spec("quality"), unit(spec("quality"), [ref]))
    by_text = [plain_sums(plain, ref, of.token_ids) for of in TEXTS.values()]
    for name in SUMMED:
        assert row[name] == pytest.approx(sum(sums[name] for sums in by_text), rel=1e-4), name
    at = {name: counts(of.token_ids) for name, of in TEXTS.items()}
    fired = [plain_features(plain, ref, of.token_ids)[at[name]] != 0 for name, of in TEXTS.items()]
    tokens, in_texts = sum(f.sum(0) for f in fired), sum(f.any(0) for f in fired)
    alive = tokens.nonzero()[:, 0]
    assert row["fired_features"] == alive.tolist()
    assert row["fired_tokens"] == tokens[alive].tolist()
    assert row["fired_texts"] == in_texts[alive].tolist()
    x = torch.cat([plain.at(of.token_ids, ref.written)[at[name]] for name, of in TEXTS.items()])
    torch.testing.assert_close(
        torch.tensor(row["sum_x"], dtype=torch.float64),
        x[:, part(SAES[ref.name])].double().sum(0),
        rtol=1e-4,
        atol=1e-3,
    )
    assert (row["definitions"], row["engine"], row["d_sae"]) == (DEFINITIONS, "layers", ref.d_sae)
    assert row["skipped"] == "special tokens"


def close(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        numbers = isinstance(value, float) or name == "sum_x"
        assert two[name] == (pytest.approx(value, rel=1e-5, abs=1e-4) if numbers else value), name


def test_several_autoencoders_have_the_sums_that_each_has_alone(engine: Engine) -> None:
    together = measured(engine, spec("quality"), unit(spec("quality"), EVERY))
    assert [row["sae"] for row in together] == list(REFS)
    for row, ref in zip(together, EVERY, strict=True):
        engine.baselines.clear()
        [alone] = measured(engine, spec("quality"), unit(spec("quality"), [ref]))
        close(row, alone)


@pytest.mark.parametrize("n_texts", [1, 2, 3])
def test_batches_of_any_size_and_units_of_any_cut_have_the_same_sums(
    n_texts: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [REFS["resid"], REFS["transcoder"], REFS["head"]]
    whole = measured(engine, spec("quality"), unit(spec("quality"), refs))
    monkeypatch.setattr(texts, "rows_per_batch", lambda *_: n_texts)
    for one, two in zip(whole, measured(engine, spec("quality"), unit(spec("quality"), refs)), strict=True):
        close(one, two)
    shards = [measured(engine, spec("quality"), unit(spec("quality"), refs, names)) for names in ("a", "bcd", "e")]
    for row, *of_sae in zip(whole, *shards, strict=True):
        total = merged(of_sae)
        close({name: row[name] for name in total}, total)
        ours, expected = metrics(total), metrics(row)
        assert ours.keys() == expected.keys()
        assert all(ours[key] == pytest.approx(expected[key], rel=1e-4) for key in ours)


def test_a_unit_may_be_cut_between_the_autoencoders_of_a_text(engine: Engine) -> None:
    one, two = REFS["resid"], REFS["mlp"]
    for measure in ("features", "quality"):
        cut = Unit("u" * 16, measure, (("a", (two,)), ("b", (one, two)), ("c", (one, two)), ("d", (one,))), 1)
        rows = measured(engine, spec(measure), cut)
        for ref, names in ((one, "bcd"), (two, "abc")):
            expected = measured(engine, spec(measure), unit(spec(measure), [ref], names))
            of_ref = [row for row in rows if row["sae"] == ref.name]
            assert len(of_ref) == len(expected)
            for row, other in zip(of_ref, expected, strict=True):
                if measure == "quality":
                    close(row, other)
                else:
                    assert (row["prompt_id"], row["features"]) == (other["prompt_id"], other["features"])


def test_without_leaving_out_layers_it_is_the_same(engine: Engine) -> None:
    full = Engine(engine.model, engine.capability, "full")
    [one] = measured(engine, spec("quality"), unit(spec("quality"), [REFS["middle"]]))
    [two] = measured(full, spec("quality"), unit(spec("quality"), [REFS["middle"]]))
    assert (one.pop("engine"), two.pop("engine")) == ("layers", "full")
    close(one, two)


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_only_what_no_text_changes_is_kept_and_it_is_measured_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeroed: list[str] = []
    again = Restart.again

    def watched(self: Restart, site: str, value: Tensor, counts_BT: Tensor | None = None) -> Tensor:
        zeroed.extend([site] if counts_BT is None else [])
        return again(self, site, value, counts_BT)

    monkeypatch.setattr(Restart, "again", watched)
    refs = [REFS["resid"], REFS["normed"], REFS["attention"], REFS["head"]]
    first = measured(engine, spec("quality"), unit(spec("quality"), refs))
    assert sorted(zeroed) == sorted(ref.site for ref in refs)
    assert set(engine.baselines) == {(REFS["resid"].site, None), (REFS["normed"].site, None)}
    zeroed.clear()
    second = measured(engine, spec("quality"), unit(spec("quality"), refs))
    assert sorted(zeroed) == sorted([REFS["attention"].site, REFS["head"].site])
    for one, two in zip(first, second, strict=True):
        close(one, two)


def test_one_token_proves_no_baseline(engine: Engine) -> None:
    one_token = {"z": TEXTS["c"].__class__(TEXTS["c"].prompt, (9, 9, 9), ("9",) * 3, False, None, None, {})}
    of = Unit("u", "quality", (("z", (REFS["resid"],)),), 1)
    run(engine, spec("quality"), of, one_token, open_sae, special=SPECIAL, **GIVEN)
    assert not engine.baselines


def test_a_baseline_that_the_text_changes_is_not_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen, not taken for granted: here the model's last layers look at the text again."""
    again = Restart.again

    def looking(self: Restart, site: str, value: Tensor, counts_BT: Tensor | None = None) -> Tensor:
        hidden_BTD = again(self, site, value, counts_BT)
        return hidden_BTD + 1e-2 * self.ids_BT[..., None] if counts_BT is None else hidden_BTD

    monkeypatch.setattr(Restart, "again", looking)
    measured(engine, spec("quality"), unit(spec("quality"), [REFS["resid"]]))
    assert not engine.baselines


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_halves_the_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    measure = quality_module._measure

    def tight(task: Any, refs: Any, chosen: Sequence[Any]) -> Any:
        sizes.append(len(chosen))
        if len(chosen) > 2:
            raise torch.OutOfMemoryError("no memory left")
        return measure(task, refs, chosen)

    of = unit(spec("quality"), [REFS["resid"]])
    [expected] = measured(engine, spec("quality"), of)
    monkeypatch.setattr(quality_module, "_measure", tight)
    [row] = measured(engine, spec("quality"), of)
    close(row, expected)
    assert sizes == [5, 2, 2, 1]
    sizes.clear()
    measured(engine, spec("quality"), of)
    assert sizes == [2, 2, 1]


def test_a_text_that_does_not_fit_is_named_by_its_length(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(quality_module, "_measure", none)
    with pytest.raises(OutOfMemory, match=rf"org/tiny: one text of {PROMPT} tokens"):
        measured(engine, spec("quality"), unit(spec("quality"), [REFS["resid"]]))


@pytest.mark.parametrize("measure", ["features", "quality", "ablation"])
def test_nan_in_an_autoencoder_is_an_error_that_names_it(
    measure: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = sae("relu", d_in=32, d_sae=60, site="blocks.1.hook_resid_post")
    broken._stored["b_enc"][3] = torch.nan
    monkeypatch.setitem(SAES, "resid", broken)
    with pytest.raises(NotFinite, match="org/tiny: NaN or infinity among the features of resid"):
        measured(engine, spec(measure), unit(spec(measure), [REFS["resid"]]))


def test_nan_in_a_decoder_is_an_error_that_names_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = sae("relu", d_in=32, d_sae=60, site="blocks.1.hook_resid_post")
    broken._stored["b_dec"][3] = torch.nan
    monkeypatch.setitem(SAES, "resid", broken)
    with pytest.raises(NotFinite, match="resid"):
        measured(engine, spec("quality"), unit(spec("quality"), [REFS["resid"]]))


def test_a_site_that_cannot_be_written_is_named_with_its_autoencoder(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = "blocks.1.ln2.hook_normalized"
    monkeypatch.setitem(SAES, "odd", sae("relu", d_in=32, d_sae=60, site=site))
    ref = SaeRef("odd", "/odd", "v", site, None, 60)
    assert measured(engine, spec("features"), unit(spec("features"), [ref]))
    with pytest.raises(NoSuchPlace, match=rf"^odd cannot be spliced in at {site}: "):
        measured(engine, spec("quality"), unit(spec("quality"), [ref]))


def test_what_counts_is_asked_of_the_special_tokens(engine: Engine) -> None:
    every = spec("features", skip={"special": False})
    assert str(Skip(special=False)) == "nothing"
    rows = measured(engine, every, unit(every, [REFS["resid"]]))
    assert len(rows) == len(TEXTS) * PROMPT
    assert {row["skipped"] for row in rows} == {"nothing"}

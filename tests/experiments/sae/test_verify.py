"""A second opinion agrees with right numbers, and not with wrong ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.sae.spec import SaeSpec, cell_id, work
from raymi.experiments.sae.verify import verify
from raymi.model.cone import Cone
from raymi.model.engine import Engine, measure_capability
from raymi.model.hooked import HookedModel
from raymi.model.restart import Restart
from raymi.sae import SAE
from tests.experiments.sae.scene import REFS, SAES, SPECIAL, TEXTS
from tests.experiments.sae.test_run import EVERY, spec
from tests.families import PROMPT, build
from tests.sae.making import sae

MEASURES = ("features", "quality", "ablation")


def verified(engine: Engine, asked: SaeSpec, refs: Any, **saes: SAE) -> list[dict[str, Any]]:
    drawn = [(asked, TEXTS["a"], one) for one in work(asked, TEXTS["a"], refs)]
    return verify(
        engine, drawn, lambda ref: {**SAES, **saes}[ref.name], special=SPECIAL, model_id="org/tiny", revision="r"
    )


@pytest.mark.parametrize("measure", MEASURES)
def test_every_autoencoder_is_confirmed(measure: str, engine: Engine) -> None:
    records = verified(engine, spec(measure), EVERY)
    assert len(records) == len(EVERY) * (2 if measure == "ablation" else 1)
    for record in records:
        assert record["passed"]
        assert record["max_logit_diff"] <= record["tolerance"] == engine.capability.tolerance
    splices = [record for record in records if record["engine"] == "layers"]
    assert [record["ablation_id"] for record in splices] == [
        cell_id("org/tiny", TEXTS["a"].token_ids, ref, ["splice", "special tokens"]) for ref in EVERY
    ]
    assert min(record["effect"] for record in splices) > 0.1


def test_injections_are_confirmed(engine: Engine) -> None:
    asked = spec("injection", features=[3], strengths=[6])
    records = verified(engine, asked, EVERY)
    assert len(records) == len(EVERY)
    for record in records:
        assert (record["passed"], record["engine"], record["prompt_id"]) == (True, "cone", "a")
        assert record["effect"] > 100 * record["max_logit_diff"]


@pytest.mark.parametrize("measure", MEASURES)
def test_a_wrong_splice_is_caught(measure: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Restart.again

    def wrong(self: Restart, site: str, value: Tensor, counts_BT: Tensor | None = None) -> Tensor:
        value = value.clone()
        value[:, 5] *= 1.01
        return again(self, site, value, counts_BT)

    monkeypatch.setattr(Restart, "again", wrong)
    assert not verified(engine, spec(measure), [REFS["resid"]])[0]["passed"]


def test_wrong_activations_are_caught(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they make other features active: only equal activations may jump."""
    begin = Restart.__init__

    def wrong(self: Restart, *args: Any, **given: Any) -> None:
        begin(self, *args, **given)
        self.sites = {name: value * 1.05 for name, value in self.sites.items()}

    monkeypatch.setattr(Restart, "__init__", wrong)
    assert not verified(engine, spec("features"), [REFS["attention"]])[0]["passed"]


def test_a_wrong_cone_is_caught(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    unembed = Cone._unembed
    monkeypatch.setattr(Cone, "_unembed", lambda self, hidden, returned: unembed(self, hidden * 1.01, returned))
    tolerant = Engine(engine.model, engine.capability, "cone")
    monkeypatch.setattr(Cone, "_prove", lambda *_: 0.0)
    records = verified(tolerant, spec("ablation"), [REFS["resid"]])
    assert [record["passed"] for record in records] == [True, False]
    [record] = verified(tolerant, spec("injection", features=[3], strengths=[6]), [REFS["resid"]])
    assert not record["passed"]


def test_a_feature_at_its_threshold_is_no_mismatch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is active in one forward and not in the other, whose activations differ in the last digit."""
    made = sae("jumprelu", d_in=32, d_sae=60, site="blocks.1.hook_resid_post", seed=1)
    x_TD = engine.model.forward(
        torch.tensor([TEXTS["a"].token_ids]), capture=["blocks.1.hook_resid_post"], own_attention=True
    ).cache["blocks.1.hook_resid_post"][0]
    before_TF = x_TD @ made._stored["W_enc"] + made._stored["b_enc"]
    feature = int(before_TF[7].argmax())
    begin = Restart.__init__

    def shaken(self: Restart, *args: Any, **given: Any) -> None:
        begin(self, *args, **given)
        self.sites = {name: value * (1 + 1e-6) for name, value in self.sites.items()}

    monkeypatch.setattr(Restart, "__init__", shaken)
    made._stored["threshold"][feature] = float(before_TF[7, feature]) * (1 + 5e-7)
    [record] = verified(engine, spec("features"), [REFS["resid"]], resid=made)
    assert record["passed"], record
    ours, theirs = (made.encode(x)[7, feature] for x in (x_TD * (1 + 1e-6), x_TD))
    assert (float(ours) > 0, float(theirs)) == (True, 0.0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_embedding_is_spliced_itself(family: str) -> None:
    """GPT-2 adds positions to it before its first layer."""
    model = HookedModel(build(family), "org/tiny")
    engine = Engine(model, measure_capability(model, PROMPT), "cone")
    made = sae("relu", d_in=32, d_sae=60, site="hook_embed")
    [record] = verified(engine, spec("quality"), [SaeRef("embed", "/e", "v", "hook_embed", None, 60)], embed=made)
    assert record["passed"]
    assert record["effect"] > 0.1


def test_a_text_of_which_nothing_counts_needs_no_opinion(engine: Engine) -> None:
    assert verified(engine, spec("features", skip={"first": PROMPT}), [REFS["resid"]]) == []


# ---- half precision --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half() -> Engine:
    model = HookedModel(build("gpt2").bfloat16(), "gpt2")
    found = measure_capability(model, PROMPT)
    return Engine(model, found, found.way)


@pytest.mark.parametrize("measure", ["quality", "ablation"])
def test_in_half_precision_effects_are_held_to_float32s(measure: str, half: Engine) -> None:
    records = verified(half, spec(measure), EVERY)
    assert records
    for record in records:
        assert record["passed"], record
        assert 0 < record["spread"] <= record["spread_tolerance"] < 0.05 * 10


def test_a_wrong_splice_is_caught_in_half_precision(half: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Restart.again

    def wrong(self: Restart, site: str, value: Tensor, counts_BT: Tensor | None = None) -> Tensor:
        value = value.clone()
        value[:, 5] = value[:, 6]
        return again(self, site, value, counts_BT)

    monkeypatch.setattr(Restart, "again", wrong)
    assert not verified(half, spec("quality"), [REFS["resid"]])[0]["passed"]


PLANTED = {
    "hook_attn_out": {"attn_out": "self_attn"},
    "hook_mlp_out": {"mlp_out": "mlp"},
    "hook_resid_mid": {"attn_out": "self_attn", "resid_mid": "post_feedforward_layernorm"},
    "mlp.hook_out": {"mlp_module": "post_feedforward_layernorm"},
    "attn.hook_out": {"attn_module": "post_attention_layernorm"},
}
"""Site of Gemma 2 -> wrong places for it: before a norm instead of behind, and the other way round."""


@pytest.mark.parametrize("measure", ["injection", "quality"])
@pytest.mark.parametrize("site", PLANTED)
def test_a_wrong_place_is_caught(site: str, measure: str) -> None:
    """The second opinion does not stand where the first one does."""
    model = HookedModel(build("gemma2"), "org/tiny")
    engine = Engine(model, measure_capability(model, PROMPT), "cone")
    made = sae("relu", d_in=32, d_sae=60, site=f"blocks.1.{site}")
    ref = SaeRef("planted", "/p", "v", f"blocks.1.{site}", None, 60)
    asked = spec(measure, **({"features": [3], "strengths": [6]} if measure == "injection" else {}))
    [right] = verified(engine, asked, [ref], planted=made)
    assert right["passed"]
    for field, name in PLANTED[site].items():
        setattr(model.blocks[1], field, model.blocks[1].module.get_submodule(name))
    [wrong] = verified(engine, asked, [ref], planted=made)
    assert not wrong["passed"]
    assert wrong["max_logit_diff"] > 10 * wrong["tolerance"]

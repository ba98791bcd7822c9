import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import raymi
from raymi import Mask, Model, Prompt
from raymi.interventions import Intervention, add, mean, replace, scale, zero
from raymi.model.cone import NotClean
from raymi.model.sites import NoSuchPlace

TEXT = "The capital of France is"
LONG = "The capital of France is Paris and the capital of Peru is Lima and it was"


def every_kind(model: Model, text: str) -> list[Intervention | list[Intervention]]:
    """Ablations with each operation, at each site, early and late, and several together; none in the cone's order."""
    last, top = len(model.tokenize(text).tokens) - 1, model.hooked.n_layers - 1
    found: list[Intervention | list[Intervention]] = [Mask(top, (1,), ((last, 0), (last, 1)))]
    for site in raymi.interventions.EDITABLE:
        heads = (2, 0) if site == "attn.hook_z" else None
        for layer, at in ((top, last), (0, 2)):
            name = f"blocks.{layer}.{site}"
            of_others = model.hooked.mean(name, torch.tensor([model.tokenize(text).token_ids[::-1]]))
            of_another = model.clean(" ".join(text.split()[::-1]), capture=[name]).cache[name][0, 1]
            of_others, of_another = (x[[2, 0]] if heads else x for x in (of_others, of_another))
            found += [
                zero(layer, site, (at,), heads),
                mean(layer, site, (at - 1, at), of_others, heads),
                replace(layer, site, (at,), of_another[None], heads),
                add(layer, site, (at,), of_others, heads),
                [scale(layer, site, (at, 1), -1.5, heads), Mask(0, None, ((last, 1),))],
            ]
    return [*found, Mask(0, None, ((1, 0),)), (zero(top, "hook_mlp_out", (0, last)), Mask(top, (0,), ((2, 2),)))]


def check_sweep(model: Model, text: str, answer: str) -> None:
    """A sweep of everything is a full forward for each."""
    ablations = every_kind(model, text)
    found = model.sweep(text, ablations, answer=answer, keep_logits=True)

    answer_id = found.prompt.answer_id
    assert answer_id is not None
    assert found.logits is not None
    assert found.frame["ablation"].to_list() == list(range(len(ablations)))
    assert set(found.frame["engine"]) == {"cone"}
    off = model.engine.capability.tolerance
    for row, ablated_V, ablation in zip(found.frame.iter_rows(named=True), found.logits, ablations, strict=True):
        one = model.ablate(text, ablation)
        assert (ablated_V - one.ablated.logits).abs().max() < off
        assert row["kl"] == pytest.approx(one.kl, rel=1e-3, abs=1e-6)
        assert (row["fired"], row["empty_rows"]) == (one.fired, one.empty_rows)
        before, after = one.clean.logits[answer_id].item(), one.ablated.logits[answer_id].item()
        assert row["logit_diff"] == pytest.approx(before - after, abs=off)
        p, q = (run.logits.double().softmax(0) for run in (one.clean, one.ablated))
        assert row["total_variation"] == pytest.approx(float((p - q).abs().sum() / 2), rel=1e-3, abs=1e-6)
        assert row["changed"][0]["token_id"] == one.changed(1)["token_id"][0]
    changes = (found.logits - model.clean(text).logits).abs().amax(1)
    assert (changes > 20 * off).float().mean() > 0.9, "almost all are felt"


def test_sweep_of_every_operation_is_full_forwards(tiny: Model) -> None:
    check_sweep(tiny, TEXT, " Paris")


def test_sweep_of_a_demo_model_is_full_forwards(demo_cache: Path) -> None:
    check_sweep(raymi.load("raymi-demo/glassllm-en", cache_dir=demo_cache), TEXT, " Paris")


def test_weights_may_be_changed_between_two_calls(cache: Path) -> None:
    """Below the layer that is ablated, and in a way that no counter sees."""
    model = raymi.load("org/tiny", cache_dir=cache)
    cut = Mask(1, None, ((3, 0),))
    before = model.sweep(TEXT, [cut], keep_logits=True)
    model.hooked.model.get_submodule("model.layers.0.mlp.down_proj").get_parameter("weight").data.mul_(3)
    for found in (
        model.sweep(TEXT, [cut], keep_logits=True),
        model.knockout(TEXT, layers=1, queries=3, keys=0, keep_logits=True),
    ):
        assert found.logits is not None
        torch.testing.assert_close(found.logits[0], model.ablate(TEXT, cut).ablated.logits, atol=1e-4, rtol=0)
        assert not torch.allclose(found.logits[0], before.logits[0], atol=1e-2)
    assert set(found.frame["engine"]) == {"cone"}


def test_sweep_says_what_it_changed(tiny: Model) -> None:
    found = tiny.sweep(
        Prompt("mine", TEXT, answer=" Paris", wrong=" Lima"),
        [
            zero(1, "attn.hook_z", (4,), (2,)),
            [zero(0, "hook_mlp_out", (3, 4)), Mask(0, (1,), ((4, 0), (4, 3)))],
            [Mask(0, (1,), ((4, 0),)), Mask(1, (1,), ((4, 0),))],
        ],
        top_k=3,
    )
    asked = ["layers", "sites", "layer", "site", "head", "position", "position_token", "fired", "prompt_id", "n_tokens"]
    assert found.frame.select(asked).rows() == [
        ([1], ["attn.hook_z"], 1, "attn.hook_z", 2, 4, "is", 1, "mine", 5),
        ([0, 0], ["hook_mlp_out", "attn.hook_attn_scores"], 0, None, None, None, None, 4, "mine", 5),
        ([0, 1], ["attn.hook_attn_scores"] * 2, None, "attn.hook_attn_scores", 1, 4, "is", 2, "mine", 5),
    ]
    assert found.logits is None
    assert all(len(changed) == 3 for changed in found.frame["changed"])
    knocked = tiny.knockout(TEXT, answer=" Paris", wrong=" Lima", layers={"together": "all"}, heads=1, top_k=3).frame
    for name in set(knocked.columns[knocked.columns.index("kl") :]) - {"query_token", "key_token"}:
        assert found.frame.schema[name] == knocked.schema[name]
        if knocked.schema[name].is_float():
            assert found.frame[name][2] == pytest.approx(knocked[name][0], abs=1e-6)
    assert found.frame["top1_ablated_token"][2] == knocked["top1_ablated_token"][0]
    assert found.frame["answer_token"].to_list() == ["Paris"] * 3


def test_a_way_that_was_chosen_stays_past_a_window(cache: Path) -> None:
    model = raymi.load("org/windowed", cache_dir=cache)
    model.engine.way = "full"
    short = model.engine.capability.n_tokens
    found = model.sweep(LONG, [zero(0, "hook_mlp_out", (15,)), Mask(1, None, ((15, 14),))])
    assert model.engine.capability.n_tokens > short
    assert set(found.frame["engine"]) == {model.engine.way} == {"full"}
    assert set(model.knockout(LONG).frame["engine"]) == {"full"}


@pytest.mark.parametrize(
    ("ablation", "message"),
    [
        (
            zero(0, "hook_mlp_output", (4,)),
            "'hook_mlp_output' cannot be changed; what can: hook_resid_pre, .*attn.hook_z",
        ),
        (zero(2, "hook_mlp_out", (4,)), "layer 2 of a model with layers 0 to 1"),
        (Mask(7, None, ((4, 0),)), "layer 7 of a model with layers 0 to 1"),
        (zero(0, "hook_mlp_out", (5,)), "position 5, where there are 0 to 4"),
        (zero(0, "attn.hook_z", (4,), (4,)), "head 4, where there are 0 to 3"),
    ],
)
def test_sweep_refuses_what_is_not_there_and_says_of_which(tiny: Model, ablation: Intervention, message: str) -> None:
    with pytest.raises(NoSuchPlace, match=f"^ablation 1: org/tiny: {message}"):
        tiny.sweep(TEXT, [Mask(0, None, ((4, 0),)), [Mask(0, None, ((4, 0),)), ablation]])


@pytest.mark.parametrize(
    ("ablation", "message"),
    [
        (
            add(1, "hook_mlp_out", (4,), torch.ones(3)),
            r"shape \[3\] does not fit blocks\.1\.hook_mlp_out.*takes \[1, 16\]",
        ),
        (add(0, "hook_resid_pre", (3, 4), torch.ones(3, 16)), r"shape \[3, 16\] does not fit .*takes \[2, 16\]"),
        (add(0, "hook_resid_pre", (4,), torch.ones(1, 1, 16)), r"shape \[1, 1, 16\] was captured over 1 tokens"),
        (add(0, "attn.hook_z", (4,), torch.ones(3, 4)), r"shape \[3, 4\] does not fit .*takes \[1, 4, 4\]"),
        (
            add(0, "attn.hook_z", (4,), torch.ones(4, 4), (1, 2)),
            r"shape \[4, 4\] does not fit .*takes \[1, 2, 4\]",
        ),
    ],
)
def test_sweep_refuses_a_value_that_does_not_fit_before_it_computes(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, ablation: Intervention, message: str
) -> None:
    monkeypatch.setattr(tiny.engine, "cones", [])
    monkeypatch.setattr(tiny.hooked, "run", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(NoSuchPlace, match=f"^ablation 1: a value of {message}"):
        tiny.sweep(TEXT, [Mask(0, None, ((4, 0),)), ablation])


def test_sweep_refuses_a_value_that_is_not_as_wide_as_a_head(tiny: Model) -> None:
    with pytest.raises(NoSuchPlace, match=r"shape \[3\] does not fit blocks\.1\.attn\.hook_z, which takes \[1, 4, 4\]"):
        tiny.sweep(TEXT, [add(1, "attn.hook_z", (4,), torch.ones(3))])


@pytest.mark.parametrize(
    "value", [torch.tensor(2.0), torch.ones(1), torch.ones(16), torch.ones(1, 16), torch.ones(2, 1)]
)
def test_sweep_takes_values_of_every_shape_that_fits(tiny: Model, value: torch.Tensor) -> None:
    one = add(1, "hook_mlp_out", (3, 4), value)
    assert tiny.sweep(TEXT, one).frame["kl"][0] == pytest.approx(tiny.ablate(TEXT, one).kl, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("one", [zero(1, "hook_mlp_out", (4,)), Mask(1, None, ((4, 0),))], ids=["edit", "mask"])
def test_sweep_of_a_single_intervention_is_one_ablation(tiny: Model, one: Intervention) -> None:
    alone, listed = tiny.sweep(TEXT, one).frame, tiny.sweep(TEXT, [one]).frame
    assert alone.height == 1
    assert alone.equals(listed)


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: model.knockout(TEXT, layers="all", queries="all"),
        lambda model: model.sweep(TEXT, [Mask(layer, None, ((at, 0),)) for layer in (0, 1) for at in range(5)]),
    ],
    ids=["knockout", "sweep"],
)
def test_what_did_not_go_the_model_s_way_is_warned_of_once(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, measure: Any
) -> None:
    flipped: list[str] = []

    def flips(*_: object) -> Any:
        flipped.append(f"its experts flip, {len(flipped)}")
        raise NotClean(flipped[-1])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = measure(tiny).frame["kl"].to_list()
    with monkeypatch.context() as patched:
        patched.setattr("raymi.model.cone.Cone.measure", flips)
        with pytest.warns(UserWarning, match="measured by full forwards") as warned:
            found = measure(tiny).frame
    [warning] = warned
    assert len(flipped) > 1
    assert str(warning.message).startswith(f"org/tiny: {len(flipped)} batches of ablations were measured")
    assert str(warning.message).endswith(
        "not by the model's way (cone); the first because: NotClean: its experts flip, 0"
    )
    assert warning.filename == __file__
    assert set(found["engine"]) == {"full"}
    assert found["kl"].to_list() == pytest.approx(exact, rel=1e-3, abs=1e-6)
    assert tiny.engine.gave_up == []


def test_no_warning_is_of_a_call_that_failed_before(tiny: Model) -> None:
    tiny.engine.gave_up.append("a value does not fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.knockout(TEXT)
        tiny.engine.gave_up.append("a value does not fit")
        tiny.sweep(TEXT, Mask(0, None, ((4, 0),)))

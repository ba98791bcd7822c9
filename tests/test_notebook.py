import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import raymi
from raymi import Mask, Model, Prompt, UserError
from raymi.heatmap import heatmap
from raymi.interventions import Intervention, add, mean, replace, scale, zero
from raymi.model.cone import NotClean
from raymi.model.sites import NoSuchPlace, UnknownSite
from tests.fakes import LLAMA, WORDS, add_model
from tests.families import save

TEXT = "The capital of France is"
LONG = "The capital of France is Paris and the capital of Peru is Lima and it was"
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 13}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    add_model(folder, "org/tiny", scale=0.6)
    add_model(folder, "org/windowed", MISTRAL, scale=0.6)
    add_model(folder, "org/mute", tokenizer=False)
    return folder


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Model:
    return raymi.load("org/tiny", cache_dir=cache)


# -- the package -----------------------------------------------------------------------------------------------------


def test_load_and_measure_without_ray_and_import_raymi_without_anything(cache: Path) -> None:
    code = f"""
import sys, raymi
heavy = {{"ray", "torch", "transformers", "polars", "pyarrow", "pydantic"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
model = raymi.load("org/tiny", cache_dir={str(cache)!r})
model.knockout({TEXT!r}, answer=" Paris", layers="all").heatmap("kl")
assert "torch" in sys.modules and "ray" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_package_names_its_api() -> None:
    assert set(raymi.__all__) <= set(dir(raymi))
    assert all(getattr(raymi, name) is not None for name in raymi.__all__)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        raymi.laod  # noqa: B018  # pyright: ignore
    assert raymi.interventions.Mask is raymi.Mask
    assert set(raymi.interventions.__all__) <= set(dir(raymi.interventions))


# -- clean -----------------------------------------------------------------------------------------------------------


def test_clean_run_is_the_model_s_own(tiny: Model) -> None:
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(tiny.cached.path, attn_implementation="eager")
    ids = torch.tensor([[WORDS.index(word) for word in TEXT.split()]])
    with torch.no_grad():
        expected = own(ids, output_attentions=True, output_hidden_states=True)

    run = tiny.clean(TEXT, capture=["blocks.1.attn.hook_pattern", "blocks.1.hook_resid_pre"])

    assert run.tokens == tuple(TEXT.split())
    torch.testing.assert_close(run.logits, expected.logits[0, -1], atol=1e-5, rtol=0)
    assert list(run.cache) == ["blocks.1.attn.hook_pattern", "blocks.1.hook_resid_pre"]
    torch.testing.assert_close(run.cache["blocks.1.attn.hook_pattern"], expected.attentions[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(run.cache["blocks.1.hook_resid_pre"], expected.hidden_states[1], atol=1e-5, rtol=1e-5)

    probs = expected.logits[0, -1].double().softmax(0)
    top = run.top(3)
    assert top["token_id"].to_list() == probs.argsort(descending=True)[:3].tolist()
    assert top["token"].to_list() == [WORDS[i] for i in top["token_id"]]
    assert top["prob"].to_list() == pytest.approx(sorted(probs.tolist(), reverse=True)[:3], abs=1e-6)
    assert top["rank"].to_list() == [0, 1, 2]


def test_what_is_shown_of_things(tiny: Model) -> None:
    shown = repr(tiny)
    assert "org/tiny" in shown
    assert "2 layers, 4 heads, hidden size 16" in shown
    assert "float32 on cpu" in shown
    assert "'France'" in repr(tiny.clean(TEXT, capture=["blocks.0.hook_resid_pre"]))
    assert "KL" in repr(tiny.ablate(TEXT, Mask(0, None, ((4, 0),))))
    assert "logit_diff" in repr(tiny.knockout(TEXT))
    assert "logit_diff" in repr(tiny.sweep(TEXT, [Mask(0, None, ((4, 0),))]))


# -- ablations -------------------------------------------------------------------------------------------------------


def test_knockouts_are_full_forwards_with_masks(tiny: Model) -> None:
    prompt = Prompt("mine", LONG, answer=" Paris", wrong=" Lima")
    axes: dict[str, Any] = {"layers": "all", "heads": {"each": "all"}, "queries": "all", "keys": "all"}
    found = tiny.knockout(prompt, **axes, keep_logits=True)

    n = len(LONG.split())
    assert found.frame.height == 2 * 4 * n * (n + 1) // 2 > 2 * 512, "several units"
    assert found.frame["ablation_id"].n_unique() == found.frame.height
    assert found.frame.equals(found.frame.sort("query", "layer", "head", "key"))
    assert found.logits is not None
    for index in (0, 1, 511, 512, 700, 1023, 1024, found.frame.height - 1):
        row = found.frame.row(index, named=True)
        one = tiny.ablate(prompt, Mask(row["layer"], (row["head"],), ((row["query"], row["key"]),)))
        torch.testing.assert_close(found.logits[index], one.ablated.logits, atol=1e-5, rtol=0)
        assert row["kl"] == pytest.approx(one.kl, rel=1e-3, abs=1e-6)
        paris, lima = (one.clean.logits - one.ablated.logits)[[WORDS.index("Paris"), WORDS.index("Lima")]].tolist()
        assert row["logit_diff"] == pytest.approx(paris, abs=1e-5)
        assert row["margin_diff"] == pytest.approx(paris - lima, abs=1e-5)
        assert row["prompt_id"] == "mine"
    assert found.frame["kl"].max() > 1e-3, "something changes"  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]


def test_frame_names_tokens(tiny: Model) -> None:
    found = tiny.knockout(TEXT, answer=" Paris", subject="France", layers=[0], keys={"together": ["first", "subject"]})
    row = found.frame.row(0, named=True)
    assert (row["layers"], row["heads"], row["queries"], row["keys"]) == ([0], None, [4, 4], [0, 3])
    assert (row["query_token"], row["key_token"], row["answer_token"], row["wrong_token"]) == (
        "is", None, "Paris", None,
    )  # fmt: skip
    assert row["top1_clean_token"] == WORDS[row["top1_clean"]]
    assert [each["token"] for each in row["changed"]] == [WORDS[each["token_id"]] for each in row["changed"]]
    assert len(row["changed"]) == 10
    assert len(tiny.knockout(TEXT, top_k=3).frame["changed"][0]) == 3
    assert found.logits is None


def test_ablation_keeps_both_runs(tiny: Model) -> None:
    site = "blocks.0.attn.hook_pattern"
    masks = [Mask(0, (2,), ((4, 0), (4, 3))), Mask(1, None, ((0, 0),))]
    both = tiny.ablate(TEXT, masks, capture=[site])

    clean, ablated = both.clean.cache[site], both.ablated.cache[site]
    assert clean.shape == ablated.shape == (1, 4, 5, 5)
    assert (clean > 0).sum() == 4 * 15
    assert ablated[0, 2, 4, [0, 3]].tolist() == [0, 0]
    torch.testing.assert_close(ablated[0, 3], clean[0, 3])
    assert (both.fired, both.empty_rows) == (2 + 4, 4)
    p, q = both.clean.logits.double().softmax(0), both.ablated.logits.double().softmax(0)
    assert both.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    most = (p - q).abs().argmax()
    assert both.changed(3).row(0, named=True)["token_id"] == int(most)
    assert both.changed(3)["prob_ablated"][0] == pytest.approx(float(q[most]), abs=1e-6)


def test_prompt_past_a_window_is_measured_after_another_check(cache: Path) -> None:
    model = raymi.load("org/windowed", cache_dir=cache)
    assert model.engine.capability.n_tokens <= 13
    found = model.knockout(LONG, layers="all", keys={"each": "all"})
    assert model.engine.capability.n_tokens > 13
    for row in found.frame.iter_rows(named=True):
        if row["key"] >= 16 - 13:  # others are out of the window already
            full = model.ablate(LONG, Mask(row["layer"], None, ((15, row["key"]),)))
            assert row["kl"] == pytest.approx(full.kl, rel=1e-3, abs=1e-6)


# -- sweeps ----------------------------------------------------------------------------------------------------------


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
        (add(0, "hook_resid_pre", (4,), torch.ones(1, 1, 16)), r"shape \[1, 1, 16\] does not fit .*takes \[1, 16\]"),
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


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.clean(""), "no tokens"),
        (lambda m: m.clean("is " * 65), "65 tokens are more than its context of 64"),
        (lambda m: m.clean(TEXT, bos="always"), "no beginning-of-sequence token"),
        (lambda m: m.clean(TEXT, chat_template=True), "chat template cannot be used"),
        (lambda m: m.knockout(TEXT, layers=2), "2 is out of range: the model has 2 layers"),
        (lambda m: m.knockout(TEXT, layers="midle"), r"^layers.*did you mean 'middle'"),
        (lambda m: m.knockout(TEXT, heads=[0, 4]), "4 is out of range: the model has 4 heads"),
        (lambda m: m.knockout(TEXT, keys=5), "position 5 is out of range"),
        (lambda m: m.knockout(TEXT, queries="first", keys="last"), r"^keys: .* after query"),
        (lambda m: m.knockout(TEXT, keys={"text": "Spain"}), "'text:Spain', which prompt"),
        (lambda m: m.knockout(TEXT, wrong=" Lima"), "^wrong: a wrong answer needs an answer"),
        (lambda m: m.knockout("is " * 65), "65 tokens are more than its context of 64"),
        (lambda m: m.sweep("is " * 65, [Mask(0, None, ((4, 0),))]), "65 tokens are more than its context of 64"),
        (lambda m: m.sweep(TEXT, [Mask(0, None, ((4, 0),))], wrong=" Lima"), "^wrong: a wrong answer needs an answer"),
        (lambda m: m.sweep(TEXT, []), "no ablations to measure"),
        (lambda m: m.sweep(TEXT, [Mask(0, None, ((4, 0),)), ()]), "ablation 1 has no interventions"),
    ],
)
def test_mistakes_are_named(tiny: Model, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(tiny)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask(2, None, ((4, 0),)), "layers 0 to 1"),
        (Mask(0, (4,), ((4, 0),)), "head 4, where there are 0 to 3"),
        (Mask(0, None, ((5, 0),)), "position 5, where there are 0 to 4"),
    ],
)
def test_no_mask_acts_on_what_is_not_there(tiny: Model, mask: Mask, message: str) -> None:
    with pytest.raises(NoSuchPlace, match=message):
        tiny.ablate(TEXT, mask)


def test_unknown_site_is_named(tiny: Model) -> None:
    with pytest.raises(UnknownSite, match=r"did you mean 'blocks\.0\.attn\.hook_pattern'"):
        tiny.clean(TEXT, capture=["blocks.0.attn.hook_patern"])


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("org/tny", {}, "no model 'org/tny'"),
        ("org/mute", {}, "org/mute cannot run: no tokenizer"),
        ("org/tiny", {"dtype": "float23"}, "did you mean 'float32'"),
        ("org/tiny", {"device": "gpu"}, "device: found 'gpu'; there is here: auto, cpu"),
        ("org/tiny", {"device": "cpu:1"}, "device: found 'cpu:1'"),
    ],
)
def test_what_cannot_be_opened(cache: Path, id: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        raymi.load(id, cache_dir=cache, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.oracle
def test_demo_model_gives_the_known_numbers(demo_cache: Path) -> None:
    """The figures were computed by eager attention with an edited mask, in another program."""
    model = raymi.load("raymi-demo/SmolLM2-135M-Instruct-Q4_1", cache_dir=demo_cache)
    assert model.clean(TEXT).top(1)["token"].to_list() == [" Paris"]
    row = model.knockout(TEXT, answer=" Paris").frame.row(0, named=True)
    assert row["layers"] == [15]
    assert row["kl"] == pytest.approx(0.049847, abs=2e-6)
    assert row["logit_diff"] == pytest.approx(0.93340, abs=1e-4)


@pytest.mark.slow
def test_readme_shows_what_a_notebook_gives(demo_cache: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    readme = readme[readme.index("In a notebook, without Ray:") : readme.index("## Sparse autoencoders")]
    *before, last = "".join(re.findall("```python\n(.*?)```", readme, re.DOTALL)).splitlines()
    scope: dict[str, Any] = {}
    exec("\n".join(before).replace("~/.cache/raymi/hub", str(demo_cache)), scope)
    shown = [[cell.strip() for cell in line.split("┆")] for line in re.findall("^│ (.*) │$", readme, re.MULTILINE)]
    found: pl.DataFrame = eval(last, scope)
    assert shown[0] == found.columns
    for row, written in zip(found.rows(), shown[3:], strict=True):
        for value, text in zip(row, written, strict=True):
            same = pytest.approx(value, abs=1e-4) if isinstance(value, float) else {None: "null"}.get(value, str(value))
            assert (float(text) if isinstance(value, float) else text) == same


# -- heat maps -------------------------------------------------------------------------------------------------------


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


# -- hybrids ---------------------------------------------------------------------------------------------------------


def test_the_loaded_model_tells_which_layers_have_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("lfm2", tmp_path, "org/hybrid")
    monkeypatch.setattr("raymi.snapshot.attention_layers", lambda *_: None)  # whatever config.json says
    hybrid = raymi.load("org/hybrid", cache_dir=tmp_path)
    assert hybrid.knockout(TEXT, layers="all").frame["layer"].to_list() == [1, 4]
    assert hybrid.knockout(TEXT, layers="middle").frame["layer"].to_list() == [4]
    with pytest.raises(UserError, match="layers: 0 has no attention to cut; layers 1, 4 have"):
        hybrid.knockout(TEXT, layers=0)

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import raymi
from raymi import Mask, Model, Prompt, UserError
from raymi.interventions import scale
from raymi.model.sites import NAMES, NoSuchPlace, UnknownSite
from tests.fakes import WORDS
from tests.families import save

TEXT = "The capital of France is"
LONG = "The capital of France is Paris and the capital of Peru is Lima and it was"


# -- the package ------------------------------------------------------------------------------------------------------


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


# -- clean ------------------------------------------------------------------------------------------------------------


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


def test_sites_are_listed(tiny: Model) -> None:
    sites = tiny.sites
    assert sites.columns == ["site", "layer", "name", "editable"]
    assert sites.height == 1 + 2 * len(NAMES), "Llama has them all"
    assert sites.row(0) == ("hook_embed", None, "hook_embed", False)
    names = sites["site"].to_list()
    assert list(tiny.clean(TEXT, capture=names).cache) == names
    of_layer = sites.filter(layer=1).filter("editable")
    assert of_layer["name"].to_list() == [name for name in NAMES if name in raymi.interventions.EDITABLE]
    for name in of_layer["name"]:
        assert tiny.ablate(TEXT, scale(1, name, (-1,), 0.5)).fired in (1, 4)
    assert torch.equal(tiny.clean(TEXT).logits, tiny.clean(TEXT, capture=names).logits)


# -- ablations --------------------------------------------------------------------------------------------------------


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


# -- mistakes ---------------------------------------------------------------------------------------------------------


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
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    readme = readme[readme.index("In a notebook, without Ray:") : readme.index("## Sparse autoencoders")]
    *before, last = "".join(re.findall("```python\n(.*?)```", readme, re.DOTALL)).splitlines()
    scope: dict[str, Any] = {}
    exec("\n".join(before).replace("~/.cache/raymi/hub", str(demo_cache)), scope)
    shown = [[cell.strip() for cell in line.split("┆")] for line in re.findall("^│ (.*) │$", readme, re.MULTILINE)]
    swapped = [(row["token"], round(row["prob_clean"], 3), round(row["prob_ablated"], 3))
               for row in scope["swapped"].changed(2).rows(named=True)]  # fmt: skip
    assert swapped == [(" Paris", 0.771, 0.001), (" Rome", 0.001, 0.426)]
    found: pl.DataFrame = eval(last, scope)
    assert shown[0] == found.columns
    for row, written in zip(found.rows(), shown[3:], strict=True):
        for value, text in zip(row, written, strict=True):
            same = pytest.approx(value, abs=1e-4) if isinstance(value, float) else {None: "null"}.get(value, str(value))
            assert (float(text) if isinstance(value, float) else text) == same


# -- hybrids ----------------------------------------------------------------------------------------------------------


def test_the_loaded_model_tells_which_layers_have_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("lfm2", tmp_path, "org/hybrid")
    monkeypatch.setattr("raymi.snapshot.attention_layers", lambda *_: None)  # whatever config.json says
    hybrid = raymi.load("org/hybrid", cache_dir=tmp_path)
    assert hybrid.knockout(TEXT, layers="all").frame["layer"].to_list() == [1, 4]
    assert hybrid.knockout(TEXT, layers="middle").frame["layer"].to_list() == [4]
    with pytest.raises(UserError, match="layers: 0 has no attention to cut; layers 1, 4 have"):
        hybrid.knockout(TEXT, layers=0)

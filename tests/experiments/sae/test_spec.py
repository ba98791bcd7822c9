"""What an experiment with autoencoders says, what is wrong in it, and what of it is measured on a text."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeChoice, SaeRef
from raymi.experiments.sae.spec import SCHEMAS, TABLES, Injection, SaeSpec, cell_id, work
from raymi.fields import say
from raymi.prompts import Prompt, TokenizedPrompt

A = SaeRef("org/s:a", "org/s@c:a", "c", "blocks.3.hook_resid_post", None, 8)
B = SaeRef("org/s:b", "org/s@c:b", "c", "blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out", 4)


def spec(measure: str = "quality", **fields: Any) -> SaeSpec:
    return SaeSpec.model_validate({"kind": "sae", "measure": measure, **fields})


def injection(**fields: Any) -> SaeSpec:
    return spec("injection", **{"features": [1], "strengths": [2.0], **fields})


def prompt(size: int = 4, **fields: Any) -> TokenizedPrompt:
    ids = tuple(range(size))
    return TokenizedPrompt(Prompt("p", "p"), ids, tuple(map(str, ids)), False, None, None, {"subject": (1, 2)})


def test_what_is_not_said() -> None:
    found = spec()
    assert (found.name, found.saes, found.prompts) == ("quality", (SaeChoice(sae="*"),), ("*",))
    assert (str(found.skip), found.any_model, found.corpus) == ("special tokens", False, None)
    assert injection().positions.each == ("last",)
    assert spec(saes="org/*:layer_3/*").saes == (SaeChoice(sae="org/*:layer_3/*"),)
    assert spec(saes=["org/a:b", {"sae": "org/c", "site": "hook_embed"}]).saes[1].site == "hook_embed"
    assert spec(name="mine").name == "mine"
    assert {measure: SCHEMAS[table].names[0] for measure, table in TABLES.items()} == dict.fromkeys(TABLES, "unit_id")


@pytest.mark.parametrize(
    ("skip", "said"),
    [
        ({}, "special tokens"),
        ({"first": 3}, "special tokens and the first 3"),
        ({"special": False, "first": 1}, "the first 1"),
        ({"special": False}, "nothing"),
    ],
)
def test_what_is_skipped_in_words(skip: dict[str, Any], said: str) -> None:
    assert str(spec(skip=skip).skip) == said


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"measure": "qualty"}, "measure", "found 'qualty'; allowed: features, quality, injection, ablation"),
        ({"measure": "injection", "strengths": 1.0}, "features", "found nothing; allowed: at least one"),
        ({"measure": "injection", "features": 1}, "strengths", "found nothing; allowed: at least one"),
        ({"features": 1}, "features", "is for injection, not for quality"),
        ({"positions": "all"}, "positions", "is for injection, not for quality; `skip` says which tokens count"),
        ({"measure": "injection", "features": 1, "strengths": 1, "skip": {"first": 1}}, "skip", "there is nothing to"),
        ({"saes": []}, "saes", "found nothing; allowed: at least one"),
        ({"saes": {"sae": "org/*", "input_scale": 2.0}}, "saes.0.input_scale", "is for one SAE, and this is a pattern"),
        ({"saes": {"sae": "org/a", "input_scale": -1.0}}, "saes.0.input_scale", "found -1.0; allowed: more than 0"),
        ({"saes": "./nowhere"}, "saes.0.sae", "there is no folder '"),
        ({"saes": "nowhere"}, "saes.0.sae", "there is no folder '"),
        ({"saess": "a"}, "saess", "unknown field; allowed: kind, name"),
        ({"measure": "injection", "features": -1, "strengths": 1}, "features.0", "found -1; allowed: 0 or more"),
        ({"measure": "injection", "features": 1, "strengths": "x"}, "strengths.0", "found 'x'; allowed: a number"),
        (
            {"measure": "injection", "features": 1, "strengths": float("nan")},
            "strengths.0",
            "found nan; allowed: a finite number",
        ),
    ],
)  # fmt: skip
def test_mistakes(fields: dict[str, Any], place: str, message: str) -> None:
    with pytest.raises(ValidationError) as error:
        spec(**fields)
    [only] = error.value.errors()
    assert ".".join(map(str, only["loc"])) == place
    assert message in say(only)


def test_a_corpus_is_for_texts_without_answers_and_in_place_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("some text")
    corpus = {"file": tmp_path / "c.txt"}
    assert spec(corpus=corpus).corpus
    for fields in ({"measure": "ablation"}, {"measure": "injection", "features": 1, "strengths": 1}):
        with pytest.raises(ValidationError, match="is for features and quality"):
            spec(corpus=corpus, **fields)
    with pytest.raises(ValidationError, match="found a corpus beside it"):
        spec(corpus=corpus, prompts="a*")


def test_folders_are_relative_to_the_job_file_and_win_over_repositories(tmp_path: Path) -> None:
    (tmp_path / "org" / "sae").mkdir(parents=True)
    context = {"folder": tmp_path}
    data = {"kind": "sae", "measure": "quality", "saes": ["./org/sae", "org/sae", "org/other"]}
    chosen = SaeSpec.model_validate(data, context=context).saes
    assert [choice.local for choice in chosen] == [tmp_path / "org/sae", tmp_path / "org/sae", None]


def test_the_same_experiment_has_one_name_however_written(tmp_path: Path) -> None:
    assert spec(saes="org/a", skip={"special": True}).canonical == spec(saes=[{"sae": "org/a"}]).canonical
    (tmp_path / "c.txt").write_text("some text")
    written = spec(corpus={"file": tmp_path / "c.txt"}).canonical
    assert "c.txt" not in written
    (tmp_path / "c.txt").write_text("other text")
    assert spec(corpus={"file": tmp_path / "c.txt"}).canonical != written
    assert len({injection().canonical, injection(features=2).canonical, injection(strengths=3.0).canonical}) == 3


def test_texts_are_read_by_every_autoencoder() -> None:
    for measure in ("features", "quality", "ablation"):
        assert work(spec(measure), prompt(), [A, B]) == (A, B)


def test_injections() -> None:
    asked = injection(features=[5, 1, 1], strengths=[50, -2], positions={"each": ["last", "subject"]})
    found = work(asked, prompt(), [A, B])
    assert found == tuple(
        Injection(sae, feature, strength, (at,))
        for at in (1, 2, 3)
        for sae, feature in ((A, 1), (A, 5), (B, 1))  # B has no feature 5
        for strength in (-2.0, 50.0)
    )
    [together] = work(injection(positions={"together": ["all"]}), prompt(), [A])
    assert together == Injection(A, 1, 2.0, (0, 1, 2, 3))
    assert work(injection(), prompt(), []) == ()
    with pytest.raises(UserError, match="experiment 'injection': prompt 'p': position 9 is out of range"):
        work(injection(positions=9), prompt(), [A])


def test_places() -> None:
    assert (A.written, A.layer) == ("blocks.3.hook_resid_post", 3)
    assert (B.written, B.layer) == ("blocks.5.hook_mlp_out", 5)
    assert SaeRef("a", "a", "v", "hook_embed", None, 4).layer == 0


def test_cells_have_one_name_in_every_run() -> None:
    name = cell_id("org/m", [1, 2], A, ["injection", 3, 5.0, [1]])
    assert name == cell_id("org/m", (1, 2), A, ["injection", 3, 5.0, [1]])
    others = [
        cell_id("org/n", [1, 2], A, ["injection", 3, 5.0, [1]]),
        cell_id("org/m", [1, 3], A, ["injection", 3, 5.0, [1]]),
        cell_id("org/m", [1, 2], B, ["injection", 3, 5.0, [1]]),
        cell_id("org/m", [1, 2], A, ["injection", 4, 5.0, [1]]),
    ]
    assert len({name, *others}) == 5

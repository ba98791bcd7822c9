"""How texts begin for autoencoders whose files say it, where the job does not."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.cluster.test_sae_jobs import HEADS, PARIS, ROME, counts, folder, messages, one_thread, rows, run, units
from tests.fakes import TOKENIZER, TOKENIZER_CONFIG, add_files, add_model, sae_files

__all__ = ["folder", "one_thread"]
L0 = "blocks.0.hook_resid_post"
QUALITY = "{kind: sae, measure: quality, saes: 'org/%s', corpus: {file: c.jsonl, context: 8, chunks: 4}}"
FEATURES = "{kind: sae, measure: features, saes: 'org/%s'}"
INJECTION = "{kind: sae, measure: injection, saes: 'org/%s', features: 1, strengths: 5}"


@pytest.fixture(autouse=True)
def with_bos(folder: Path) -> None:
    """The same model with a tokenizer that puts BOS before every text, and autoencoders that say how they were fed."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }
    files = {
        "tokenizer.json": TOKENIZER | {"post_processor": template},
        "tokenizer_config.json": TOKENIZER_CONFIG | {"bos_token": "<s>"},
    }
    add_model(Path("cache"), "org/tiny", files=files, revision="b" * 40)
    wants = {"with": [("a", True), ("b", True)], "without": [("a", False)], "silent": [("a", None)]}
    for repo, its in wants.items():
        files = {}
        for path, want in its:
            metadata: dict[str, Any] = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": L0}
            metadata |= {} if want is None else {"prepend_bos": want}
            content = sae_files(L0, seed=ord(path), metadata=metadata)
            files |= {f"{path}/{file}": data for file, data in content.items()}
        add_files(Path("cache"), f"org/{repo}", files)


BOS = TOKENIZER["model"]["vocab"]["<s>"]


def begins(prompt_ids: pl.Series) -> set[bool]:
    """Whether texts begin with BOS."""
    texts = rows("prompts").filter(pl.col("prompt_id").is_in(prompt_ids.to_list()))
    assert texts.height == prompt_ids.n_unique()
    found = {ids[0] == BOS for ids in texts["token_ids"].to_list()}
    assert found == set(texts["bos"])
    return found


def test_autoencoders_that_agree_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    experiments = (HEADS, QUALITY % "without:*", FEATURES % "without:*", INJECTION % "without:*")
    result = run(*experiments, prompts=(PARIS, ROME))
    assert not result.failed, messages(result)
    assert begins(rows("ablations")["prompt_id"]) == {True}  # knockouts are as ever
    assert set(rows("ablations")["prompt_id"]) == {"paris", "rome"}
    for table in ("sae_features", "sae_injections"):
        assert set(rows(table)["prompt_id"]) == {"paris [without BOS]", "rome [without BOS]"}
        assert begins(rows(table)["prompt_id"]) == {False}
        assert set(rows(table)["bos_differs"]) == {False}
    assert rows("sae_quality")["texts"].to_list() == [4]
    chunks = rows("prompts").filter(pl.col("prompt_id").str.contains(r"/.*without"))
    assert chunks.height == 4
    assert not any(ids[0] == BOS for ids in chunks["token_ids"])
    assert rows("verifications")["passed"].all()

    before = counts()
    with monkeypatch.context() as patched:
        patched.setattr("raymi.cluster.sweep._backend", None)  # not even asked for
        again = run(*experiments, prompts=(PARIS, ROME))
    assert not again.started
    assert counts() == before
    more = run(*experiments, prompts=(PARIS, ROME, "{id: madrid, text: The capital of Spain is, answer: ' Paris'}"))
    assert not more.failed, messages(more)
    assert set(rows("sae_injections")["prompt_id"]) == {f"{p} [without BOS]" for p in ("paris", "rome", "madrid")}
    assert rows("sae_quality").height == 1


def test_answers_that_are_hardly_given_are_said_of_these_texts_too() -> None:
    result = run(INJECTION % "without:*", prompts=(PARIS,))
    assert not result.failed, messages(result)
    assert (rows("sae_injections")["answer_rank_clean"] >= 5).all()
    [said] = rows("events").filter(pl.col("kind") == "answers")["message"]
    assert "'paris [without BOS]'" in said


@pytest.mark.parametrize("saes", ["with:*", "silent:a"])
def test_where_they_say_what_the_tokenizer_does_nothing_is_new(saes: str) -> None:
    experiments = (QUALITY % saes, FEATURES % saes, INJECTION % saes)
    run(*experiments)
    found = units()
    assert not rows("prompts")["prompt_id"].str.contains("BOS").any()
    run(*experiments, more="bos: auto", store="other")
    assert units("other") == found
    expected = {None} if saes == "silent:a" else {False}
    assert set(rows("sae_features")["bos_differs"]) == set(rows("sae_quality")["bos_differs"]) == expected


def test_what_the_job_writes_wins() -> None:
    result = run(FEATURES % "without:*", more="bos: always")
    assert not result.failed, messages(result)
    assert set(rows("sae_features")["prompt_id"]) == {"paris"}
    assert set(rows("sae_features")["bos_differs"]) == {True}
    run(FEATURES % "with:*", more="bos: never", store="other")
    assert set(rows("sae_features", "other")["bos_differs"]) == {True}


def test_autoencoders_that_do_not_agree_are_refused_with_the_groups() -> None:
    result = run(HEADS, FEATURES % "*")
    [message] = messages(result)
    assert message.startswith(
        "org/tiny: experiment 'features': its SAEs were trained on texts that begin differently\n"
    )
    assert "\n  with BOS: org/with:a, org/with:b\n  without BOS: org/without:a\n" in message
    assert "`bos: always`" in message
    assert not run(FEATURES % "*", more="bos: always", store="other").failed
    assert set(rows("sae_features", "other").filter(sae="org/without:a")["bos_differs"]) == {True}
    assert set(rows("sae_features", "other").filter(sae="org/saes:a")["bos_differs"]) == {None}

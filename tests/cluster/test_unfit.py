"""Prompts that a model cannot measure fail by name, and the rest is measured: on tiny models, in this process."""

import json
from pathlib import Path
from typing import Any

import pytest

import raymi.store
from raymi.report import tables
from tests.cluster.test_tokens import one_thread, rows, run  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tests.fakes import LLAMA, TOKENIZER, add_model, write_sae

PARIS = {"id": "paris", "text": "The capital of France is", "answer": " Paris"}
ROME = {"id": "rome", "text": "The capital of Italy is", "answer": " Rome"}
GOOD = (PARIS, ROME)
BAD = {
    "glued": {"text": "The capital of France is Par", "answer": "is"},
    "alike": {"text": "The capital of France is", "answer": " Paris", "wrong": " Paris "},
    "nothing": {"text": "The capital of France is", "answer": " "},
    "beyond": {"text": "The beyond of France is"},
    "long": {"text": "the " * (LLAMA["max_position_embeddings"] + 1)},
    "short": {"text": "The capital"},
}
SAYS = {
    "glued": "are not tokenised jointly",
    "alike": "no token tells the answer",
    "nothing": "adds no token",
    "beyond": "which the model has no embedding for",
    "long": "more than the model's context of 64",
    "short": "position 3 is out of range: the prompt has 2 tokens",
}


@pytest.fixture(autouse=True)
def model(run: Any) -> None:  # noqa: F811  # it changes into an empty folder
    vocabulary = TOKENIZER["model"]["vocab"] | {"beyond": LLAMA["vocab_size"] + 3}
    tokenizer = TOKENIZER | {"model": {**TOKENIZER["model"], "vocab": vocabulary}}
    add_model(Path("cache"), "org/small", scale=0.5, files={"tokenizer.json": tokenizer})


def write(*prompts: dict[str, str], **fields: Any) -> None:
    knockout = {"kind": "knockout", "layers": {"each": "all"}, "queries": 3, "keys": "first"}
    job = {"name": "bad", "models": "org/*", "prompts": prompts, "experiments": [knockout], "verify": 2, **fields}
    Path("job.json").write_text(json.dumps(job))


def bad(*ids: str) -> list[dict[str, str]]:
    return [{"id": each, **BAD[each]} for each in ids]


def open_failures() -> dict[str, str]:
    store = raymi.store.open("store")
    return {row["message"].split("'")[1]: row["message"] for row in tables.report(store).failures.to_dicts()}


def test_every_fault_of_a_prompt_is_its_own(run: Any) -> None:  # noqa: F811
    write(*bad(*BAD), *GOOD)
    said = run()
    assert said.code == 1
    assert "... and 3 more prompts that cannot be measured" in said.err
    assert "Traceback" not in said.err
    failures = {row["prompt_id"]: row for row in rows("failures").to_dicts()}
    assert {each: SAYS[each] in failures[each]["message"] for each in failures} == dict.fromkeys(BAD, True)
    assert {(row["stage"], row["unit_id"]) for row in failures.values()} == {("prompt", None)}
    assert set(rows()["prompt_id"]) == {"paris", "rome"}
    assert rows("verifications")["passed"].all()
    # The others are where they would be without them.
    write(*GOOD)
    assert run("--store", "other").code == 0
    other = raymi.store.open("other").scan("ablations").collect()
    assert set(other["unit_id"]) == set(rows()["unit_id"])


def test_a_prompt_that_failed_stays_open_until_it_leaves_the_job(run: Any) -> None:  # noqa: F811
    write(PARIS, *bad("glued", "long"))
    run()
    before = rows()
    said = run()
    assert said.code == 1
    assert "'glued'" in said.err
    assert "'long'" in said.err
    assert rows().equals(before)
    assert tables.report(raymi.store.open("store")).failures["attempts"].to_list() == [2, 2]
    write(PARIS)
    said = run()
    assert said.code == 0
    assert "nothing to do" in said.out
    assert not tables.report(raymi.store.open("store")).failures.height


@pytest.mark.parametrize("fault", ["glued", "beyond", "short"])  # read, known, placed
def test_a_mended_prompt_heals_and_moves_no_unit(run: Any, fault: str) -> None:  # noqa: F811
    write(PARIS, *bad(fault), ROME)
    assert run().code == 1
    before = rows()
    write(PARIS, {"id": fault, "text": "The capital of Spain is", "answer": " Madrid"}, ROME)
    said = run()
    assert said.code == 0, said.err
    assert not tables.report(raymi.store.open("store")).failures.height
    assert rows().filter(rows()["prompt_id"] != fault).sort("ablation_id").equals(before.sort("ablation_id"))
    assert rows().filter(rows()["prompt_id"] == fault).height == 2
    [read] = rows("prompts").filter(rows("prompts")["prompt_id"] == fault).to_dicts()
    assert read["text"] == "The capital of Spain is"
    assert "nothing to do" in run().out
    write(PARIS, {"id": fault, "text": "The capital of Peru is", "answer": " Lima"}, ROME)
    said = run()
    assert said.code == 2, "what was measured is settled"
    assert f"prompt '{fault}' is not what it was" in said.err


def test_strict_fails_the_model_and_goes_on_without_it_in_the_same_run(run: Any) -> None:  # noqa: F811
    write(*bad("glued"), PARIS, *bad("long"), strict=True)
    said = run()
    assert said.code == 1
    [failure] = rows("failures").to_dicts()
    assert (failure["stage"], failure["prompt_id"]) == ("plan", None)
    assert "'glued'" in failure["message"]
    assert "'long'" in failure["message"]
    assert rows().is_empty()
    assert run("--set", "strict=false").code == 1
    assert set(rows()["prompt_id"]) == {"paris"}
    assert len(raymi.store.open("store").runs()) == 1
    assert set(open_failures()) == {"glued", "long"}


def test_a_prompt_may_fail_one_experiment_and_not_another(run: Any) -> None:  # noqa: F811
    knockout = {"kind": "knockout", "layers": {"each": "all"}, "keys": "first"}
    experiments = [{"name": "last", "queries": "last"}, {"name": "third", "queries": 3}]
    write(*bad("short"), PARIS, experiments=[knockout | each for each in experiments])
    assert run().code == 1
    assert set(open_failures()) == {"third"}
    measured = set(rows().select("experiment", "prompt_id").iter_rows())
    assert measured == {("last", "short"), ("last", "paris"), ("third", "paris")}
    write({"id": "short", "text": "The capital of Spain is"}, PARIS)
    assert run().code in (0, 2)
    write({"id": "short", "text": "The capital of Spain is"}, PARIS, experiments=[knockout | e for e in experiments])
    assert "prompt 'short' is not what it was" in run().err


def test_prompts_that_begin_otherwise_for_an_autoencoder(run: Any) -> None:  # noqa: F811
    metadata = {
        "sae_lens_version": "6.54.12",
        "model_name": "org/small",
        "hook_name": "blocks.1.hook_resid_pre",
        "prepend_bos": False,
    }
    write_sae(Path("saes"), "blocks.1.hook_resid_pre", metadata=metadata)
    experiment = {"kind": "sae", "measure": "features", "saes": "saes"}
    write(*bad("glued", "long"), PARIS, experiments=[experiment])
    said = run()
    assert said.code == 1, said.err
    assert {each.partition(" [")[0] for each in rows("failures")["prompt_id"]} == {"glued", "long"}, said.err
    assert {each.removesuffix(" [without BOS]") for each in rows("sae_features")["prompt_id"]} == {"paris"}


def test_a_rehearsal_names_them(run: Any) -> None:  # noqa: F811
    write(*bad("glued", "long"), PARIS)
    said = run("--dry-run")
    assert said.code == 1
    assert "'glued'" in said.err
    assert "'long'" in said.err
    assert said.out.splitlines()[1].split()[1:3] == ["1", "2"]
    assert not Path("store").exists()

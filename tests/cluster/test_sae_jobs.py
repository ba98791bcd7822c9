"""Jobs with autoencoders from the file to the rows, in this process: what is found, pinned, and done again."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import raymi.store
from raymi.cluster.frozen import Cache
from raymi.cluster.rehearsal import rehearse
from raymi.cluster.sweep import Order, Result, sweep
from raymi.cluster.worker import Failed, Worker
from raymi.errors import UserError
from raymi.experiments.unit import Unit
from raymi.job import load_job
from raymi.store.schemas import UNIT_TABLES
from tests.fakes import add_model, add_saes, write_sae

L0, L1 = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
PARIS = "{id: paris, text: The capital of France is, answer: ' Paris'}"
ROME = "{id: rome, text: The capital of Italy is, answer: ' Rome'}"
HEADS = "{kind: knockout, name: heads, layers: all}"
QUALITY = "{kind: sae, measure: quality, corpus: {file: c.jsonl, context: 8}}"
FEATURES = "{kind: sae, measure: features, corpus: {file: c.jsonl, context: 8, chunks: 3}}"
INJECTION = "{kind: sae, measure: injection, features: [1, 2], strengths: [5, 50]}"
ABLATION = "{kind: sae, measure: ablation, saes: 'org/saes:b'}"
EVERYTHING = (HEADS, QUALITY, FEATURES, INJECTION, ABLATION)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take longer by two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, two autoencoders of it, and a corpus."""
    monkeypatch.chdir(tmp_path)
    add_model(Path("cache"), "org/tiny")
    add_saes(Path("cache"), "org/saes", {"a": L0, "b": L1})
    text = "The capital of France is Paris and it was in the"
    Path("c.jsonl").write_text("\n".join(json.dumps({"text": f"{text} {i}"}) for i in range(20)))
    return tmp_path


def order(*experiments: str, prompts: tuple[str, ...] = (PARIS,), models: str = "org/tiny", more: str = "") -> Order:
    listed = "\n".join(f"  - {each}" for each in experiments)
    head = f"name: saes\nmodels: {models}\nverify: 5\n{more}\n"
    Path("job.yaml").write_text(f"{head}prompts: [{', '.join(prompts)}]\nexperiments:\n{listed}\n")
    job = load_job(Path("job.yaml"))
    return Order(job, Path("job.yaml").read_text(), job.run_name, Cache(Path("cache")), inline=True)


def run(*experiments: str, store: str = "store", **more: Any) -> Result:
    return sweep(order(*experiments, **more), raymi.store.open(store))


def messages(result: Result) -> list[str]:
    return [trouble.failure.message for trouble in result.ending.failures]


def rows(table: str, store: str = "store") -> pl.DataFrame:
    return raymi.store.open(store).scan(table).collect()


def counts(store: str = "store") -> dict[str, int]:
    return {table: rows(table, store).height for table in ("prompts", "saes", *UNIT_TABLES)}


def units(store: str = "store") -> dict[str, list[str]]:
    return {table: sorted(rows(table, store)["unit_id"].unique()) for table in UNIT_TABLES}


def test_knockouts_and_autoencoders_in_one_job_on_one_model_load() -> None:
    result = run(*EVERYTHING)
    assert not result.failed, messages(result)
    n_chunks = len(rows("prompts")) - 1
    assert n_chunks == 20 * 12 // 8
    found = counts()
    assert (found["ablations"], found["sae_quality"], found["sae_injections"]) == (2, 2, 8)
    assert found["saes"] == 3 * 2 + 1
    assert rows("models").height == 1
    assert rows("sae_quality")["texts"].to_list() == [n_chunks] * 2
    features = rows("sae_features")
    assert features["prompt_id"].n_unique() == 3  # those are the first of the same chunks
    assert set(features["prompt_id"]) < set(rows("prompts")["prompt_id"])
    assert rows("sae_ablations")["sae"].unique().to_list() == ["org/saes:b"]
    assert rows("verifications").height >= 5
    assert rows("verifications")["passed"].all()
    named = set(rows("sae_injections")["changed"].explode().struct.field("token_id")) | set(features["token_id"])
    assert named <= set(rows("vocabulary")["token_id"])
    for table in UNIT_TABLES:
        assert rows(table)["revision"].unique().to_list() == rows("models")["revision"].to_list()
    [manifest] = raymi.store.open("store").runs()
    assert manifest.status == "done"
    assert "capital" not in json.dumps(manifest.jobs[0].resolved["experiments"])
    assert manifest.generations == [["paris"]]  # chunks are the tokenizer's


def test_issued_again_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    run(*EVERYTHING)
    before = counts()
    monkeypatch.setattr("raymi.cluster.sweep._backend", None)  # not even asked for
    again = run(*EVERYTHING)
    assert not again.started
    assert counts() == before


def interrupted(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Unit], bool]) -> Result:
    measure = Worker._measure

    def failing(self: Worker, unit: Unit) -> Any:
        if fails(unit):
            raise RuntimeError("for a test")
        return measure(self, unit)

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "_measure", failing)
        return run(*EVERYTHING, more="unit_ablations: 8")


@pytest.mark.parametrize("left", [("quality",), ("heads", "injection"), ("features", "ablation", "quality")])
def test_what_is_left_of_a_run_is_measured_and_nothing_else(
    left: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*EVERYTHING, more="unit_ablations: 8", store="undisturbed")
    first = interrupted(monkeypatch, lambda unit: unit.experiment in left)
    assert len(first.ending.failures) == len({u for table in left for u in _units_of(table, "undisturbed")})
    before = units()
    measured: list[str] = []
    measure = Worker._measure
    monkeypatch.setattr(Worker, "_measure", lambda self, unit: measured.append(unit.unit_id) or measure(self, unit))
    again = run(*EVERYTHING, more="unit_ablations: 8")
    assert not again.failed, messages(again)
    assert units() == units("undisturbed")
    assert sorted(measured) == sorted(u for t in UNIT_TABLES for u in set(units()[t]) - set(before[t]))
    assert counts() == counts("undisturbed")


def _units_of(experiment: str, store: str) -> list[str]:
    found = [rows(table, store).filter(experiment=experiment)["unit_id"] for table in UNIT_TABLES]
    return list(pl.concat(found).unique())


def test_added_prompts_bring_only_their_rows_and_corpora_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    run(*EVERYTHING)
    before = units()
    result = run(*EVERYTHING, prompts=(PARIS, ROME))
    assert not result.failed, messages(result)
    after = units()
    assert all(set(before[table]) <= set(after[table]) for table in UNIT_TABLES)
    assert {table for table in UNIT_TABLES if before[table] != after[table]} == {
        "ablations", "sae_injections", "sae_ablations",
    }  # fmt: skip
    assert rows("sae_injections")["prompt_id"].unique().sort().to_list() == ["paris", "rome"]
    assert counts()["saes"] == 7


@pytest.mark.parametrize("gone", ["saes", "prompts"])
def test_a_driver_that_died_between_two_tables_prepares_again(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, lambda unit: True)
    for file in Path("store").glob(f"{gone}/**/*.parquet"):
        file.unlink()
    result = run(*EVERYTHING, more="unit_ablations: 8")
    assert not result.failed, messages(result)
    run(*EVERYTHING, more="unit_ablations: 8", store="undisturbed")
    assert counts() == counts("undisturbed")
    assert units() == units("undisturbed")


def test_what_a_pattern_found_stays_although_there_are_more_now(monkeypatch: pytest.MonkeyPatch) -> None:
    run(QUALITY, INJECTION)
    add_saes(Path("cache"), "org/zoo", {"c": L1})
    assert not run(QUALITY, INJECTION).started
    result = run(QUALITY, INJECTION, prompts=(PARIS, ROME))
    assert not result.failed, messages(result)
    assert rows("sae_injections")["sae"].unique().sort().to_list() == ["org/saes:a", "org/saes:b"]
    # Another run sees them.
    other = replace(order(QUALITY, INJECTION), run="other")
    sweep(other, raymi.store.open("other"))
    assert rows("saes", "other")["sae"].n_unique() == 3


def test_a_repository_that_moved_on_is_read_at_the_commit_that_the_run_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_run = "{kind: sae, measure: quality, saes: 'org/saes@main:a', corpus: {file: c.jsonl, context: 8}}"
    run(interrupted_run, INJECTION)
    before = rows("sae_quality")["sae_version"].unique().to_list()
    repo = Path("cache/models--org--saes")
    moved = repo / "snapshots" / ("e" * 40)
    write_sae(moved / "a", L0, seed=9)
    write_sae(moved / "b", L1, seed=9)
    (repo / "refs" / "main").write_text("e" * 40)
    result = run(interrupted_run, INJECTION, prompts=(PARIS, ROME))
    assert not result.failed, messages(result)
    assert rows("sae_injections")["sae_version"].unique().to_list() == before


@pytest.mark.parametrize("when", ["same prompts", "more prompts"])
def test_a_folder_that_changed_is_refused_by_name(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = "{kind: sae, measure: injection, saes: ./mine, features: 1, strengths: [5, 50]}"
    write_sae(Path("mine"), L0)
    with monkeypatch.context() as patched:  # a run that is not done
        patched.setattr(Worker, "_measure", lambda self, unit: Failed(unit.unit_id, "RuntimeError", "for a test"))
        run(mine)
    write_sae(Path("mine"), L0, seed=3, d_sae=41)
    prompts = (PARIS, ROME) if when == "more prompts" else (PARIS,)
    result = run(mine, prompts=prompts)
    assert any("mine is not what it was when the run first saw it" in message for message in messages(result))
    assert "--new" in messages(result)[0]
    assert rows("sae_injections").is_empty()
    write_sae(Path("mine"), L0)
    assert not run(mine, prompts=prompts).failed
    assert rows("sae_injections").height == 2 * len(prompts)


def test_a_model_without_what_is_named_fails_by_name_and_the_others_run() -> None:
    add_model(Path("cache"), "org/other")
    named = "{kind: sae, measure: quality, saes: ['org/saes:a'], corpus: {file: c.jsonl, context: 8}}"
    result = run(named, models="'org/*'")
    [message] = messages(result)
    assert "was trained on tiny, not on org/other" in message
    assert rows("sae_quality")["model_id"].unique().to_list() == ["org/tiny"]
    [failure] = rows("failures").to_dicts()
    assert (failure["model_id"], failure["stage"], failure["unit_id"]) == ("org/other", "plan", None)


def test_a_pattern_that_means_other_models_leaves_the_rest_of_the_job() -> None:
    add_model(Path("cache"), "org/other")
    result = run(HEADS, QUALITY, models="'org/*'")
    assert not result.failed, messages(result)
    assert rows("ablations")["model_id"].unique().sort().to_list() == ["org/other", "org/tiny"]
    assert rows("sae_quality")["model_id"].unique().to_list() == ["org/tiny"]
    assert not run(HEADS, QUALITY, models="'org/*'").started


def test_a_corpus_that_is_too_long_for_a_model_fails_it_by_name() -> None:
    result = run("{kind: sae, measure: quality, corpus: {file: c.jsonl, context: 80}}")
    [message] = messages(result)
    assert "has 80 tokens, more than the model's context of 64" in message


def test_dry_run_says_what_is_left_and_writes_nothing() -> None:
    store = raymi.store.open("store")
    [(key, left, cost)] = list(rehearse(order(*EVERYTHING), store))
    assert key == "org/tiny"
    assert not isinstance(left, Failed)
    assert cost is not None
    # 2 layers; 30 chunks, 3 chunks and 2 features x 2 strengths by two autoencoders; one prompt by one.
    assert sum(unit.n_ablations for unit in left) == 2 + 30 * 2 + 3 * 2 + 4 * 2 + 1
    assert not Path("store").exists()
    run(HEADS, QUALITY, FEATURES, INJECTION, ABLATION)
    assert [left for _, left, _ in rehearse(order(*EVERYTHING), store)] == [[]]
    more = list(rehearse(order(*EVERYTHING, prompts=(PARIS, ROME)), store))
    assert [{unit.experiment for unit in left} for _, left, _ in more if not isinstance(left, Failed)] == [
        {"heads", "injection", "ablation"}
    ]


def test_by_full_forwards_the_same_rows() -> None:
    run(*EVERYTHING, store="fast")
    result = run(*EVERYTHING, more="engine: full")
    assert not result.failed, messages(result)
    assert counts() == counts("fast")
    assert units() == units("fast")
    fast, slow = (rows("sae_injections", store).sort("ablation_id") for store in ("fast", "store"))
    assert fast["ablation_id"].equals(slow["ablation_id"])
    assert (fast["engine"].unique().to_list(), slow["engine"].unique().to_list()) == (["cone"], ["full"])
    torch.testing.assert_close(fast["logit_shift"].to_torch(), slow["logit_shift"].to_torch(), rtol=1e-4, atol=1e-4)


# One worker.


def one_worker(**more: Any) -> Worker:
    job = load_job(Path("job.yaml"))
    cached = Cache(Path("cache")).find("org/tiny")
    return Worker(cached, job, cache_dir=Path("cache"), **more)


def test_an_autoencoder_is_opened_once_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    order(QUALITY, INJECTION)
    opened: list[tuple[str, Mapping[str, Any]]] = []
    load = raymi.sae.load

    def noting(where: str, **options: Any) -> Any:
        opened.append((where, options))
        return load(where, **options)

    monkeypatch.setattr(raymi.sae, "load", noting)
    one = one_worker()
    assert isinstance(one.load(), dict)
    for ref in [*one._saes["quality"], *one._saes["injection"]]:
        one._sae(ref)
    assert len(opened) == len({where for where, _ in opened}) == 2
    assert all((options["device"], options["dtype"]) == ("cpu", "float32") for _, options in opened)
    assert all("@" in where for where, _ in opened)


def test_a_unit_with_an_autoencoder_that_changed_is_not_measured() -> None:
    """Another node may have something else in that folder."""
    write_sae(Path("mine"), L0)
    order("{kind: sae, measure: injection, saes: ./mine, features: 1, strengths: 5}")
    one = one_worker()
    assert isinstance(one.load(), dict)
    [ref] = one._saes["injection"]
    with pytest.raises(UserError, match="mine is not what it was"):
        one._sae(replace(ref, version="another"))


def test_what_is_verified_is_of_every_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    order(*EVERYTHING)
    one = one_worker()
    tables = one.load()
    assert isinstance(tables, dict)
    assert tables["verifications"].num_rows >= 5
    monkeypatch.setattr(
        "raymi.experiments.sae.verify.verify",
        lambda engine, drawn, saes, **about: [
            {"passed": False, "max_logit_diff": 0.5, "tolerance": 1e-3} for _ in drawn
        ],
    )
    failed = one_worker().load()
    assert isinstance(failed, Failed)
    assert (failed.kind, "differ from full forwards, by up to 5.0e-01" in failed.message) == ("Mismatch", True)


def test_a_worker_that_knows_what_is_pinned_does_not_look_into_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    order(QUALITY, INJECTION)
    tables = one_worker().prepare()
    assert isinstance(tables, dict)
    pinned = tables["saes"].to_pylist()
    monkeypatch.setattr("raymi.experiments.autoencoders.resolve.scan", None)
    again = one_worker(pinned=pinned).prepare()
    assert isinstance(again, dict)
    assert again["saes"].to_pylist() == pinned
    assert len(again["saes"]) == 4

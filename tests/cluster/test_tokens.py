"""What a run has stored is what is measured: chat templates that ask for the time, on tiny models, in this process."""

import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain, count, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import polars as pl
import pytest
import torch

import raymi.store
from raymi.cli.main import main
from tests.fakes import TOKENIZER, TOKENIZER_CONFIG, WORDS, add_model

# "at 9" is shorter than "at 9 30": the length follows the clock, as the words do.
TEMPLATE = (
    "The {{ strftime_now('%A') }} {% if strftime_now('%M') != '00' %}was {{ strftime_now('%M') }} {% endif %}to "
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} it{% endif %}"
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MORNING = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)
LATER, NEXT_DAY = MORNING + timedelta(minutes=30), MORNING + timedelta(days=1)
PARIS = {"id": "paris", "text": "The capital of France is", "answer": " Paris", "subject": "France"}
ROME = {"id": "rome", "text": "The capital of Italy is", "answer": " Rome", "subject": "Italy"}
LIMA = {"id": "lima", "text": "The capital of Peru is", "answer": " Lima", "subject": "Peru"}
N = 2 * 4
"""Layers x heads: rows a prompt."""


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def set_clock(monkeypatch: pytest.MonkeyPatch, now: Callable[[], datetime]) -> None:
    """Has transformers give templates this time."""
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    def turn(to: datetime) -> None:
        set_clock(monkeypatch, lambda: to)

    turn(MORNING)
    return turn


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Said:
        fixed = ["raymi", "run", "job.json", "--inline", "--store", "store", "--cache-dir", "cache"]
        monkeypatch.setattr(sys, "argv", [*fixed, *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        return Said(int(exit.value.code or 0), *capfd.readouterr())

    return run


def add(id: str = "org/clock", template: str = TEMPLATE) -> Path:
    """A model whose words are those of the fakes, then days, minutes and more."""
    words = [*WORDS[:20], *DAYS, "30", *WORDS[20:24]]
    model = {**TOKENIZER["model"], "vocab": {word: index for index, word in enumerate(words)}}
    tokenizer = TOKENIZER | {"model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": TOKENIZER_CONFIG | {"chat_template": template}}
    return add_model(Path("cache"), id, scale=0.5, files=files)


def write(*prompts: dict[str, str], keys: object = "first", **fields: Any) -> None:
    experiment = {"kind": "knockout", "name": "heads", "layers": {"each": "all"}, "heads": {"each": "all"}}
    job = {
        "name": "clock",
        "models": "org/*",
        "prompts": list(prompts),
        "chat_template": True,
        "experiments": [experiment | {"queries": "last", "keys": keys}],
        "verify": 1,
        **fields,
    }
    Path("job.json").write_text(json.dumps(job))


def rows(table: str = "ablations") -> pl.DataFrame:
    return raymi.store.open("store").scan(table).collect()


def check(*prompt_ids: str) -> None:
    """Every cell once, of exactly the tokens that the store says, the query being the last of them."""
    found, prompts = rows(), {row["prompt_id"]: row for row in rows("prompts").to_dicts()}
    assert set(prompts) == set(prompt_ids)
    assert rows("prompts").height == len(prompts)
    assert found.height == N * len(prompt_ids)
    assert found.unique(["prompt_id", "layers", "heads"]).height == found.height
    for row in found.to_dicts():
        n = len(prompts[row["prompt_id"]]["token_ids"])
        assert (row["n_tokens"], row["queries"]) == (n, [n - 1])


def test_a_finished_run_stays_finished(run: Callable[..., Said], clock: Any) -> None:
    add()
    write(PARIS)
    assert run().code == 0
    clock(LATER)
    assert "nothing to do" in run().out
    check("paris")


@pytest.mark.parametrize("later", [LATER, NEXT_DAY], ids=["longer", "other words"])
def test_what_is_stored_is_measured_and_what_is_new_is_read_today(
    run: Callable[..., Said], clock: Any, later: datetime
) -> None:
    add()
    write(PARIS)
    assert run().code == 0
    before = rows().sort("ablation_id")
    clock(later)
    write(ROME, PARIS)
    assert run().code == 0
    check("paris", "rome")
    assert rows().filter(prompt_id="paris").sort("ablation_id").equals(before)
    tokens = {row["prompt_id"]: row["tokens"] for row in rows("prompts").to_dicts()}
    assert "Monday" in tokens["paris"]
    assert "was" not in tokens["paris"]
    assert ("was" in tokens["rome"]) == (later is LATER)
    clock(MORNING)
    assert "nothing to do" in run().out


@pytest.mark.parametrize("later", [LATER, NEXT_DAY], ids=["longer", "other words"])
def test_a_resumed_run_measures_what_it_began_with(
    run: Callable[..., Said], clock: Any, later: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raymi.cluster.worker import Worker

    add()
    write(PARIS, LIMA, unit_ablations=4)
    whole = Worker._measure
    done: list[str] = []

    def half(self: Worker, unit: Any) -> Any:
        if len(done) >= 2:
            raise RuntimeError("no more for now")
        done.append(unit.unit_id)
        return whole(self, unit)

    monkeypatch.setattr(Worker, "_measure", half)
    assert run().code == 1
    assert rows().height == 8
    first = rows().sort("ablation_id")
    monkeypatch.setattr(Worker, "_measure", whole)
    clock(later)
    assert run().code == 0
    check("paris", "lima")
    assert rows().filter(pl.col("unit_id").is_in(done)).sort("ablation_id").equals(first)
    # The same, in one go under the clock of the morning, in another store.
    clock(MORNING)
    resumed = rows().sort("ablation_id")
    assert run("--store", "other").code == 0
    straight = raymi.store.open("other").scan("ablations").collect().sort("ablation_id")
    same = ["unit_id", "ablation_id", "kl", "logit_diff", "queries", "n_tokens"]
    assert resumed.select(same).equals(straight.select(same))


def test_prompts_that_left_the_job_and_came_back_are_what_they_were(run: Callable[..., Said], clock: Any) -> None:
    add()
    write(PARIS, ROME)
    assert run().code == 0
    clock(LATER)
    write(LIMA)
    assert run().code == 0
    clock(NEXT_DAY)
    write(ROME, LIMA, PARIS)
    assert "nothing to do" in run().out
    check("paris", "rome", "lima")


def test_a_rehearsal_plans_what_is_stored(run: Callable[..., Said], clock: Any) -> None:
    add()
    write(PARIS)
    run()
    clock(LATER)
    said = run("--dry-run")
    assert said.code == 0
    assert said.out.splitlines()[1].split()[1:3] == ["0", "0"]


def test_the_time_may_go_on_while_a_prompt_is_read(run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the renderings of a prompt, which tell where its text stands."""
    ticks = chain([MORNING] * 2, repeat(LATER))  # a rendering asks twice, or three times where minutes are written
    set_clock(monkeypatch, lambda: next(ticks))
    add()
    write(PARIS, ROME, keys={"together": "subject"})
    said = run()
    assert said.code == 0, said.err
    for row in rows("prompts").to_dicts():
        [piece] = row["pieces"]
        assert [row["tokens"][at].strip() for at in piece["positions"]] == [row["subject"]]


def test_a_template_that_never_says_the_same_fails_the_model_by_name(
    run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = count()
    set_clock(monkeypatch, lambda: MORNING + timedelta(minutes=next(minutes)))
    add()
    write(PARIS)
    said = run()
    assert said.code == 1
    assert "org/clock: its chat template writes something else each time" in said.err


def without_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the store say of no prompt where its pieces stand, as one that was written for other pieces would."""
    from dataclasses import replace

    from raymi.cluster import sweep

    whole = sweep.stored

    def stored(store: Any, run: str) -> Any:
        found = whole(store, run)
        for known in found.values():
            known.prompts = {name: replace(each, pieces={}) for name, each in known.prompts.items()}
        return found

    monkeypatch.setattr(sweep, "stored", stored)


def test_new_pieces_are_found_in_the_stored_tokens(
    run: Callable[..., Said], clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add()
    write(PARIS, keys={"together": "subject"})
    assert run().code == 0
    with monkeypatch.context() as patch:
        without_pieces(patch)
        said = run()
    assert said.code == 0, said.err
    check("paris")


def test_new_pieces_of_a_prompt_that_is_read_otherwise_fail_the_model_by_name(
    run: Callable[..., Said], clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add()
    write(PARIS, keys={"together": "subject"})
    assert run().code == 0
    clock(LATER)
    with monkeypatch.context() as patch:
        without_pieces(patch)
        said = run()
    assert said.code == 1
    assert "org/clock: its tokenizer does not read 'paris' as it did" in said.err
    assert "hash" in said.err
    assert rows().height == N


def test_a_replica_that_holds_other_tokens_than_planned_measures_nothing(
    run: Callable[..., Said], clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However that may come about: here the worker forgets what it was told and reads anew."""
    from raymi.cluster.worker import Worker

    add()
    write(PARIS)
    load = Worker.load

    def forgetful(self: Worker) -> Any:
        clock(NEXT_DAY)
        self.known = ()
        self.prepare()
        return load(self)

    monkeypatch.setattr(Worker, "load", forgetful)
    said = run()
    assert said.code == 1
    assert "its tokenizer does not read 'paris'" in said.err
    assert rows().is_empty()


def test_a_second_replica_measures_what_the_first_has_read(tmp_path: Path, clock: Any, monkeypatch: Any) -> None:
    from raymi.catalog import find
    from raymi.cluster.agenda import Agenda
    from raymi.cluster.frozen import Cache
    from raymi.cluster.sweep import worker
    from raymi.cluster.worker import Done
    from raymi.job import load_job
    from raymi.store.manifest import Driver, Manifest

    monkeypatch.chdir(tmp_path)
    add()
    write(PARIS, ROME, unit_ablations=4)
    job, model = load_job(Path("job.json")), find("org/clock", Path("cache"))
    manifest = Manifest(run="r", epoch=1, driver=Driver(heartbeat=1), generations=[["paris", "rome"]])
    agenda = Agenda(manifest, (), {}, job, (), {"org/clock": model})
    make = lambda: worker(job, agenda, Cache(Path("cache")), model)(1)  # noqa: E731
    first = make()
    tables = first.prepare()
    assert isinstance(tables, dict)
    units = agenda.plan("org/clock", tables)
    assert isinstance(units, list)
    clock(LATER)
    second = make()
    results = []
    for each in (first, second):
        assert isinstance(each.load(), dict)
        done = list(each.run(units))
        assert all(isinstance(item, Done) for item in done), done
        results.append([item.tables["ablations"].to_pylist() for item in done if isinstance(item, Done)])
    assert results[0] == results[1]


def test_the_tokenizer_of_a_snapshot_may_change_under_a_run(run: Callable[..., Said], clock: Any) -> None:
    folder = add()
    write(PARIS)
    run()
    (folder / "tokenizer_config.json").unlink()
    config = TOKENIZER_CONFIG | {"chat_template": TEMPLATE.replace(" it", " it was")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write(PARIS, ROME)
    assert run().code == 0
    check("paris", "rome")
    lengths = dict(rows("prompts").select("prompt_id", pl.col("token_ids").list.len()).iter_rows())
    assert lengths["rome"] == lengths["paris"] + 1


def test_chunks_of_a_corpus_are_what_they_were(run: Callable[..., Said], clock: Any) -> None:
    """A tokenizer that cuts a text otherwise: the chunks of the store are gone on with."""
    from tests.fakes import write_sae

    folder = add()
    Path("texts.txt").write_text("The capital of France is Paris and the capital of Spain is Madrid in it")
    write_sae(Path("saes"), "blocks.1.hook_resid_pre", model="org/clock")
    experiment = {
        "kind": "sae",
        "name": "quality",
        "measure": "quality",
        "saes": "saes",
        "corpus": {"file": "texts.txt", "context": 4},
    }
    write(experiments=[experiment], prompts=[], chat_template=False, unit_ablations=1)
    said = run()
    assert said.code == 0, said.err
    before, units = rows("prompts"), set(rows("sae_quality")["unit_id"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"capital": tokenizer["model"]["vocab"]["the"], "the": 4}
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = run()
    assert said.code == 0, said.err
    assert "nothing to do" in said.out
    assert rows("prompts").equals(before)
    assert set(rows("sae_quality")["unit_id"]) == units

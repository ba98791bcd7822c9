"""The scheduler on a real Ray, with workers that need no model: what is lost comes back, and nothing stays behind."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from raymi.cluster.messages import Note, Rows
from raymi.cluster.scheduler import Scheduler
from raymi.job import make_job
from tests.cluster.fake_worker import FakeWorker, model
from tests.cluster.simulation import Result, unit

JOB = make_job({"name": "x", "prompts": [{"text": "a"}], "experiments": [{"kind": "knockout", "layers": 0}]})
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def nodes():
    from raymi.cluster.session import session

    with session():
        from raymi.cluster.inventory import survey

        [node] = survey()
        node.cpus = 2
        yield [node]


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr("raymi.cluster.scheduler.BACKOFF", (0.1, 0.1))


def backend_of(nodes, models, folder):
    from raymi.cluster.inventory import key_of
    from raymi.cluster.ray_backend import RayBackend

    nodes[0].models = {key_of(each): each for each in models.values()}
    assert not nodes[0].taken, "an earlier test left a replica behind"
    return RayBackend(nodes, JOB, models, lambda each: partial(FakeWorker, each, folder))


def run(
    nodes, folder: Path, work, known=True, each=lambda scheduler, outcomes: None, models=None, seconds=120
) -> Result:
    """Drives `work`, names of units by id of their model, to its end."""
    models = models or {id: model(id) for id in work}
    backend = backend_of(nodes, models, folder)
    units = {id: [unit(name) for name in names] for id, names in work.items()}
    guesses = {id: float(len(names)) for id, names in work.items()}
    scheduler = Scheduler(backend, time.monotonic, lambda id, _: units[id], guesses, units if known else None)
    began = time.monotonic()
    outcomes = []
    try:
        new = scheduler.step([])
        while not scheduler.finished:
            outcomes += new
            each(scheduler, outcomes)
            assert time.monotonic() - began < seconds, scheduler.status()
            new = scheduler.step(backend.poll(0.5))
    finally:
        scheduler.close()
    assert not nodes[0].taken
    return Result(outcomes + new, time.monotonic() - began)


def names(prefix, n, word=""):
    return [f"{prefix}{word}/{i:03}" for i in range(n)]


def test_rows_of_several_models_arrive_once(nodes, tmp_path):
    work = {"a": names("a", 50), "b": names("b", 3), "unreadable": names("u", 2)}
    result = run(nodes, tmp_path, work, known=False)
    assert sorted(result.done()) == sorted(work["a"] + work["b"])
    assert result.failed_models() == {"unreadable": "no tokenizer"}
    tables = [o.tables["ablations"] for o in result.outcomes if isinstance(o, Rows) and o.unit]
    assert {t["unit_id"][0].as_py() for t in tables} == set(result.done())


def test_a_replica_has_a_process_of_its_own_with_threads_of_its_own(nodes, tmp_path):
    result = run(nodes, tmp_path, {"a": names("a", 1), "b": names("b", 1)})
    rows = [o.tables["models"].to_pylist()[0] for o in result.outcomes if isinstance(o, Rows) and not o.unit]
    assert len({row["replica"] for row in rows} | {str(os.getpid())}) == 3
    assert {row["device"] for row in rows} == {"1"}  # two models share two cores


def test_what_goes_wrong_in_one_model_stays_there(nodes, tmp_path):
    work = {
        "fine": names("f", 20),
        "broken": names("b", 5),
        "deadly": names("d", 5),
        "partly": [*names("p", 5), "dies", "raises", "dies once", "raises once"],
    }
    result = run(nodes, tmp_path, work)
    assert set(result.failed_models()) == {"broken", "deadly"}
    assert "truncated file" in result.failed_models()["broken"]
    assert result.failed_units() == {"dies": "replica lost (process)", "raises": "ValueError"}
    assert sorted(result.done()) == sorted([*names("f", 20), *names("p", 5), "dies once", "raises once"])


def test_a_bug_in_the_replica_costs_a_replica_and_not_the_run(nodes, tmp_path):
    result = run(nodes, tmp_path, {"a": [*names("a", 5), "bug once"]})
    assert len(result.done()) == 6
    assert any("a bug of raymi's own" in note.detail for note in result.notes("lost"))


def test_a_killed_process_is_noticed_at_once_and_its_units_are_done_elsewhere(nodes, tmp_path):
    killed = []

    def kill_after_three(scheduler, outcomes):
        loads = [o for o in outcomes if isinstance(o, Rows) and not o.unit]
        if not killed and loads and len(outcomes) > 6:
            pid = int(loads[0].tables["models"]["replica"][0].as_py())
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    work = {"a": names("a", 20, " slow")}
    result = run(nodes, tmp_path, work, each=kill_after_three)
    assert killed
    assert sorted(result.done()) == sorted(work["a"])
    assert len(result.notes("lost")) == 1
    assert not psutil.pid_exists(killed[0]) or psutil.Process(killed[0]).status() == psutil.STATUS_ZOMBIE


def test_stop_lets_units_in_hand_end_and_delivers_them(nodes, tmp_path):
    stopped = []

    def stop(scheduler, outcomes):
        if not stopped and any(isinstance(o, Rows) and o.unit for o in outcomes):
            stopped.append((time.monotonic(), len([o for o in outcomes if isinstance(o, Rows) and o.unit])))
            scheduler.stop()

    result = run(nodes, tmp_path, {"a": names("a", 100, " slow")}, each=stop)
    assert time.monotonic() - stopped[0][0] < 5
    assert stopped[0][1] <= len(result.done()) < 20
    assert not result.troubles()
    assert not [o for o in result.outcomes if isinstance(o, Note) and o.what == "lost"]


def test_a_model_larger_than_the_machine_fails_by_name(nodes, tmp_path):
    models = {"a": model("a"), "huge": model("huge", parameters=10**13)}
    result = run(nodes, tmp_path, {"a": ["one"], "huge": ["two"]}, models=models)
    assert result.done() == ["one"]
    assert "40000.0 GB" in result.failed_models()["huge"]


def test_a_replica_that_ray_keeps_pending_is_given_up(nodes, tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr("raymi.cluster.ray_backend.READY_SECONDS", 1.0)
    somebody = ray.remote(FakeWorker).options(num_cpus=2).remote(model("b"), tmp_path)
    ray.get(somebody.drain.remote())
    result = run(nodes, tmp_path, {"a": ["one"]})
    ray.kill(somebody)
    assert "did not start within" in result.failed_models()["a"]


def test_a_replica_that_cannot_be_made_says_why(nodes, tmp_path):
    class Unmakeable(FakeWorker):
        def __init__(self, *_):
            raise ImportError("no module named nothing")

    models = {"a": model("a")}
    backend = backend_of(nodes, models, tmp_path)
    backend._make = lambda each: partial(Unmakeable, each, tmp_path)
    scheduler = Scheduler(backend, time.monotonic, lambda id, _: [], {"a": 1.0})
    outcomes = scheduler.step([])
    while not scheduler.finished:
        outcomes += scheduler.step(backend.poll(0.5))
    assert "ImportError: no module named nothing" in Result(outcomes, 0).failed_models()["a"]

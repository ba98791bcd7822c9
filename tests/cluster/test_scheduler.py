"""What the scheduler promises, shown on simulated replicas and a simulated clock."""

import itertools
import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymi.cluster.messages import Note, Rows, Trouble
from raymi.cluster.scheduler import CHUNK_SECONDS, LEASES, STRIKES, Scheduler
from raymi.cluster.worker import Failed
from tests.cluster.simulation import Behaviour, SimulatedBackend, rng_behaviour, simulate, unit, units


def scheduler_of(backend, work, known=True, plan=None):
    """A scheduler of `work`: units by model, known from the start or only once a replica has tokenised."""
    guesses = {model: float(sum(u.flops for u in its)) for model, its in work.items()}
    return Scheduler(backend, backend.clock, plan or (lambda model, _: work[model]), guesses, work if known else None)


def run(work, backend=None, known=True, plan=None):
    backend = backend or SimulatedBackend()
    return simulate(scheduler_of(backend, work, known, plan), backend)


@pytest.mark.parametrize("known", [True, False])
def test_every_unit_of_every_model_is_delivered_once(known):
    work = {m: units(m, n) for m, n in {"a": 40, "b": 3, "c": 1}.items()}
    result = run(work, known=known)
    assert sorted(result.done()) == sorted(u.unit_id for its in work.values() for u in its)
    assert {n.model for n in result.notes("done")} == {"a", "b", "c"}
    assert not result.troubles()


def test_nothing_to_do_starts_nothing():
    backend = SimulatedBackend()
    scheduler = scheduler_of(backend, {"a": []})
    assert scheduler.finished
    assert backend.history == []


def test_a_model_whose_units_are_all_done_is_not_loaded_after_tokenising():
    backend = SimulatedBackend()
    run({"a": []}, backend, known=False)
    assert [h[0] for h in backend.history] == ["start", "stop"]


def test_the_longest_model_starts_first_and_shorter_ones_fill_the_room():
    backend = SimulatedBackend(cores=2)
    run({"short": units("short", 2), "long": units("long", 90), "middle": units("middle", 20)}, backend)
    starts = [h[1] for h in backend.history if h[0] == "start"]
    assert starts[:2] == ["long", "middle"]
    assert "short" in starts[2:]


def test_at_most_two_leases_in_flight_and_the_second_waits_before_the_first_ends():
    backend = SimulatedBackend(cores=1)
    run({"a": units("a", 100)}, backend)
    assert backend.most_leases == LEASES == 2


def test_chunks_follow_the_clock_and_shrink_at_the_end():
    backend = SimulatedBackend(cores=1, behaviour=Behaviour(seconds=0.5))
    run({"a": units("a", 400)}, backend)
    sizes = [len(h[3]) for h in backend.history if h[0] == "run"]
    assert sizes[:2] == [1, 1]  # nothing timed yet
    assert max(sizes) == CHUNK_SECONDS / 0.5
    assert sizes[-1] <= 3
    assert sorted(sizes[5:], reverse=True) == sizes[5:]


def test_a_unit_longer_than_a_chunk_is_leased_alone():
    backend = SimulatedBackend(cores=1, behaviour=Behaviour(seconds=100))
    run({"a": units("a", 5)}, backend)
    assert {len(h[3]) for h in backend.history if h[0] == "run"} == {1}


def test_chunks_count_work_and_not_units():
    backend = SimulatedBackend(cores=1)
    work = [unit(f"{i}", flops=8 if i % 2 else 1) for i in range(60)]
    run({"a": work}, backend)
    cost = {u.unit_id: u.flops for u in work}
    chunks = [sum(cost[name] for name in h[3]) for h in backend.history if h[0] == "run"]
    assert max(chunks) < CHUNK_SECONDS + 8


def test_a_second_replica_only_when_the_work_outweighs_a_load():
    for n, seconds, expected in [(100, 1.0, 4), (12, 1.0, 1), (100, 0.05, 1)]:
        backend = SimulatedBackend(cores=4, behaviour=Behaviour(seconds=seconds))
        run({"a": units("a", n)}, backend)
        assert Counter(h[0] for h in backend.history)["start"] == expected, (n, seconds)


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_a_second_replica_that_does_not_load_is_not_tried_again(how):
    loading = lambda replica, model: "loads" if replica == 0 else how  # noqa: E731
    backend = SimulatedBackend(cores=2, behaviour=Behaviour(loading=loading))
    result = run({"a": units("a", 300)}, backend)
    assert [h[0] for h in backend.history].count("start") == 2
    assert len(result.done()) == 300
    assert not result.failed_models()


def test_no_second_replica_while_another_model_waits_for_its_first():
    # "big" needs both cores, and one of them is taken for a while: the other must not go to a second replica.
    class OneBig(SimulatedBackend):
        def start(self, replica, model, *, share, roomy):
            self.per_replica = 2 if model == "big" else 1
            return super().start(replica, model, share=share, roomy=roomy)

    backend = OneBig(cores=2)
    run({"long": units("long", 300), "big": units("big", 50)}, backend)
    assert [h[1] for h in backend.history if h[0] == "start"][:2] == ["long", "big"]


def test_room_goes_to_a_waiting_model_rather_than_to_the_tail_of_a_running_one():
    backend = SimulatedBackend(cores=3)

    def fate(replica, unit):  # the node of b dies, and only two cores are left
        if unit.unit_id == "b/0002" and backend.cores == 3:
            backend.cores = 2
            return "node dies"
        return "done"

    backend.behaviour = Behaviour(seconds=20, fate=fate)
    result = run({"a": units("a", 41), "b": units("b", 40)}, backend)
    assert Counter(h[1] for h in backend.history if h[0] == "start")["a"] >= 2
    leased = Counter(name for h in backend.history if h[0] == "run" for name in h[3])
    assert max(count for name, count in leased.items() if name.startswith("a")) == 1
    assert len(result.done()) == 81


def test_units_that_do_harm_come_last():
    poison = {f"a/{i:04}" for i in range(5)}
    fate = lambda r, u: "dies" if u.unit_id in poison else "done"  # noqa: E731
    result = run({"a": units("a", 25)}, SimulatedBackend(cores=1, behaviour=Behaviour(fate=fate)))
    assert len(result.done()) == 20
    assert set(result.failed_units()) == poison


def test_a_lost_replica_loses_no_unit_and_back_off_comes_first():
    died = []

    def fate(replica, unit):
        if unit.unit_id == "a/0007" and not died:
            died.append(replica)
            return "dies"
        return "done"

    backend = SimulatedBackend(cores=1, behaviour=Behaviour(fate=fate))
    scheduler = scheduler_of(backend, {"a": units("a", 30)})
    alone = []
    result = simulate(scheduler, backend, each=lambda: alone.append(not backend.alive and not scheduler.finished))
    assert sorted(result.done()) == [u.unit_id for u in units("a", 30)]
    assert any(alone), "the next replica must wait"
    [trouble] = result.troubles()
    assert (trouble.unit_id, trouble.final) == ("a/0007", False)
    assert [n.detail for n in result.notes("lost")] == ["process: killed"]


def test_a_unit_that_takes_two_replicas_with_it_is_set_aside():
    backend = SimulatedBackend(
        cores=1, behaviour=Behaviour(fate=lambda r, u: "dies" if u.unit_id == "a/0003" else "done")
    )
    result = run({"a": units("a", 20), "b": units("b", 5)}, backend)
    assert result.failed_units() == {"a/0003": "replica lost (process)"}
    assert len(result.done()) == 24
    assert len(result.notes("lost")) == 2
    assert result.done().index("a/0019") < 24


def test_the_loss_of_a_node_is_not_held_against_the_unit():
    deaths = itertools.count()

    def fate(replica, unit):
        return "node dies" if unit.unit_id == "a/0003" and next(deaths) < 3 else "done"

    result = run({"a": units("a", 20)}, SimulatedBackend(cores=1, behaviour=Behaviour(fate=fate)))
    assert len(result.done()) == 20
    assert not result.failed_units()


def test_a_model_that_kills_every_replica_is_given_up_and_the_others_run():
    fate = lambda r, u: "dies" if u.unit_id.startswith("bad") else "done"  # noqa: E731
    result = run({"bad": units("bad", 50), "good": units("good", 50)}, SimulatedBackend(behaviour=Behaviour(fate=fate)))
    assert list(result.failed_models()) == ["bad"]
    assert "killed" in result.failed_models()["bad"]
    assert len(result.done()) == 50
    assert len(result.notes("lost")) <= STRIKES


@pytest.mark.parametrize(
    ("how", "starts"), [("raises", 1), ("oom", 2), ("dies", 2), ("node dies", STRIKES)], ids=lambda value: str(value)
)
def test_a_model_that_does_not_load_fails_alone(how, starts):
    loading = lambda replica, model: how if model == "bad" else "loads"  # noqa: E731
    backend = SimulatedBackend(behaviour=Behaviour(loading=loading))
    result = run({"bad": units("bad", 9), "good": units("good", 9)}, backend)
    assert list(result.failed_models()) == ["bad"]
    assert [h[1] for h in backend.history if h[0] == "start"].count("bad") == starts
    assert sorted(result.done()) == [u.unit_id for u in units("good", 9)]


def test_out_of_memory_asks_for_a_larger_slot_once():
    loading = lambda replica, model: "oom" if not backend.history[-1][2] else "loads"  # noqa: E731
    backend = SimulatedBackend(behaviour=Behaviour(loading=loading))
    result = run({"a": units("a", 3)}, backend)
    assert [h for h in backend.history if h[0] == "start"] == [("start", "a", False), ("start", "a", True)]
    assert len(result.done()) == 3


def test_a_unit_out_of_memory_moves_the_model_to_a_larger_slot():
    backend = SimulatedBackend(cores=1)
    small = lambda: [h for h in backend.history if h[0] == "start"][-1][2] is False  # noqa: E731
    backend.behaviour.fate = lambda r, u: "oom" if small() and u.unit_id == "a/0002" else "done"
    result = run({"a": units("a", 9)}, backend)
    assert len(result.done()) == 9
    assert [t.final for t in result.troubles()] == [False]


def test_a_unit_that_raises_is_recorded_and_tried_once_more():
    seen = Counter()

    def fate(replica, unit):
        seen[unit.unit_id] += 1
        return (
            "raises" if unit.unit_id == "a/0001" or (unit.unit_id == "a/0002" and seen[unit.unit_id] == 1) else "done"
        )

    result = run({"a": units("a", 10)}, SimulatedBackend(behaviour=Behaviour(fate=fate)))
    assert seen["a/0001"] == seen["a/0002"] == 2
    assert result.failed_units() == {"a/0001": "ValueError"}
    assert [(t.unit_id, t.final) for t in result.troubles()] == [
        ("a/0001", False),
        ("a/0002", False),
        ("a/0001", True),
    ]
    assert len(result.done()) == 9


def test_an_impossible_model_fails_by_name():
    result = run({"huge": units("huge", 3), "a": units("a", 3)}, SimulatedBackend(impossible=frozenset({"huge"})))
    assert result.failed_models() == {"huge": "needs a bigger machine"}
    assert len(result.done()) == 3


def test_a_model_that_cannot_be_planned_fails_by_name():
    work = {"a": units("a", 3), "b": units("b", 3)}
    refuse = lambda model, _: Failed(None, "UserError", "layer 40 of 12") if model == "b" else work[model]  # noqa: E731
    result = run(work, known=False, plan=refuse)
    assert result.failed_models() == {"b": "layer 40 of 12"}
    assert len(result.done()) == 3


def test_an_idle_replica_runs_the_tail_of_a_stuck_one_and_the_first_delivery_wins():
    first_slow = {}

    def fate(replica, unit):
        first_slow.setdefault("replica", replica)
        return "done"

    backend = SimulatedBackend(cores=2, behaviour=Behaviour(fate=fate))
    # The first replica freezes after it has taken a chunk of a few units.
    later = backend._later

    def freeze(seconds, event, then=lambda: None):
        slow = first_slow.get("replica") == event.replica and backend.now > 20
        later(seconds + (1e5 if slow else 0), event, then)

    backend._later = freeze
    result = run({"a": units("a", 60)}, backend)
    assert sorted(result.done()) == [u.unit_id for u in units("a", 60)]
    assert result.seconds < 200
    leased = Counter(name for h in backend.history if h[0] == "run" for name in h[3])
    assert max(leased.values()) == 2


def test_a_late_duplicate_is_dropped():
    backend = SimulatedBackend(cores=2)
    result = run({"a": units("a", 61)}, backend)
    leased = Counter(name for h in backend.history if h[0] == "run" for name in h[3])
    assert max(leased.values()) == 2, "the tail was leased twice"
    assert len(result.done()) == len(set(result.done())) == 61


def test_stop_ends_after_the_units_in_hand():
    backend = SimulatedBackend(cores=2)
    scheduler = scheduler_of(backend, {"a": units("a", 500), "b": units("b", 500)})
    outcomes = scheduler.step([])
    while backend.now < 60:
        outcomes += scheduler.step(backend.poll(0.5))
    before = sum(isinstance(o, Rows) for o in outcomes)
    leases = sum(h[0] == "run" for h in backend.history)
    scheduler.stop()
    stopped_at = backend.now
    while not scheduler.finished:
        outcomes += scheduler.step(backend.poll(0.5))
    assert backend.now - stopped_at < 3
    assert sum(isinstance(o, Rows) for o in outcomes) <= before + 2
    assert sum(h[0] == "run" for h in backend.history) == leases
    assert not backend.alive
    assert not [o for o in outcomes if isinstance(o, Trouble)]


def test_stop_while_loading_leaves_nothing_behind():
    backend = SimulatedBackend()
    scheduler = scheduler_of(backend, {"a": units("a", 5)}, known=False)
    scheduler.step([])
    scheduler.stop()
    assert scheduler.finished
    assert not backend.alive


def test_status_counts_what_happened():
    backend = SimulatedBackend(
        cores=1, behaviour=Behaviour(fate=lambda r, u: "raises" if u.unit_id == "a/0000" else "done")
    )
    scheduler = scheduler_of(backend, {"a": units("a", 10), "b": units("b", 1)})
    assert scheduler.status()["a"].phase == "waiting"
    assert scheduler.status()["a"].seconds_left is None
    simulate(scheduler, backend)
    status = scheduler.status()["a"]
    assert (status.phase, status.units, status.done, status.failed) == ("done", 10, 9, 1)
    assert (status.ablations, status.ablations_done, status.replicas) == (10, 9, 0)


def check_books(scheduler):
    """No unit waits while someone holds it, none waits twice, and the sums are the sums."""
    for model in scheduler._models.values():
        waiting = list(model.waiting)
        assert len({id(work) for work in waiting}) == len(waiting)
        assert not [work for work in waiting if work.holders or work.final]
        assert model.waiting_cost == sum(work.cost for work in waiting)
        assert model.cost_left == sum(work.cost for work in (model.work or {}).values() if not work.final)
        assert model.open == sum(not work.final for work in (model.work or {}).values())
        for replica in model.replicas.values():
            for lease in replica.leases.values():
                assert all(lease.id in work.holders for work in lease.pending.values())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), chaos=st.sampled_from([0.0, 0.02, 0.2, 0.9]))
def test_whatever_fails_every_unit_ends_done_once_or_failed_with_a_reason(seed, chaos):
    rng = random.Random(seed)
    n_models, most = rng.choice([(1, 200), (6, 40), (40, 8)])
    work = {f"m{m}": units(f"m{m}", rng.randrange(most), rng.choice([1, 3])) for m in range(n_models)}
    backend = SimulatedBackend(cores=rng.choice([1, 3, 50]), behaviour=rng_behaviour(rng, chaos))
    scheduler = scheduler_of(backend, work, known=rng.random() < 0.5)
    result = simulate(scheduler, backend, each=lambda: rng.random() < 0.02 and check_books(scheduler))
    done, failed, dead = result.done(), result.failed_units(), result.failed_models()
    assert len(done) == len(set(done))
    assert not set(done) & set(failed)
    for model, its in work.items():
        missing = {u.unit_id for u in its} - set(done) - set(failed)
        assert not missing or model in dead
    assert not backend.alive
    assert backend.most_leases <= LEASES
    if chaos == 0.0:
        leased = Counter(name for h in backend.history if h[0] == "run" for name in h[3])
        assert max(leased.values(), default=0) <= 2
        assert not failed
        assert not dead


def test_a_thousand_replicas_cost_milliseconds_each():
    backend = SimulatedBackend(cores=1000, behaviour=rng_behaviour(random.Random(7), chaos=0.01))
    backend.behaviour.seconds = 4.0
    work = {f"m{m}": units(f"m{m}", 500) for m in range(20)}
    began = time.perf_counter()
    result = run(work, backend)
    seconds = time.perf_counter() - began
    starts = sum(isinstance(o, Note) and o.what == "start" for o in result.outcomes)
    lost = set(result.failed_models())
    assert starts > 300
    assert len(result.done()) + len(result.failed_units()) >= 500 * (20 - len(lost))
    assert seconds < 0.005 * (starts + 10_000)

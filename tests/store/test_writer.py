import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raymi.store
from raymi.errors import UserError
from raymi.store import compaction, layout, ownership, schemas, writer
from raymi.store.objects import RemoteObjects
from raymi.store.ownership import RunLost
from raymi.store.reader import Store
from raymi.store.writer import Run
from tests.rows import MODEL, MOMENT, add_units, cell, failure, take, units

RUN = "heads-1a2b3c4d"


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return raymi.store.open(str(tmp_path)) if request.param == "folder" else Store(RemoteObjects(f"file://{tmp_path}"))


def files(root: Path, table: str = "ablations") -> list[Path]:
    return sorted(root.glob(f"{table}/**/*.parquet"))


def plain_keys(root: Path) -> list[str]:
    """Ablation ids as somebody sees them who has Polars and nothing else."""
    return (
        pl.scan_parquet(f"{root}/ablations/**/*.parquet")
        .select("ablation_id")
        .collect()["ablation_id"]
        .sort()
        .to_list()
    )


def read_keys(store: Store) -> list[str]:
    return store.scan("ablations", RUN).select("ablation_id").collect()["ablation_id"].sort().to_list()


def keys(*names: str) -> list[str]:
    return sorted(f"{name}.{layer}.0" for name in names for layer in range(3))


def overdue(store: Store) -> Run:
    """A run whose driver, this process, will not give another sign of life, and has given none for long."""
    run = take(store, heartbeat=0.01)
    run._heart.stop()
    return run


def takeover(store: Store, **more: Any) -> Run:
    time.sleep(0.1)
    return take(store, **more)


# Rows


def test_what_is_added_is_there_after_a_flush_in_one_file_a_model(store: Store, tmp_path: Path) -> None:
    with take(store) as run:
        add_units(run, "u1", "u2")
        add_units(run, "v1", model="org/other")
        assert files(tmp_path) == []
        assert run.done_units() == set()
        run.flush()
        assert [path.parent.name for path in files(tmp_path)] == ["model=org--other", "model=org--tiny"]
        assert plain_keys(tmp_path) == read_keys(store) == keys("u1", "u2", "v1")
        assert run.done_units() == {"u1", "u2", "v1"}


def test_files_say_their_schema_and_keep_it_exactly(store: Store, tmp_path: Path) -> None:
    with take(store) as run:
        add_units(run, "u1")
        run.flush()
        (file,) = files(tmp_path)
        written = pq.read_table(file, partitioning=None)
        assert written.schema.metadata[b"raymi.schema_version"] == str(schemas.SCHEMA_VERSION).encode()
        assert written.equals(units(["u1"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.drop_columns(["kl"]), "lack the column kl"),
        (lambda data: data.set_column(13, "kl", pa.array([1] * 3)), "kl is int64, not double"),
        (lambda data: data.append_column("mine", pa.array([1] * 3)), "mine"),
        (lambda data: data.select(sorted(data.schema.names)), "columns"),
    ],
    ids=["missing", "type", "extra", "order"],
)
def test_rows_of_another_schema_are_refused(store: Store, change: Any, said: str) -> None:
    data = units(["u1"])
    position = data.schema.get_field_index("kl")
    changed = data.set_column(position, "kl", pa.array([1] * 3)) if said.startswith("kl") else change(data)
    with take(store) as run, pytest.raises(ValueError, match=said):
        run.add("ablations", "m", changed)


def test_the_first_rows_of_a_unit_win(store: Store) -> None:
    with take(store) as run:
        add_units(run, "u1")
        add_units(run, "u1")
        run.flush()
        run.add("ablations", layout.slug(MODEL), units(["u1", "u2"]))
        run.flush()
        assert read_keys(store) == keys("u1", "u2")


def test_prompts_and_tokens_stand_once_also_after_a_restart(store: Store) -> None:
    def prompts(*ids: str) -> pa.Table:
        return schemas.rows("prompts", [{"model_id": MODEL, "revision": "r", "prompt_id": name} for name in ids])

    with take(store) as run:
        run.add("prompts", "m", prompts("a", "b", "a"))
        run.add("prompts", "m", prompts("b", "c"))
    with take(store) as run:
        run.add("prompts", "m", prompts("d", "c"))
        run.flush()
        assert store.scan("prompts").collect()["prompt_id"].sort().to_list() == ["a", "b", "c", "d"]


def features(*units: str) -> pa.Table:
    return schemas.rows("sae_features", [{"unit_id": unit, "position": at} for unit in units for at in range(3)])


def test_units_of_every_kind_are_done_when_they_are_in_the_store_and_the_first_rows_win(store: Store) -> None:
    with take(store) as run:
        add_units(run, "u1")
        run.add("sae_features", layout.slug(MODEL), features("u2", "u3"))
        run.add("sae_features", layout.slug(MODEL), features("u3", "u4"))
        assert run.done_units() == set()
        run.flush()
        assert run.done_units() == {"u1", "u2", "u3", "u4"}
        run.add("sae_features", layout.slug(MODEL), features("u2"))
        for table in schemas.UNIT_TABLES[2:]:
            run.add(table, layout.slug(MODEL), schemas.rows(table, [{"unit_id": table}]))
    assert take(store).done_units() == {"u1", "u2", "u3", "u4", *schemas.UNIT_TABLES[2:]}
    rows = store.scan("sae_features", RUN).collect()
    assert sorted(rows["unit_id"]) == sorted(["u2", "u3", "u4"] * 3)


def test_what_an_experiment_found_stands_once_also_when_it_found_nothing(store: Store) -> None:
    about = {"model_id": MODEL, "revision": "r", "experiment": "quality"}
    nothing = {**about, "experiment": "injection", "note": "none fits"}
    sae = {**about, "sae": "org/s:a", "site": "hook_embed", "version": "1"}
    for _ in range(2):
        with take(store) as run:
            run.add("saes", layout.slug(MODEL), schemas.rows("saes", [sae, nothing]))
            run.add("saes", layout.slug(MODEL), schemas.rows("saes", [{**sae, "version": "2"}, nothing]))
    rows = store.scan("saes", RUN).sort("experiment").collect()
    assert rows.select("experiment", "version").rows() == [("injection", None), ("quality", "1")]


@pytest.mark.parametrize("limit", ["MAX_ROWS", "MAX_BYTES", "MAX_SECONDS"])
def test_buffers_are_committed_when_they_are_large_or_old(
    store: Store, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    with take(store) as run:
        add_units(run, "u1")
        run.maybe_flush()
        assert run.done_units() == set()
        monkeypatch.setattr(writer, limit, 0 if limit == "MAX_SECONDS" else 3)
        run.maybe_flush()
        assert run.done_units() == {"u1"}


def test_a_full_disk_loses_nothing_that_is_still_buffered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with take(store) as run:
        add_units(run, "u1")
        with monkeypatch.context() as patch:
            patch.setattr(store.objects, "put", lambda *_: (_ for _ in ()).throw(UserError("no space left")))
            with pytest.raises(UserError, match="no space"):
                run.flush()
        assert run.done_units() == set()
        run.flush()
        assert run.done_units() == {"u1"}


def test_an_unfinished_write_is_swept_by_the_next_driver(tmp_path: Path) -> None:
    store = raymi.store.open(str(tmp_path))
    with take(store) as run:
        add_units(run, "u1")
    torn = tmp_path / f"ablations/run={RUN}/model=org--tiny/.tmp-0123456789abcdef"
    torn.write_bytes(b"PAR1")
    with take(store) as run:
        assert not torn.exists()
        assert run.done_units() == {"u1"}


# Who drives


def test_a_run_goes_on_where_it_stopped(store: Store) -> None:
    with take(store) as run:
        run.manifest.freeze_commits({MODEL: "first"})
        run.manifest.add_prompts(["a", "b"])
        add_units(run, "u1")
    assert store.find().status == "interrupted"
    with store.take(RUN, written="name: heads\nseed: 1\n", resolved={"name": "heads", "seed": 1}) as run:
        assert run.done_units() == {"u1"}
        run.manifest.freeze_commits({MODEL: "second", "org/new": "x"})
        run.manifest.add_prompts(["b", "c"])
        add_units(run, "u2")
        run.close("done")
    manifest = store.find()
    assert (manifest.status, manifest.epoch) == ("done", 2)
    assert manifest.commits == {MODEL: "first", "org/new": "x"}
    assert manifest.generations == [["a", "b"], ["c"]]
    assert [job.resolved for job in manifest.jobs] == [{"name": "heads"}, {"name": "heads", "seed": 1}]
    assert read_keys(store) == keys("u1", "u2")


def test_the_same_job_again_is_not_another_issue(store: Store) -> None:
    for _ in range(2):
        take(store, cut_rule={"unit_ablations": 512}).close("done")
    take(store, cut_rule={"unit_ablations": 64}).close("done")
    assert len(store.find().jobs) == 1
    assert store.find().cut_rule == {"unit_ablations": 512}


def test_a_run_whose_driver_lives_is_refused_by_name(store: Store) -> None:
    with take(store) as run:
        driver = run.manifest.driver
        with pytest.raises(UserError, match=f"driven by process {driver.pid} on {driver.host} since 20") as refused:
            take(store)
        assert not isinstance(refused.value, RunLost)
    take(store).close("done")


def test_of_two_drivers_at_one_instant_exactly_one_wins(store: Store) -> None:
    for attempt in range(5):
        barrier = threading.Barrier(4)

        def start(name: str = f"race-{attempt}", barrier: threading.Barrier = barrier) -> Run | UserError:
            barrier.wait()
            try:
                return take(store, name)
            except UserError as refusal:
                return refusal

        with ThreadPoolExecutor(4) as pool:
            outcomes = [future.result() for future in [pool.submit(start) for _ in range(4)]]
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Run)]
        assert all("is being driven" in str(error) for error in outcomes if error is not winner)
        winner.check()
        winner.close("done")


DRIVER = """
import sys, time
import raymi.store
from tests.rows import take, add_units
run = take(raymi.store.open(sys.argv[1]), heartbeat=float(sys.argv[2]))
add_units(run, "u1")
run.flush()
add_units(run, "u2")
print("ready", flush=True)
sys.stdin.readline()
try:
    run.flush()
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


def another_process(root: Path, heartbeat: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(root), str(heartbeat)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_driver_is_taken_over_at_once_and_loses_only_its_buffer(tmp_path: Path) -> None:
    store = raymi.store.open(str(tmp_path))
    process = another_process(tmp_path, heartbeat=10)
    with pytest.raises(UserError, match=f"process {process.pid} "):
        take(store)
    process.kill()
    # Not waited for: a zombie is dead too.
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not store.is_driven(store.find())
    with take(store) as run:
        assert run.done_units() == {"u1"}
    process.communicate()


def test_a_stopped_driver_wakes_and_finds_the_run_lost(tmp_path: Path) -> None:
    store = raymi.store.open(str(tmp_path))
    process = another_process(tmp_path, heartbeat=0.05)
    time.sleep(0.5)
    with pytest.raises(UserError, match=f"process {process.pid} "):
        take(store)  # it beats
    psutil.Process(process.pid).suspend()
    time.sleep(0.5)
    with take(store) as run:
        psutil.Process(process.pid).resume()
        said, _ = process.communicate("go on\n")
        assert said.startswith("RunLost the run heads-1a2b3c4d was taken over by process")
        add_units(run, "u2")
        run.close("done")
    assert plain_keys(tmp_path) == read_keys(store) == keys("u1", "u2")


@pytest.mark.parametrize(
    ("field", "value", "free"),
    [
        ("pid", 2**22 + 1, True),  # no such process
        ("process_started", 1.0, True),  # the pid was given to another
        ("host", "elsewhere", False),  # nothing can be known but its heartbeat, which is fresh
    ],
)
def test_what_is_known_of_a_driver(store: Store, field: str, value: Any, free: bool) -> None:
    run = take(store)
    run._heart.stop()
    setattr(run.manifest.driver, field, value)
    run.save()
    if free:
        take(store).close("done")
    else:
        with pytest.raises(UserError, match="is being driven by process"):
            take(store)


def test_a_driver_elsewhere_is_taken_over_when_its_heartbeat_is_old(store: Store) -> None:
    run = overdue(store)
    run.manifest.driver.host = "elsewhere"
    run.save()
    takeover(store).close("done")


def test_the_heartbeat_interval_comes_from_the_environment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMI_HEARTBEAT_SECONDS", "0.25")
    with take(store) as run:
        assert run.manifest.driver.heartbeat == 0.25


# The fence


def test_a_driver_that_lost_its_run_cannot_flush_save_or_close(store: Store) -> None:
    old = overdue(store)
    add_units(old, "u1")
    with takeover(store) as new:
        for write in (old.flush, old.save, lambda: old.close("done")):
            with pytest.raises(RunLost, match=f"taken over by {new.manifest.driver}"):
                write()
        assert read_keys(store) == []


def test_what_was_written_between_check_and_takeover_never_counts(store: Store, tmp_path: Path) -> None:
    """The old driver looks, is stopped, the run is taken, and it wakes inside its write."""
    old = overdue(store)
    add_units(old, "u1")
    old.flush()
    add_units(old, "u2")
    old.manifest.freeze_commits({MODEL: "stale"})
    new = takeover(store)
    old.check = lambda: None
    old.flush()
    old.save()
    assert len(files(tmp_path)) == 2
    # Neither the rows nor the manifest of the old driver are believed, by anyone.
    assert read_keys(store) == keys("u1")
    assert new.done_units() == {"u1"}
    assert store.find().epoch == 2
    assert store.find().commits == {}
    add_units(new, "u2")
    new.flush()
    assert plain_keys(tmp_path) == read_keys(store) == keys("u1", "u2")
    # It wakes once more, after the run was closed.
    new.close("done")
    add_units(old, "u3")
    old.flush()
    assert read_keys(store) == keys("u1", "u2")
    take(store).close("done")
    assert plain_keys(tmp_path) == read_keys(store) == keys("u1", "u2")


@pytest.mark.parametrize("wakes_after", ["listing", "creating"])
def test_a_driver_that_wakes_during_the_takeover_takes_no_row_with_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wakes_after: str
) -> None:
    """It compacts between the new driver's listing of what it accepts and the new driver's first write."""
    old = overdue(store)
    for name in ("u1", "u2"):
        add_units(old, name)
        old.flush()
    time.sleep(0.1)
    create = ownership._create

    def create_late(objects: Any, manifest: Any) -> None:
        monkeypatch.setattr(ownership, "_create", create)
        if wakes_after == "listing":
            compaction.compact(old)
        create(objects, manifest)
        if wakes_after == "creating":
            with pytest.raises(RunLost):
                compaction.compact(old)

    monkeypatch.setattr(ownership, "_create", create_late)
    with take(store) as new:
        assert new.done_units() == {"u1", "u2"}
        assert plain_keys(tmp_path) == read_keys(store) == keys("u1", "u2")
        new.close("done")
    assert plain_keys(tmp_path) == keys("u1", "u2")


def test_a_driver_stopped_inside_the_commit_of_a_compaction_deletes_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = overdue(store)
    for name in ("u1", "u2"):
        add_units(old, name)
        old.flush()
    save = ownership.save
    taken: list[Run] = []

    def save_late(objects: Any, manifest: Any) -> None:
        if not taken and len(manifest.live or []) == 1:  # the merged file has just replaced the two small ones
            monkeypatch.setattr(ownership, "save", save)
            taken.append(takeover(store))
        save(objects, manifest)

    monkeypatch.setattr(ownership, "save", save_late)
    with pytest.raises(RunLost):
        compaction.compact(old)
    with taken[0] as new:
        assert new.done_units() == {"u1", "u2"}
        assert read_keys(store) == keys("u1", "u2")
        new.flush()
        new.close("done")
    assert plain_keys(tmp_path) == keys("u1", "u2")


# The end


def test_a_finished_run_is_one_file_a_table_and_model(store: Store, tmp_path: Path) -> None:
    with take(store) as run:
        for name in ("u1", "u2", "u3"):
            add_units(run, name)
            add_units(run, name + "b", model="org/other")
            run.flush()
        run.add("failures", None, failure())
        assert len(files(tmp_path)) == 6
        run.close("done")
    assert len(files(tmp_path)) == 2
    assert sorted(store.find().live or []) == sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("**/*.parquet")
    )
    assert plain_keys(tmp_path) == read_keys(store) == keys("u1", "u2", "u3", "u1b", "u2b", "u3b")
    with take(store) as run:
        assert len(run.done_units()) == 6


def test_large_files_are_left_alone_and_small_ones_fill_up_to_the_target(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with take(store) as run:
        for number in range(8):
            add_units(run, f"u{number}")
            run.flush()
        size = max(path.stat().st_size for path in files(tmp_path))
        monkeypatch.setattr(compaction, "TARGET_BYTES", 4 * size)
        run.close("done")
    assert len(files(tmp_path)) == 2
    assert read_keys(store) == keys(*(f"u{number}" for number in range(8)))


@pytest.mark.parametrize("step", range(12))
def test_a_crash_at_any_step_of_the_end_leaves_a_store_that_reads_right(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = overdue(store)
    for name in ("u1", "u2", "u3"):
        add_units(run, name)
        add_units(run, name + "b", model="org/other")
        run.flush()
    everything = keys("u1", "u2", "u3", "u1b", "u2b", "u3b")
    steps = iter(range(100))

    class Crash(BaseException):
        pass

    def dying(action: Any) -> Any:
        def act(*arguments: Any) -> Any:
            assert read_keys(store) == everything, "before the step"
            if next(steps) == step:
                raise Crash
            return action(*arguments)

        return act

    with monkeypatch.context() as patch:
        for name in ("put", "delete"):
            patch.setattr(store.objects, name, dying(getattr(store.objects, name)))
        try:
            run.close("done")
        except Crash:
            assert read_keys(store) == everything
        else:
            assert next(steps) <= step, "all steps were tried"
    with takeover(store) as after:
        assert after.done_units() == {"u1", "u2", "u3", "u1b", "u2b", "u3b"}
        after.close("done")
    assert plain_keys(Path(str(store).removeprefix("file://"))) == read_keys(store) == everything


def test_a_run_left_by_an_exception_is_given_back_with_its_rows(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), take(store) as run:  # noqa: PT012
        add_units(run, "u1")
        raise ZeroDivisionError
    assert store.find().status == "interrupted"
    with take(store) as run:
        assert run.done_units() == {"u1"}


# What must not be there


def test_no_secret_of_the_environment_reaches_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "q7" * 17
    monkeypatch.setenv("HF_TOKEN", token)
    store = raymi.store.open(str(tmp_path))
    with store.take(RUN, written=f"# {token}\nname: x", resolved={"name": token}) as run:
        run.add("failures", None, failure(message=f"401 for {token}", traceback=f"Bearer {token}"))
        event = {"kind": "note", "message": token, "happened_at": MOMENT}
        run.add("events", None, schemas.rows("events", [event]))
        run.add("ablations", "m", schemas.rows("ablations", [cell("u1", 0)]))
        run.close("done")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    for path in written:
        held = pq.read_table(path, partitioning=None).to_pylist() if path.suffix == ".parquet" else path.read_bytes()
        assert token not in str(held), path
    assert store.scan("failures").collect()["message"].to_list() == ["401 for ***"]

import json
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

import raymi.store
from raymi.errors import UserError
from raymi.store import schemas
from raymi.store.reader import Store
from tests.rows import MODEL, add_units, take, units

NAMES = ("heads-11111111", "heads-22222222", "subject-33333333")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return raymi.store.open(str(tmp_path / "lab=3" / "nights [x]"))


@pytest.mark.parametrize("table", schemas.SCHEMAS)
def test_a_table_without_files_is_empty_and_typed(store: Store, table: str) -> None:
    frame = store.scan(table).collect()
    assert frame.height == 0
    assert frame.schema == pl.Schema(schemas.SCHEMAS[table]) | {"run": pl.String(), "model": pl.String()}


@pytest.mark.parametrize("table", schemas.SCHEMAS)
def test_a_table_has_the_same_schema_with_and_without_files(store: Store, table: str) -> None:
    empty = store.scan(table).collect_schema()
    with take(store) as run:
        run.add(table, "m", schemas.rows(table, [{schemas.SCHEMAS[table].names[0]: "x"}]))
        run.flush()
        frame = store.scan(table).collect()
    assert frame.height == 1
    assert frame.schema == empty


def test_run_and_model_are_strings_whatever_they_look_like(store: Store) -> None:
    with take(store, "2026-11-22") as run:
        add_units(run, "u1", model="1e5")
    with take(store, "7") as run:
        add_units(run, "u1", model="org/2026-11-22")
    frame = store.scan("ablations").select("run", "model").unique().sort("run").collect()
    assert frame.rows() == [("2026-11-22", "1e5"), ("7", "org--2026-11-22")]
    assert store.scan("ablations", "7").collect().height == 3


def test_files_that_raymi_did_not_write_are_left_alone(store: Store) -> None:
    with take(store) as run:
        add_units(run, "u1")
        run.flush()
        folder = Path(str(store)) / "ablations" / f"run={run.name}" / "model=org--tiny"
        for name in (".tmp-00", "notes.parquet", "part-0.parquet", "README.md"):
            (folder / name).write_text("not a table")
        (folder.parent / "e0001-000001-00000000.parquet").write_text("not a table")
        assert store.scan("ablations").collect().height == 3
        run.close("done")
    assert (folder / "notes.parquet").exists()


def test_columns_may_come_and_go_between_versions(store: Store) -> None:
    with take(store) as run:
        add_units(run, "u1", "u2")
        run.flush()
        (file,) = Path(str(store)).glob("ablations/**/*.parquet")
        older = units(["u1", "u2"]).drop_columns(["engine"])
        pq.write_table(older.append_column("later", older["kl"]), file)
        add_units(run, "u3")
        run.flush()
        for _ in range(2):
            frame = store.scan("ablations").select("unit_id", "engine").unique().sort("unit_id").collect()
            assert frame.rows() == [("u1", None), ("u2", None), ("u3", "full")]
            run.close("done")
    with take(store) as run:
        assert run.done_units() == {"u1", "u2", "u3"}


def test_a_compaction_while_reading_is_not_seen(store: Store) -> None:
    run = take(store)
    for name in ("u1", "u2"):
        add_units(run, name)
        run.flush()
    present = store.objects.entries
    left = iter([run])

    def compacted_after_listing(prefix: str) -> object:
        listed = present(prefix)
        if prefix.startswith("ablations/") and (late := next(left, None)):
            late.close("done")
        return listed

    store.objects.entries = compacted_after_listing  # type: ignore[method-assign]
    assert store.scan("ablations").collect().height == 6


def test_runs_are_found_by_name_beginning_or_age(store: Store) -> None:
    for name in NAMES:
        take(store, name).close("done")
    take(store, NAMES[1]).close("failed")
    assert [manifest.run for manifest in store.runs()] == [NAMES[0], NAMES[2], NAMES[1]]
    assert store.find().run == NAMES[1]
    assert store.find(NAMES[0]).run == NAMES[0]
    assert store.find("sub").run == NAMES[2]


@pytest.mark.parametrize(
    ("ref", "said", "hint"),
    [
        ("heads", "several runs begin with 'heads'", "heads-11111111 or heads-22222222"),
        ("haeds-11111111", "no run 'haeds-11111111'", "Did you mean heads-11111111"),
        ("zzz", "no run 'zzz'", "raymi runs"),
    ],
)
def test_a_run_that_is_not_found_brings_a_suggestion(store: Store, ref: str, said: str, hint: str) -> None:
    for name in NAMES:
        take(store, name).close("done")
    with pytest.raises(UserError, match=said) as error:
        store.find(ref)
    assert hint in (error.value.hint or "")


def test_an_empty_store_says_so(store: Store) -> None:
    assert store.runs() == []
    with pytest.raises(UserError, match="no runs"):
        store.find()


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", ".hidden", "a=b"])
def test_a_run_name_must_be_one_plain_folder(store: Store, name: str) -> None:
    with pytest.raises(UserError, match="cannot be named"):
        take(store, name)


@pytest.mark.parametrize("file", ["manifest.json", "epochs/e0001.json"])
@pytest.mark.parametrize("action", ["take", "find", "scan"])
def test_a_newer_schema_is_refused_and_names_the_raymi_it_needs(store: Store, file: str, action: str) -> None:
    take(store).close("done")
    folder = Path(str(store)) / "runs" / "heads-1a2b3c4d"
    path = folder / file
    newer = {"schema_version": 99, "versions": {"raymi": "9.1.0"}, "run": "not as we know it"}
    path.write_text(json.dumps(newer))
    if file != "manifest.json":
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="has schema 99") as error:
        {"take": lambda: take(store), "find": store.find, "scan": lambda: store.scan("ablations")}[action]()
    assert "raymi 9.1.0" in (error.value.hint or "")
    assert json.loads(path.read_text()) == newer


@pytest.mark.parametrize("text", ["{", '{"schema_version": 1}', "[]", "\udcff"])
def test_a_damaged_manifest_is_named_and_a_copy_taken(store: Store, text: str) -> None:
    take(store).close("done")
    folder = Path(str(store)) / "runs" / "heads-1a2b3c4d"
    (folder / "manifest.json").write_text(text, "utf-8", "surrogateescape")
    runs, damaged = store.survey()
    assert [run.status for run in runs] == ["done"]
    assert "manifest.json is not a manifest" in str(damaged["heads-1a2b3c4d"])
    assert "e0001.json is used" in str(damaged["heads-1a2b3c4d"])
    take(store).close("done")
    assert store.survey()[1] == {}, "whoever takes the run writes it anew"


@pytest.mark.parametrize("text", ["{", '{"schema_version": 1}', "[]"])
def test_a_manifest_without_a_copy_loses_no_other_run(store: Store, text: str) -> None:
    for name in NAMES:
        take(store, name).close("done")
    for file in (Path(str(store)) / "runs" / NAMES[0]).rglob("*.json"):
        file.write_text(text)
    runs, damaged = store.survey()
    assert [run.run for run in runs] == [run.run for run in store.runs()] == list(NAMES[1:])
    assert damaged.keys() == {NAMES[0]}
    assert store.find().run == NAMES[2]
    assert store.find(NAMES[1]).run == NAMES[1]
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest") as error:
        store.find(NAMES[0])
    assert "Put back a good copy" in (error.value.hint or "")
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest"):
        store.scan("ablations")  # of all runs, one of which would be missing


def test_an_empty_manifest_is_none(store: Store) -> None:
    take(store).close("done")
    (Path(str(store)) / "runs" / "heads-1a2b3c4d" / "manifest.json").write_text("")
    assert store.find().epoch == 1  # the driver's own word is there
    assert store.survey()[1] == {}


def test_the_manifest_says_what_a_run_needs_to_be_made_again(store: Store) -> None:
    with store.take("x", written="name: x  # mine\n", resolved={"name": "x"}, cut_rule={"unit_ablations": 512}) as run:
        run.manifest.freeze_commits({MODEL: "abc"})
    manifest = json.loads((Path(str(store)) / "runs/x/manifest.json").read_text())
    assert manifest["jobs"][0]["written"] == "name: x  # mine\n"
    assert manifest["commits"] == {MODEL: "abc"}
    assert manifest["versions"].keys() >= {"raymi", "python", "torch", "transformers", "ray", "polars"}
    assert manifest["hardware"].keys() == {"platform", "machine", "cpus", "ram"}
    assert len(manifest["code"]) == 16


def test_opening_a_store_makes_nothing(tmp_path: Path) -> None:
    assert raymi.store.open(str(tmp_path / "none")).runs() == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("field", ["created_at", "status_at", "hardware", "driver.started_at", "driver.token"])
def test_what_a_manifest_lacks_is_not_waited_for(store: Store, field: str) -> None:
    with take(store) as run:
        add_units(run, "u1")
    path = Path(str(store)) / "runs" / "heads-1a2b3c4d" / "manifest.json"
    manifest = json.loads(path.read_text())
    within, _, name = field.rpartition(".")
    del (manifest[within] if within else manifest)[name]
    path.write_text(json.dumps(manifest))
    assert store.scan("ablations", "heads-1a2b3c4d").collect().height == 3

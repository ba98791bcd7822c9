import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result

import raymi.store
from raymi.cli.main import raymi as cli
from raymi.cli.sae_text import clipped
from raymi.cli.text import bars
from raymi.errors import UserError, told
from raymi.store import schemas
from raymi.store.layout import slug
from tests.rows import MOMENT, cell, failure, loaded, take, verified
from tests.sae_rows import Tokens, ablated, injected, moved, seen, text

RUN = "heads-1a2b3c4d"
LONG = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHANGED = moved(t1=0.5, t2=0.125, t3=-0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run of three models, one of them deep and one that failed."""
    folder = tmp_path_factory.mktemp("store")
    store = raymi.store.open(str(folder))
    take(store, "older-00000000").close("done")
    with take(store, RUN) as run:
        for model, n_layers in ((LONG, 64), ("openai-community/gpt2", 12)):
            cells = [
                cell(f"{model}{layer}", layer, head, model=model, kl=layer / 100, logit_diff=-layer / 10)
                for layer in range(n_layers)
                for head in range(2)
            ]
            run.manifest.freeze_commits({model: "0" * 40})
            run.add("models", slug(model), loaded(model))
            run.add("ablations", slug(model), schemas.rows("ablations", cells))
        for unit in ("x", "y"):
            run.add(
                "failures", "m", failure(LONG, stage="unit", unit_id=unit, kind="NonFinite", message="NaN in layer 3")
            )
        run.add("failures", "m", failure("org/broken", message="the header of model.safetensors is too large " * 4))
        run.close("failed")
    return folder


def call(*arguments: object, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(cli, [str(argument) for argument in arguments])


def test_runs_lists_them(folder: Path) -> None:
    result = call("runs", "--store", folder)
    assert result.exit_code == 0
    header, first, second = result.output.splitlines()
    assert header.split() == ["run", "status", "models", "measured", "failed", "started", "written"]
    assert first.split()[:5] == ["older-00000000", "done", "0", "0", "-"]
    assert second.split()[:5] == [RUN, "failed", "2", "152", "3"]
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_runs_as_json(folder: Path) -> None:
    runs = json.loads(call("runs", "--store", folder, "--json").output)
    assert [(run["run"], run["measured"]) for run in runs] == [("older-00000000", 0), (RUN, 152)]
    assert runs[0]["last_write"] is None
    assert runs[1]["started"].endswith("+00:00")


def test_report_shows_models_layers_and_failures_in_80_columns(folder: Path) -> None:
    result = call("report", "--store", folder)
    assert result.exit_code == 0
    text = result.output
    assert all(len(line) <= 80 for line in text.splitlines()), text
    assert text.startswith(f"{RUN}: failed, issued ")
    assert "3 models, 152 ablations, 3 failures" in text
    row = ["openai-community/gpt2", "24", "0.0550", "0.1100", "-0.5500", "L11", "H0"]
    assert row in [line.split() for line in text.splitlines()]
    assert "▁▂▂▃▄▄▅▅▆▇▇█" in text
    assert "largest L63 -6.3000" in text
    assert f"1. {LONG}: 2 units: NonFinite: NaN in layer 3" in text
    assert "2. org/broken: load: OSError: the header of model.safetensors" in text


def test_all_layers_of_a_deep_model_are_shown_with_their_signs(folder: Path) -> None:
    lines = call("report", "--store", folder).output.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  KL") and "L63" in line)
    shown = [line[16:].split("  largest")[0] for line in lines[at : at + 4]]
    assert sum(len(line) for line in shown[:2]) == 64
    assert lines[at + 1].startswith("    from 40")
    assert lines[at + 2].startswith("  logit diff -")  # none is above zero
    assert not any("logit diff +" in line for line in lines)
    wide = call("report", "--store", folder, columns=300).output
    assert any(len(line[16:].split("  largest")[0]) == 64 for line in wide.splitlines() if line.startswith("  KL"))


def test_a_table_of_layers_and_heads(tmp_path: Path) -> None:
    store = raymi.store.open(str(tmp_path))
    effects = {(0, 0): 0.0, (0, 1): 2.0, (1, 0): -4.0, (1, 1): 0.1, (2, 1): 1.0}  # layer 2 has no head 0
    with take(store, RUN) as run:
        rows = [cell("u", layer, head, logit_diff=effect) for (layer, head), effect in effects.items()]
        together = [cell("v", 3, None, logit_diff=9.0)]
        run.add("ablations", "m", schemas.rows("ablations", rows + together))
        run.close("done")
    said = call("report", "--store", tmp_path).output
    assert "logit diff by layer and head; largest L1 H0 -4.0000; · is near zero" in said
    assert "\n      0 1\nL0    · ▅\nL1   -█ ·\nL2      ▃\n" in said
    assert "\nL3" not in said

    assert call("report", "--store", tmp_path, "--csv", tmp_path / "out").exit_code == 0
    heads = pl.read_csv(tmp_path / "out" / "heads.csv")
    assert heads.columns[-6:] == ["layer", "head", "ablations", "mean_kl", "max_kl", "mean_logit_diff"]
    found = {(row["layer"], row["head"]): row["mean_logit_diff"] for row in heads.iter_rows(named=True)}
    assert found == effects
    shown = json.loads(call("report", "--store", tmp_path, "--json").output)["heads"]
    assert len(shown) == len(effects)


def test_many_heads_and_many_models_are_folded(tmp_path: Path) -> None:
    store = raymi.store.open(str(tmp_path))
    with take(store, RUN) as run:
        for model in range(6):
            rows = [cell(f"u{model}", layer, head, model=f"org/m{model}") for layer in range(2) for head in range(50)]
            run.add("ablations", "m", schemas.rows("ablations", rows))
        run.close("done")
    said = call("report", "--store", tmp_path).output
    assert max(map(len, said.splitlines())) <= 80
    assert "(heads from 37)" in said
    assert "... and 2 more models: --csv FOLDER writes heads.csv with all" in said


@pytest.mark.parametrize(
    ("stage", "kind", "message", "said"),
    [
        (
            "plan",
            "UserError",
            "org/a: heads: 12 is out of range.\nThey are 0-11.",
            "org/a: heads: 12 is out of range. They",
        ),
        ("load", "UserError", "org/a: it is too large\nTry less", "org/a: load: it is too large. Try less"),
        ("load", "Mismatch", "org/a: 3 of 8 differ", "org/a: load: 3 of 8 differ"),
        ("load", "OSError", "torn", "org/a: load: OSError: torn"),
        ("plan", "KeyError", "'x'", "org/a: plan: KeyError: 'x'"),
        ("select", "Rejected", "no tokenizer", "org/a: no tokenizer"),
        ("3 units", None, None, "org/a: 3 units"),
    ],
)
def test_failures_say_nothing_twice(stage: str, kind: str | None, message: str | None, said: str) -> None:
    assert told("org/a", stage, kind, message).startswith(said)


def test_verification_that_proves_little_says_so(tmp_path: Path) -> None:
    store = raymi.store.open(str(tmp_path))
    with take(store, RUN) as run:
        for model, effect in (("org/plain", 0.5), ("org/half", 0.02)):
            run.manifest.freeze_commits({model: "0" * 40})
            run.add("models", slug(model), loaded(model))
            run.add("ablations", slug(model), schemas.rows("ablations", [cell(f"{model}0", 0, 0, model=model)]))
            run.add("verifications", slug(model), verified("cone", 0.01, model=model, effect=effect))
        run.close("done")
    said = call("report", "--store", tmp_path).output
    assert "off by  noise to  effects to" in said
    assert "1.0e-02   3.0e-02      0.5000" in said
    assert "org/half: no effect that was measured twice is larger than noise" in said
    assert "org/plain: no effect" not in said


def test_verification_that_failed_is_told_apart_from_what_rows_rest_on(tmp_path: Path) -> None:
    store = raymi.store.open(str(tmp_path))
    minute = timedelta(minutes=1)
    later = MOMENT + minute
    with take(store, RUN) as run:
        for model, engine in (("org/full", "full"), ("org/again", "cone"), ("org/twice", "cone")):
            run.manifest.freeze_commits({model: "0" * 40})
            run.add("ablations", slug(model), schemas.rows("ablations", [cell(model, 0, model=model, engine=engine)]))
            run.add("verifications", slug(model), verified("cone", 0.25, 0.2, 0.01, model=model))
            if engine == "cone":
                run.add("failures", slug(model), failure(model))
            run.add("verifications", slug(model), verified(engine, 0.01, 0.02, model=model, measured_at=later))
            run.add("models", slug(model), loaded(model, loaded_at=later))
        run.add("verifications", "twice", verified("cone", 0.5, model="org/twice", measured_at=later + 2 * minute))
        run.add("failures", "twice", failure("org/twice", failed_at=later + 2 * minute))
        run.close("done")
    said = call("report", "--store", tmp_path).output
    lines = [line.split() for line in said.splitlines()]
    assert ["org/full", "full", "2", "2", "2.0e-02", "3.0e-02", "0.5000"] in lines
    assert ["org/again", "cone", "2", "2", "2.0e-02", "3.0e-02", "0.5000"] in lines
    said = " ".join(said.split())
    differed = "ablations measured by the cone differed from full forwards of the family's own attention by up to"
    assert f"org/full: 2 of 3 {differed} 2.5e-01, so it was measured by full forwards" in said
    assert f"org/again: 2 of 3 {differed} 2.5e-01 at an attempt that failed" in said
    assert f"org/twice: 3 of 4 {differed} 5.0e-01 at 2 attempts that failed" in said
    record = json.loads(call("report", "--store", tmp_path, "--json").output)
    assert [(each["model_id"], each["then"]) for each in record["mismatches"]] == [
        ("org/again", "failed"),
        ("org/full", "full"),
        ("org/twice", "failed"),
    ]
    assert call("report", "--store", tmp_path, "--csv", tmp_path / "out").exit_code == 0
    assert pl.read_csv(tmp_path / "out" / "mismatches.csv")["differed"].to_list() == [2, 2, 3]


def test_what_took_full_forwards_says_why(tmp_path: Path) -> None:
    store = raymi.store.open(str(tmp_path))
    with take(store, RUN) as run:
        for model, why, units in (("org/fast", "", 0), ("org/mixed", "", 2), ("org/slow", "cone: two streams", 0)):
            run.manifest.freeze_commits({model: "0" * 40})
            run.add("models", slug(model), loaded(model, capability=json.dumps({"why": why})))
            run.add("ablations", slug(model), schemas.rows("ablations", [cell(f"{model}0", 0, 0, model=model)]))
            for unit in range(units):
                event = {"model_id": model, "kind": "full", "message": f"unit {unit}, 1 batch by full forwards: flips"}
                run.add("events", slug(model), schemas.rows("events", [event | {"happened_at": datetime.now(UTC)}]))
        run.close("done")
    said = " ".join(call("report", "--store", tmp_path).output.split())
    assert (
        "org/mixed: 2 times something took full forwards all the same: unit 0, 1 batch by full forwards: flips" in said
    )
    assert "org/slow: cone: two streams" in said
    assert "org/fast:" not in said


def test_report_of_a_named_run_and_of_the_beginning_of_its_name(folder: Path) -> None:
    for ref in (RUN, "hea"):
        assert call("report", ref, "--store", folder).output.startswith(f"{RUN}:")
    assert call("report", "old", "--store", folder).output.startswith("older-00000000: done")


def test_report_as_json_has_every_table(folder: Path) -> None:
    report = json.loads(call("report", "--store", folder, "--json").output)
    assert report["run"] == RUN
    assert report["status"] == "failed"
    assert [model["model_id"] for model in report["models"]] == [LONG, "openai-community/gpt2", "org/broken"]
    assert len(report["layers"]) == 76
    assert [failure["attempts"] for failure in report["failures"]] == [1, 1, 1]


@pytest.mark.parametrize(("kind", "read"), [("csv", pl.read_csv), ("parquet", pl.read_parquet)])
def test_tables_are_written_to_a_folder_or_one_to_a_file(folder: Path, tmp_path: Path, kind: str, read: object) -> None:
    assert callable(read)
    assert call("report", "--store", folder, f"--{kind}", tmp_path / "out").exit_code == 0
    heights = {path.name: read(path).height for path in (tmp_path / "out").iterdir()}
    assert heights == {
        f"models.{kind}": 3,
        f"answers.{kind}": 2,
        f"layers.{kind}": 76,
        f"heads.{kind}": 152,
        f"failures.{kind}": 3,
    }
    result = call("report", "--store", folder, f"--{kind}", tmp_path / f"one.{kind}")
    assert result.output == f"wrote {tmp_path / f'one.{kind}'}\n"
    assert read(tmp_path / f"one.{kind}")["ablations"].to_list() == [128, 24, 0]


def test_what_cannot_be_written_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    error = call("report", "--store", folder, "--csv", tmp_path / "file").exception
    assert isinstance(error, UserError)
    assert "cannot write" in str(error)


def test_report_works_while_the_run_goes_on(tmp_path: Path) -> None:
    with take(raymi.store.open(str(tmp_path))) as run:
        assert call("report", "--store", tmp_path).output.startswith(f"{RUN}: running")
        run.add("ablations", "m", schemas.rows("ablations", [cell("u", 3, None)]))
        run.flush()
        result = call("report", "--store", tmp_path)
        assert "L3 all heads" in result.output
        assert "by layer" not in result.output


def test_the_store_comes_from_the_environment_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMI_STORE", str(folder))
    assert RUN in call("runs").output


@pytest.fixture(scope="module")
def of_saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run of nothing but autoencoders, two of them, with names as long as they are."""
    folder = tmp_path_factory.mktemp("saes")
    rng = np.random.default_rng(0)
    told = {"model_id": LONG, "sae": f"{LONG}-sae:blocks.15.hook_resid_post"}
    tables = {
        "sae_quality": [
            Tokens(rng, 30).row("q", **told, fired_tokens=[9, 3, 1], fired_features=[0, 1, 2], fired_texts=[1, 1, 1]),
            Tokens(rng, 30).row("q", **{**told, "sae": "short"}),
        ],
        "sae_features": [seen("a", at, {at: float(at), 40: 1.0}, **told) for at in range(30)],
        "sae_injections": [
            injected(strength, "a", feature=feature, **told, kl=strength / 10, logit_shift=3.25, changed=CHANGED)
            for strength in (1.0, 50.0)
            for feature in range(15)
        ],
        "sae_ablations": [ablated(n, "a", (2.5,), logit_diff=n / 10, kl=0.5, **told) for n in range(12)],
        "saes": [
            {"model_id": "org/other", "revision": "1" * 40, "experiment": name, "note": "none fits"} for name in "ba"
        ],
        "prompts": [{**text("a", [f" word{n}\n" for n in range(30)]), "model_id": LONG}],
        "vocabulary": [{"model_id": LONG, "revision": "0" * 40, "token_id": 1, "token": " Paris"}],
    }
    with take(raymi.store.open(str(folder)), RUN) as run:
        for table, rows in tables.items():
            run.add(table, slug(LONG), schemas.rows(table, rows))
        run.close("done")
    return folder


def test_a_report_of_autoencoders_has_their_tables_and_no_empty_ones(of_saes: Path) -> None:
    result = call("report", "--store", of_saes)
    assert result.exit_code == 0
    text = result.output
    assert all(len(line) <= 80 for line in text.splitlines()), text
    assert "1 model, 34 measurements with autoencoders" in text
    assert "ablated" not in text
    cells = [line.split() for line in text.splitlines()]
    assert "how well activations are reconstructed, without special tokens (sae_lens 6.54)" in text
    (quality,) = [row for row in cells if row[-3:] == ["5", "of", "8"]]
    assert quality[0] == "30"
    assert ["3.2e-02", "▅█", "3.2e-01"] in cells
    # The strongest features, the strongest of them first, and where.
    (strongest,) = [line for line in text.splitlines() if line.startswith("     29  ")]
    assert strongest.split()[:4] == ["29", "0.0333", "29.00", "29.00"]
    assert strongest.endswith("« word29\\n»")
    # Feature 40 is active wherever others are, but nowhere the strongest.
    assert not any(line.startswith("     40  ") for line in text.splitlines())
    # Those that change most, and what they raise.
    assert ["14", "50", "1", "3.2500", "5.0000", "-", '"', 'Paris"', "+50.0"] in cells
    assert text.count("and 10 more rows in --csv and --parquet") == 1
    assert ["11", "1", "of", "1", "2.50", "0.5000", "+1.1000", "1.1000"] in cells
    assert "and 2 more rows" in text
    assert "not measured:\n  org/other: a, b: none fits\n" in text


def test_tables_of_autoencoders_are_exported(of_saes: Path, folder: Path, tmp_path: Path) -> None:
    names = ("quality", "densities", "injections", "ablations", "activity", "features", "examples", "absent")
    assert call("report", "--store", of_saes, "--csv", tmp_path).exit_code == 0
    heights = {path.stem: pl.read_csv(path, infer_schema=False).height for path in tmp_path.iterdir()}
    assert heights.keys() == {"models", "answers", "layers", "heads", "failures", *(f"sae_{name}" for name in names)}
    assert (heights["sae_quality"], heights["sae_injections"], heights["sae_features"]) == (2, 30, 31)
    report = json.loads(call("report", "--store", of_saes, "--json").output)
    assert {name: len(report[name]) for name in heights} == heights
    assert report["measured"] == 34
    knockouts = json.loads(call("report", "--store", folder, "--json").output)
    assert all(knockouts[f"sae_{name}"] == [] for name in names)


@pytest.mark.parametrize(
    ("context", "room", "shown"),
    [
        ("one two« three» four five", 100, "one two« three» four five"),
        ("one two« three» four five", 20, "one two« three» four"),
        ("of one two« three» four five", 20, "…ne two« three» four"),
        ("a\n  b« c»", None, "a\\n b« c»"),
        ("« first» and then much more of it", 12, "« first» and"),
        ("much of it and then« last»", 12, "…then« last»"),
    ],
)
def test_contexts_are_cut_where_they_are_not_marked(context: str, room: int | None, shown: str) -> None:
    assert clipped(context, room) == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "haeds-1a2b3c4d"], "Did you mean heads-1a2b3c4d?"),
        (["report", "--store", "nowhere"], "there are no runs in the store"),
        (["report", "--store", __file__], "is a file"),
        (["runs", "--store", "foo://bucket"], "refuses"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(folder: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    more = [] if "--store" in arguments else ["--store", str(folder)]
    command = [sys.executable, "-m", "raymi", *arguments, *more]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_an_empty_store_has_no_runs(tmp_path: Path) -> None:
    result = call("runs", "--store", tmp_path / "none")
    assert result.exit_code == 0
    assert result.output.startswith("No runs in ")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.0, 1.0, 2.0], ["▁", "▅", "█"]),
        ([1.0, None, 1.0], ["█", "·", "█"]),
        ([0.0, 0.0], ["▁", "▁"]),
        ([-2.0, 1.0, -0.01], ["-█", "▅", "-▁"]),
        ([], []),
    ],
)
def test_bars(values: list[float | None], shown: list[str]) -> None:
    assert bars(values) == shown

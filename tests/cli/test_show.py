"""`raymi show`: one failure or one row whole."""

import json
from pathlib import Path

import pytest

import raymi.store
from raymi.store import schemas
from tests.cli.inline import Said, Shell
from tests.rows import MODEL, REVISION, cell, failure, take

RUN = "heads-1a2b3c4d"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    shell = Shell(tmp_path, monkeypatch, capfd)
    with take(raymi.store.open("store"), RUN) as run:
        rows = [cell("abc", layer, head, kl=layer + head / 10) for layer in range(3) for head in range(2)]
        rows += [cell("xyz", 1, 1, kl=9.0, prompt_id="italy", experiment="other", model="org/more")]
        run.add("ablations", "m", schemas.rows("ablations", rows))
        words = [{"model_id": MODEL, "revision": REVISION, "token_id": 7, "token": " Paris"}]
        run.add("vocabulary", "m", schemas.rows("vocabulary", words))
        for attempt, unit in enumerate(("u1", "u2"), 1):
            trace = f'Traceback:\n  File "x", line {attempt}\nNotFinite: NaN'
            more = {"stage": "unit", "unit_id": unit, "kind": "NotFinite", "message": "NaN", "traceback": trace}
            run.add("failures", "m", failure(**more))
        run.add("failures", "m", failure("org/bad", message="torn\nsecond line"))
        run.close("failed")
    return shell


def show(shell: Shell, *arguments: str) -> Said:
    return shell("show", "--store", "store", *arguments)


def test_the_strongest_row_that_fits_is_shown_whole(shell: Shell) -> None:
    said = show(shell)
    assert said.code == 0
    assert said.out.startswith(f"{RUN}: table ablations; 7 fit\n")
    assert "\nkl                    9.0\n" in said.out
    said = show(shell, "--prompt", "fra", "--layer", "2", "--head", "1")
    assert "table ablations\n" in said.out
    assert "\nablation_id           abc.2.1\n" in said.out
    assert '\nanswer_token          " Paris"\n' in said.out
    assert '" Paris"   7   25.0%  12.5%' in said.out
    assert "wrong_id" not in said.out  # there is none
    assert max(map(len, said.out.splitlines())) <= 80
    as_json = json.loads(show(shell, RUN[:5], "--unit", "ab", "--layer", "0", "--json").out)
    assert (as_json["unit_id"], as_json["kl"], as_json["changed"][0]["token"]) == ("abc", 0.1, " Paris")


def test_a_failure_is_shown_by_its_number_with_its_traceback(shell: Shell) -> None:
    report = shell("report", "--store", "store").out
    assert f"1. {MODEL}: 2 units: NotFinite: NaN" in report
    assert "2. org/bad: load: OSError: torn. second line" in report
    said = show(shell, "--failure", "1").out
    assert said.startswith(f"{RUN}: table failures; 2 units failed alike\n")
    assert '\ntraceback\nTraceback:\n  File "x", line 1\nNotFinite: NaN\n' in said
    assert "\nmessage\ntorn\nsecond line\n" in show(shell, "--failure", "2").out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--failure", "3"], "--failure 3: allowed: 1 to 2"),
        (["--failure", "1", "--layer", "1"], "--failure: a failure has its number alone"),
        (["--table", "nonsense"], "--table: found 'nonsense'; allowed: ablations, sae_"),
        (["--prompt", "frnace"], "There is france, italy (did you mean 'france'?)."),
        (["--layer", "7"], f"no row of {RUN} has layer 7\nThere is 0, 1, 2."),
        (["--feature", "1"], f"no row of {RUN} has feature 1"),
        (["none"], "no run 'none'"),
    ],
)
def test_what_is_not_there_is_said(shell: Shell, arguments: list[str], says: str) -> None:
    said = show(shell, *arguments)
    assert said.code == 2
    assert says in said.err

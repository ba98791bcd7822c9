"""`--limit` and `--sample`: a few prompts of a run, which the whole job then goes on with."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import raymi.store
from raymi.errors import UserError
from raymi.few import Few
from raymi.job import Job, make_job
from raymi.report import tables
from tests.cli.inline import Shell, one_thread
from tests.fakes import add_model

COUNTRIES = ("France", "Italy", "Norway", "Spain", "Chad")
JOB = """
name: small
models: org/*
prompts:
{prompts}
experiments:
  - {{kind: knockout, name: heads, layers: {{each: all}}, heads: {{each: all}}, queries: last, keys: first}}
verify: 1
"""
CELLS = 8


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    shell = Shell(tmp_path, monkeypatch, capfd)
    add_model(Path("cache"), "org/one")
    write_job()
    return shell


def write_job(countries: tuple[str, ...] = COUNTRIES, more: str = "") -> None:
    prompts = [f"  - {{id: {each}, text: The capital of {each} is}}" for each in countries]
    Path("job.yaml").write_text(JOB.format(prompts="\n".join(prompts)) + more)


def measured(shell: Shell) -> set[str]:
    return set(shell.rows()["prompt_id"])


def test_a_few_prompts_are_part_of_the_run_that_goes_on_with_the_others(shell: Shell) -> None:
    said = shell.run("--limit", "2")
    assert said.code == 0, said.err
    assert "--limit: 2 of 5 prompts" in said.err
    assert ": partial, issued" in said.out
    assert "the last command took 2 of 5 prompts" in said.out
    first = shell.rows()
    assert measured(shell) == {"France", "Italy"}
    assert first.height == 2 * CELLS
    assert "partial" in shell("runs", "--store", "store").out

    said = shell.run("--limit", "2")
    assert "nothing to do, every unit of these prompts is in store" in said.out
    assert shell.rows().height == first.height

    said = shell.run()
    assert said.code == 0, said.err
    every = shell.rows()
    assert set(every["run"]) == set(first["run"])
    assert measured(shell) == set(COUNTRIES)
    assert every.height == 5 * CELLS == every.select("prompt_id", "ablation_id").n_unique()
    assert set(first["unit_id"]) < set(every["unit_id"])
    assert ": done, issued" in said.out


def test_they_take_nothing_away_from_a_report(shell: Shell) -> None:
    shell.run()
    store = raymi.store.open("store")
    whole = tables.report(store)
    assert "nothing to do" in shell.run("--limit", "1").out
    again = tables.report(store)
    assert again.models.equals(whole.models)
    assert again.left_out.prompts.is_empty()
    assert tables.status(again.run, driven=False) == "done"

    add_model(Path("cache"), "org/two")  # which the whole job has not been measured on
    said = shell.run("--sample", "1")
    assert said.code == 0
    later = tables.report(store)
    # Units were cut when the run first saw its prompts: those that share one with the prompt come along.
    assert dict(later.models.select("model_id", "prompts").iter_rows()) == {"org/one": 5, "org/two": 5}
    assert later.left_out.prompts.is_empty()
    assert tables.status(later.run, driven=False) == "partial"
    assert "not counted" not in said.out


def test_a_larger_sample_takes_the_same_ones_and_more(shell: Shell) -> None:
    shell.run("--sample", "2")
    few = measured(shell)
    assert len(few) == 2
    shell.run("--sample", "3")
    assert len(measured(shell)) == 3
    assert measured(shell) > few
    assert shell.rows().height == 3 * CELLS
    # One that is drawn by another seed belongs to the same run.
    others = {seed: taken(shell, seed) for seed in range(6)}
    assert len(set(map(frozenset, others.values()))) > 1
    assert {job.run_name for job in map(seeded, others)} == set(shell.rows()["run"])


def seeded(seed: int) -> Job:
    from raymi.job import load_job

    return load_job(Path("job.yaml"), [f"seed={seed}"])


def taken(_shell: Shell, seed: int) -> set[str]:
    return {prompt.id for prompt in Few(sample=2).of(seeded(seed))[0].prompts}


def test_prompts_of_other_units_stay_behind(shell: Shell) -> None:
    write_job(more="unit_ablations: 8\n")
    shell.run()
    add_model(Path("cache"), "org/two")
    shell.run("--limit", "2")
    models = tables.report(raymi.store.open("store")).models
    assert dict(models.select("model_id", "prompts").iter_rows()) == {"org/one": 5, "org/two": 2}


def test_a_rehearsal_of_a_few_prompts_counts_them(shell: Shell) -> None:
    said = shell.run("--limit", "3", "--dry-run")
    assert "org/one      1          24" in said.out
    assert not list(Path("store").rglob("*.parquet"))


def test_prompts_that_came_and_went_are_no_matter_of_few(shell: Shell) -> None:
    shell.run("--limit", "2")
    write_job(COUNTRIES[1:])  # France is gone
    said = shell.run("--limit", "1")
    assert said.code == 0
    report = tables.report(raymi.store.open("store"))
    assert report.left_out.prompts["prompt_id"].to_list() == ["France"]
    assert report.answers["prompts"].to_list() == [1]


def test_a_changed_field_that_makes_another_run_is_said(shell: Shell) -> None:
    assert "another run" not in shell.run("--limit", "1").err
    first = shell.rows()["run"][0]
    assert "another run" not in shell.run("--limit", "1", "--set", "seed=3").err
    said = shell.run("--limit", "1", "--set", "top_k=3", "--dry-run").err
    assert f"top_k is 3 and was 10 in {first}, which stays as it is" in said
    assert "note: another run begins, small-" in said
    others = shell.run("--limit", "1", "--set", "experiments.0.layers=0", "--set", "bos=never", "--dry-run").err
    assert "bos is 'never' and was 'auto'; its experiments are others in" in others


KNOCKOUT = {"kind": "knockout", "layers": 0}
QUALITY = {"kind": "sae", "measure": "quality", "saes": "org/*"}


def job_of(*experiments: Mapping[str, object], folder: Path) -> Job:
    (folder / "texts.txt").write_text("one two three")
    on = [{**each, "corpus": {"file": str(folder / "texts.txt")}} if each is QUALITY else each for each in experiments]
    prompts = [{"id": name, "text": f"{name} is"} for name in "abc"]
    return make_job({"name": "x", "prompts": prompts, "experiments": on})


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    of_c = KNOCKOUT | {"name": "of-c", "prompts": "c"}
    job = job_of(KNOCKOUT, of_c, QUALITY, folder=tmp_path)
    few, said = Few(limit=2).of(job)
    assert [prompt.id for prompt in few.prompts] == ["a", "b"]
    assert [spec.name for spec in few.experiments] == ["knockout", "of-c"]
    assert few.corpora == job.corpora
    assert said == [
        "--limit: 2 of 3 prompts",
        "none of them is for experiment 'of-c'",
        "experiment 'quality', on a corpus, is left out",
    ]
    assert Few().of(job) == (job, [])
    every = job_of(KNOCKOUT, folder=tmp_path)
    assert Few(sample=3).of(every)[0] is every


@pytest.mark.parametrize(
    ("few", "experiments", "says"),
    [
        (Few(1, 1), [KNOCKOUT], "--limit and --sample: allowed: one of the two"),
        (Few(1), [QUALITY], "--limit takes prompts, and every experiment of this job is on a corpus"),
        (Few(1), [KNOCKOUT | {"prompts": "b"}], "--limit 1 takes none of the prompts that the experiments measure"),
    ],
)
def test_what_would_measure_nothing_is_refused(
    few: Few, experiments: list[Mapping[str, object]], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        few.of(job_of(*experiments, folder=tmp_path))
    assert says in str(error.value)

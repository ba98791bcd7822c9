"""Job files: what they mean, and what is said about what is wrong in them."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from raymi.errors import UserError
from raymi.job import Job, Models, load_job, make_job
from raymi.prompts import Prompt

JOBS = Path(__file__).parent.parent / "jobs"

PLAIN = """\
name: plain
models: [org/one, "Qwen/*"]
prompts:
  - text: The capital of France is
    answer: " Paris"
    subject: France
experiments:
  - kind: knockout
    layers: all
"""


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(folder: Path, text: str = PLAIN, *sets: str) -> Job:
    return load_job(write(folder, text), sets)


def test_a_plain_job(tmp_path: Path) -> None:
    job = load(tmp_path)
    assert job.name == "plain"
    assert job.models == Models(include=("org/one", "Qwen/*"))
    assert [(p.text, p.answer, p.wrong, p.subject) for p in job.prompts] == [
        ("The capital of France is", " Paris", None, "France")
    ]
    assert (job.dtype, job.device, job.bos, job.chat_template) == ("float32", "auto", "auto", False)
    assert (job.top_k, job.unit_ablations) == (10, 512)
    assert [spec.name for spec in job.experiments] == ["knockout"]


def test_the_file_names_the_job(tmp_path: Path) -> None:
    text = PLAIN.replace("name: plain\n", "")
    assert load_job(write(tmp_path, text, "night-1.yaml")).name == "night-1"
    with pytest.raises(
        UserError, match=r"my night\.yaml:1: name is missing, and the file's own .* found 'my night'; allowed: letters"
    ):
        load_job(write(tmp_path, text, "my night.yaml"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("org/one", Models(include=("org/one",))),
        ({"exclude": "*-GGUF"}, Models(include=("*",), exclude=("*-GGUF",))),
        ({"include": ["a/b"], "max_parameters": "1.5B"}, Models(include=("a/b",), max_parameters=1_500_000_000)),
        ({"max_parameters": 70_000_000}, Models(max_parameters=70_000_000)),
        ({"max_parameters": "500m"}, Models(max_parameters=500_000_000)),
    ],
    ids=str,
)
def test_models(value: Any, expected: Models) -> None:
    assert Models.model_validate(value) == expected


def test_prompts_of_every_source_in_the_order_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "p.jsonl").write_text('{"id": "b", "text": "b"}\n{"id": "c", "text": "c"}')
    text = PLAIN.replace(
        "prompts:\n",
        "prompts:\n  - {id: a, text: a}\n  - file: more/p.jsonl\n  - {id: d, text: d}\n  - set: capitals\n",
    )
    ids = [prompt.id for prompt in load(tmp_path, text).prompts]
    assert ids[:5] == ["a", "b", "c", "d", "capitals/France"]


SHIPPED = sorted(JOBS.glob("*.yaml"))


def test_jobs_that_ship() -> None:
    assert {path.stem for path in SHIPPED} >= {"knockout", "heads", "subject", "demo"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_job_survives_json(path: Path) -> None:
    job = load_job(path)
    beside = {"folder": path.parent}  # but for the contents of its corpora, which only their digest stands for
    assert Job.model_validate(json.loads(json.dumps(job.model_dump(mode="json"))), context=beside) == job
    assert Job.model_validate_json(job.model_dump_json(), context=beside).run_name == job.run_name


def test_prompts_of_files_travel_within_the_job(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("id,text,answer\na,b, c")
    job = load(tmp_path, "prompts: {file: p.csv}\nexperiments: [{kind: knockout, layers: 0}]")
    path.unlink()
    assert Job.model_validate(job.model_dump(mode="json")).prompts == (Prompt("a", "b", " c"),)


SAME = [
    ("models=other/*",),
    ("prompts.0.answer=' Lyon'",),
    ("device=cpu",),
    ("seed=7",),
    ("unit_ablations=3",),
    ("experiments.0.heads=all",),
    ("experiments.0.layers={each: [all]}",),
]
OTHER = [
    ("name=other",),
    ("dtype=bfloat16",),
    ("bos=never",),
    ("chat_template=true",),
    ("top_k=3",),
    ("experiments.0.layers=0",),
    ("experiments.0.name=other",),
    ("experiments.0.keys=subject",),
]


def test_run_name(tmp_path: Path) -> None:
    name = load(tmp_path).run_name
    assert name == "plain-841ca697"  # runs are continued by name: another would begin them anew
    assert {load(tmp_path, PLAIN, *sets).run_name for sets in SAME} == {name}
    others = {load(tmp_path, PLAIN, *sets).run_name for sets in OTHER}
    assert len(others - {name}) == len(OTHER)


def test_run_name_does_not_depend_on_the_order_of_experiments(tmp_path: Path) -> None:
    one, two = "  - {kind: knockout, name: one, layers: 1}\n", "  - {kind: knockout, name: two, layers: 2}\n"
    head = PLAIN[: PLAIN.index("  - kind")]
    assert load(tmp_path, head + one + two).run_name == load(tmp_path, head + two + one).run_name


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("dtype=bfloat16", {"dtype": "bfloat16"}),
        ("models=a/b", {"models": {"include": ["a/b"], "exclude": [], "max_parameters": None}}),
        ("top_k = 5", {"top_k": 5}),
        ("prompts.0.wrong=' London'", {}),
        ("experiments.0.layers=[1, 2]", {}),
    ],
)
def test_sets(assignment: str, expected: dict[str, Any], tmp_path: Path) -> None:
    job = load(tmp_path, PLAIN, assignment)
    assert job != load(tmp_path)
    assert job.model_dump(mode="json").items() >= expected.items()


def test_later_sets_win_and_make_what_is_not_there(tmp_path: Path) -> None:
    text = PLAIN.replace('models: [org/one, "Qwen/*"]\n', "")
    job = load(tmp_path, text, "models.exclude=a/*", "models.exclude=b/*", "experiments.0.queries.each=-1")
    assert job.models.exclude == ("b/*",)
    assert job.experiments[0].queries.each == (-1,)


TWO_OF_AN_ID = "  - {id: a, text: b}\n  - {id: a, text: c}\n"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("models:", "model:", "2: model: unknown field; allowed: name, models, dtype, device, prompts, bos,"),
        ("name: plain", "nane: plain", "1: nane: unknown field; allowed: name"),
        ("name: plain", "dtype: flaot32", "1: dtype: found 'flaot32'; allowed: float32, bfloat16, float16"),
        ("name: plain", "bos: yes", "1: bos: found True; allowed: auto, always, never"),
        ("name: plain", "device: gpu", "1: device: found 'gpu'"),
        ("name: plain", "top_k: -1", "1: top_k: found -1; allowed: 0 or more"),
        ("name: plain", "top_k: '3'", "1: top_k: found '3'; allowed: a whole number"),
        ("name: plain", "chat_template: 1", "1: chat_template: found 1; allowed: true or false"),
        ("name: plain", "chat_template: true\nbos: always", "2: bos: found 'always'; allowed: auto"),
        ("name: plain", "name: a/b", "1: name: found 'a/b'; allowed: letters, digits, '-', '_' and '.', beginning"),
        ("name: plain", "name: plain\nname: b", "2: name: stands here a second time"),
        ('[org/one, "Qwen/*"]', "[]", "2: models: found nothing; allowed: at least one"),
        ('[org/one, "Qwen/*"]', "{max_parameters: big}", "2: models.max_parameters: found 'big'; allowed: a number"),
        ('[org/one, "Qwen/*"]', "{includ: x}", "2: models.includ: unknown field; allowed: include, exclude, max_"),
        ("    answer:", "    anser:", "5: prompts.0.anser: unknown field; allowed: text, answer, wrong, subject, id"),
        ("The capital of France is", "''", "4: prompts.0.text: found an empty prompt"),
        ('" Paris"', "5", "5: prompts.0.answer: found 5; allowed: text (in quotes"),
        ("answer: ", "wrong: ", "5: prompts.0.wrong: a wrong answer needs an answer"),
        ("subject: France", 'wrong: " Paris"', "6: prompts.0.wrong: found ' Paris', which is the answer itself"),
        ("subject: France", "subject: Spain", "6: prompts.0.subject: found 'Spain', which is not in the text"),
        ("  - text: The capital of France is\n    answer", "  - answer", "4: prompts.0: text is missing"),
        ("  - text", f"{TWO_OF_AN_ID}  - text", "5: prompts.1: found a second prompt with the id 'a': 'c'"),
        ("  - text", "  - capitals\n  - text", "4: prompts.0: found 'capitals'; allowed: a mapping of text, answer"),
        ("  - text", "  - set: captals\n  - text", "4: prompts.0.set: found 'captals'; allowed: capitals, ioi (did"),
        ("  - text", "  - file: p.jsonl\n  - text", "4: prompts.0.file: there is no file"),
        (
            "  - text",
            "  - file: p.txt\n  - text",
            "4: prompts.0.file: found 'p.txt'; allowed: a file that ends in .jsonl",
        ),
        (
            "kind: knockout",
            "kind: knokout",
            "8: experiments.0.kind: found 'knokout'; allowed: knockout, sae (did you mean",
        ),
        ("  - kind: knockout\n    layers", "  - layers", "8: experiments.0: kind is missing"),
        ("layers: all", "layrs: all", "9: experiments.0.layrs: unknown field"),
        ("layers: all", "layers: midle", "9: experiments.0.layers: found 'midle'; allowed: all, middle, an index"),
        ("layers: all", "layers:\n      each:\n        - 1\n        - x", "12: experiments.0.layers.each.1: found 'x'"),
        ("layers: all", "layers: 0\n    keys: 2\n    queries: 1", "10: experiments.0.keys: found key 2 after query 1"),
        (
            "layers: all",
            "layers: 0\n    prompts: [x]",
            "10: experiments.0.prompts.0: found 'x', which matches the id of no",
        ),
        (
            "layers: all",
            "layers: 0\n    keys: {text: Spain}",
            "10: experiments.0.keys: found 'text:Spain', which prompt",
        ),
        ("layers: all", "layers: all\n  - {kind: knockout, layers: 1}", "10: experiments.1: found 'knockout' again"),
        ("layers: all", "layers: [all", "10: is no valid YAML: expected ',' or ']'"),
        ("layers: all", "layers: a: b", "9: is no valid YAML: mapping values are not allowed here"),
        ("layers: all", "layers: !!python/name:os.system", "9: found the tag '!!python/name:os.system'; allowed:"),
        ("name: plain", "name: *nobody", "1: is no valid YAML: found undefined alias"),
    ],
)
def test_errors_say_where_what_and_what_else(old: str, new: str, expected: str, tmp_path: Path) -> None:
    assert old in PLAIN
    with pytest.raises(UserError) as error:
        load(tmp_path, PLAIN.replace(old, new, 1))
    [only] = str(error.value).splitlines()
    assert f"job.yaml:{expected}" in only


def test_what_no_line_is_known_of(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"job\.yaml: \S"):
        load(tmp_path, PLAIN.replace("plain", "\x07"))


def test_a_date_that_is_none_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"job\.yaml:1: '2026-13-45' is no !!timestamp"):
        load(tmp_path, PLAIN.replace("plain", "2026-13-45"))


@pytest.mark.parametrize(
    ("old", "new", "meant"),
    [
        ("models:", "model:", "models"),
        ("name: plain", "dtype: flaot32", "float32"),
        ("layers: all", "layers: midle", "middle"),
        ("layers: all", "layers: {windw: 3}", "window"),
        ("    answer:", "    anser:", "answer"),
    ],
)
def test_near_misses(old: str, new: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, PLAIN.replace(old, new, 1))
    assert f"(did you mean '{meant}'?)" in str(error.value)


def test_a_subject_that_a_prompt_lacks(tmp_path: Path) -> None:
    text = PLAIN.replace("    subject: France\n", "").replace("layers: all", "layers: all\n    keys: subject")
    with pytest.raises(
        UserError, match=r"job\.yaml:9: experiments\.0\.keys: found 'subject', which prompt '\w+' has not"
    ):
        load(tmp_path, text)
    # An experiment on other prompts does not mind.
    other = text.replace("prompts:\n", "prompts:\n  - {id: a, text: a b, subject: a}\n") + "    prompts: a\n"
    assert load(tmp_path, other).pieces == {"subject"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "job.yaml:1: found no mapping"),
        ("- a", "job.yaml:1: found no mapping"),
        ("name: a\nexperiments: [{kind: knockout, layers: 0}]", "job.yaml:1: prompts is missing"),
        ("name: a\nprompts: []\nexperiments: [{kind: knockout, layers: 0}]", "job.yaml:2: prompts: "),
        ("name: a\nprompts: {text: a}\nexperiments:", "job.yaml:3: experiments: found nothing; allowed: at least one"),
        (
            "name: a\nprompts: {text: a}\nexperiments: []",
            "job.yaml:3: experiments: found nothing; allowed: at least one",
        ),
    ],
)
def test_files_that_say_too_little(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    assert expected in str(error.value)


def test_every_error_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, PLAIN.replace("layers: all", "layers: x\n    heads: y").replace("name: plain", "dtype: z"))
    assert [line.split(": ")[1] for line in str(error.value).splitlines()] == [
        "dtype", "experiments.0.layers", "experiments.0.heads",
    ]  # fmt: skip


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load_job(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_job(tmp_path)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("dtype=flaot32", "--set dtype=flaot32: dtype: found 'flaot32'; allowed: float32, bfloat16, float16"),
        ("experiments.0.layers=midle", "--set experiments.0.layers=midle: experiments.0.layers: found 'midle'"),
        ("experiments.0={kind: knockout, layers: {together: [0, x]}}", "experiments.0.layers.together.1: found 'x'"),
        ("experiments.1.layers=all", "--set experiments.1.layers=all: found 1; allowed: an index below 1"),
        ("experiments.x=all", "--set experiments.x=all: found x; allowed: an index below 1"),
        ("name.first=all", "--set name.first=all: first cannot be set in a value that has no fields"),
        ("modles=x", "--set modles=x: modles: unknown field"),
        ("dtype", "--set dtype: allowed: key=value"),
        ("=3", "--set =3: allowed: key=value"),
        ("a..b=3", "--set a..b=3: allowed: key=value"),
        ("top_k=", "--set top_k=: top_k: found nothing"),
        ("name=!x a", "--set name=!x a: found the tag '!x'; allowed: none"),
        ("verify=!!int a", "--set verify=!!int a: 'a' is no !!int"),
        ("experiments=!!seq a", "--set experiments=!!seq a: is no valid YAML: expected a sequence node"),
        ("verify=!!timestamp 3", "--set verify=!!timestamp 3: '3' is no !!timestamp"),
        ("verify={[a]: 3}", "--set verify={[a]: 3}: found a list or a mapping for a key"),
        ("top_k=[1", "--set top_k=[1: is no valid YAML"),
    ],
)
def test_bad_sets_name_the_set(assignment: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, PLAIN, assignment)
    assert expected in str(error.value)


def test_values_of_a_command_line() -> None:
    spec = {"kind": "knockout", "layers": "middle"}
    job = make_job({"name": "knockout", "models": "a/b", "prompts": {"text": "a"}, "experiments": [spec]})
    assert job.experiments[0].canonical == '{"kind":"knockout","layers":{"each":["middle"]}}'
    with pytest.raises(UserError, match=r"^experiments\.0\.layers\.each\.0: found 'x'; allowed"):
        make_job({"name": "a", "prompts": {"text": "a"}, "experiments": [{**spec, "layers": "x"}]})


def test_anchors_and_merged_keys(tmp_path: Path) -> None:
    text = PLAIN.replace("- kind: knockout", "- &base\n    kind: knockout") + "  - {<<: *base, name: two, layers: %s}\n"
    job = load(tmp_path, text % 3)
    assert [spec.layers.each for spec in job.experiments] == [("all",), (3,)]
    with pytest.raises(UserError, match=r"job\.yaml:11: experiments\.1\.layers: found 'x'"):
        load(tmp_path, text % "x")


# Experiments with autoencoders.

SAES = """\
name: saes
models: org/one
experiments:
  - kind: sae
    measure: quality
    saes: [mine/sae, "org/*"]
    corpus:
      file: texts/c.jsonl
      context: 16
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where there are texts and an autoencoder."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    (tmp_path / "mine" / "sae").mkdir(parents=True)
    return tmp_path


def test_a_job_on_a_corpus_needs_no_prompts(folder: Path) -> None:
    job = load(folder, SAES)
    [spec] = job.sae_experiments
    assert (job.prompts, spec.measure, spec.name) == ((), "quality", "quality")
    assert [corpus.documents for corpus in job.corpora] == [("one", "two")]
    assert [choice.local for choice in spec.saes] == [folder / "mine/sae", None]  # beside the job file


def test_a_job_takes_the_contents_of_its_corpora_along_and_does_not_write_them_down(folder: Path) -> None:
    (folder / "texts" / "c.jsonl").write_text('{"text": "secret words"}')
    job = load(folder, SAES)
    there = pickle.loads(pickle.dumps(job.model_copy(update={"models": Models(include=("org/two",))})))  # noqa: S301
    assert [corpus.documents for corpus in there.corpora] == [("secret words",)]
    assert [spec.saes[0].local for spec in there.sae_experiments] == [folder / "mine/sae"]
    written = job.model_dump(mode="json")
    assert "secret" not in json.dumps(written)
    corpus = written["experiments"][0]["corpus"]
    assert (corpus["file"], corpus["context"], len(corpus["sha256"])) == ("texts/c.jsonl", 16, 64)
    assert Job.model_validate(written, context={"folder": folder}) == job


def test_other_contents_are_another_run(folder: Path) -> None:
    before = load(folder, SAES).run_name
    (folder / "texts" / "c.jsonl").rename(folder / "texts" / "d.jsonl")
    (folder / "texts" / "c.jsonl").write_text('{"text": "three"}')
    assert load(folder, SAES).run_name != before
    assert load(folder, SAES, "models=org/two").run_name == load(folder, SAES).run_name


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("kind: sae", "kind: saes", "4: experiments.0.kind: found 'saes'; allowed: knockout, sae (did you mean"),
        ("kind: sae", "kind: [sae]", "4: experiments.0.kind: found ['sae']; allowed: knockout, sae"),
        ("quality", "qualty", "5: experiments.0.measure: found 'qualty'; allowed: features, quality, injection"),
        ("mine/sae", "./mine/sea", "6: experiments.0.saes.0: there is no folder '"),
        ('"org/*"', "{sae: org/a, sight: x}", "6: experiments.0.saes.1.sight: unknown field; allowed: sae, site"),
        ("texts/c.jsonl", "texts/d.jsonl", "8: experiments.0.corpus.file: there is no file '"),
        ("texts/c.jsonl", "texts/c.csv", "8: experiments.0.corpus.file: found 'texts/c.csv'; allowed: a file that"),
        ("context: 16", "context: 1", "9: experiments.0.corpus.context: found 1; allowed: 2 or more"),
        ("context: 16", "chunks: 0", "9: experiments.0.corpus.chunks: found 0; allowed: 1 or more"),
        ("context: 16", "contxt: 16", "9: experiments.0.corpus.contxt: unknown field"),
        ("context: 16\n", "context: 16\n    prompts: a\n", "10: experiments.0.prompts: found a corpus beside it"),
        ("context: 16\n", "context: 16\n    features: 1\n", "10: experiments.0.features: is for injection"),
        ("context: 16\n", "context: 16\n  - {kind: knockout, layers: 0}\n", "1: prompts is missing"),
        ("context: 16\n", "context: 16\nprompts: []\n", None),
        ("context: 16\n", "context: 16\n  - {kind: sae, measure: ablation}\nprompts: []\n", "11: prompts: found"),
    ],
)  # fmt: skip
def test_errors_in_experiments_with_autoencoders(old: str, new: str, expected: str | None, folder: Path) -> None:
    assert old in SAES
    text = SAES.replace(old, new, 1)
    if expected is None:
        assert load(folder, text).prompts == ()
        return
    with pytest.raises(UserError) as error:
        load(folder, text)
    [only] = str(error.value).splitlines()
    assert f"job.yaml:{expected}" in only


def test_errors_in_a_corpus_name_its_own_lines(folder: Path) -> None:
    (folder / "texts" / "c.jsonl").write_text('{"text": "one"}\n{"txt": "two"}')
    with pytest.raises(UserError, match=r"texts/c\.jsonl:2: text is missing \(did you mean 'txt'\?\)"):
        load(folder, SAES)


def test_what_an_injection_names_has_to_be_in_the_prompts(tmp_path: Path) -> None:
    injection = "kind: sae\n    measure: injection\n    features: 3\n    strengths: [5, 50.0]\n    positions: subject"
    text = PLAIN.replace("kind: knockout\n    layers: all", injection)
    job = load(tmp_path, text)
    assert job.pieces == {"subject"}
    assert job.sae_experiments[0].strengths == (5.0, 50.0)
    with pytest.raises(UserError, match=r"job\.yaml:12: experiments\.0\.positions: found 'text:Spain', which prompt"):
        load(tmp_path, text.replace("positions: subject", "positions: {text: Spain}"))
    with pytest.raises(UserError, match=r"job\.yaml:13: experiments\.0\.prompts: found 'x', which matches"):
        load(tmp_path, text + "    prompts: x\n")


def test_prompts_and_chunks_are_told_apart(folder: Path) -> None:
    text = SAES + "  - {kind: knockout, layers: 0}\nprompts:\n  - {id: a, text: a}\n"
    job = load(folder, text)
    [quality, knockout], [corpus] = job.experiments, job.corpora
    chunk = f"{corpus.id}/000000"
    assert [job.chooses(spec, text) for spec in (quality, knockout) for text in ("a", chunk)] == [
        False, True, True, False,
    ]  # fmt: skip
    with pytest.raises(
        UserError, match=r"job\.yaml:12: prompts\.0: found the id '.*/000000', which is that of a corpus"
    ):
        load(folder, text.replace("id: a", f"id: {chunk}"))


def test_experiments_on_the_same_texts_share_them(folder: Path) -> None:
    more = "  - {kind: sae, measure: features, corpus: {file: texts/c.jsonl, context: %s}}\n"
    assert len(load(folder, SAES + more % 16).corpora) == 1
    assert len(load(folder, SAES + more % 8).corpora) == 2

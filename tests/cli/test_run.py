"""`raymi run` in this process, on tiny models: what a job gives, what is done again, and what is said of mistakes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest
import torch

import raymi.store
from raymi.cli.main import main
from raymi.model.loading import BadWeights
from raymi.report import tables
from tests.fakes import LLAMA, add_model, llama_shapes, safetensors
from tests.families import save

PARIS = "{id: paris, text: The capital of France is, answer: ' Paris'}"
ROME = "{id: rome, text: The capital of Italy is, answer: ' Rome'}"
JOB = """
name: small
models: {models}
prompts: [{prompts}]
experiments:
  - {{kind: knockout, name: heads, layers: {{each: all}}, heads: {{each: all}}, queries: last, keys: first}}
unit_ablations: 4
verify: 1
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take longer by two threads, and much longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_job()
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`raymi run job.yaml --inline` with further arguments, in this process."""

    def run(*arguments: str, job: str = "job.yaml") -> Said:
        fixed = ["raymi", "run", job, "--inline", "--store", "store", "--cache-dir", "cache"]
        monkeypatch.setattr(sys, "argv", [*fixed, *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        return Said(int(exit.value.code or 0), *capfd.readouterr())

    return run


def write_job(models: str = "org/*", prompts: Sequence[str] = (PARIS,), more: str = "") -> None:
    Path("job.yaml").write_text(JOB.format(models=models, prompts=", ".join(prompts)) + more)


def rows(table: str = "ablations") -> pl.DataFrame:
    return raymi.store.open("store").scan(table).collect()


def test_a_job_gives_a_row_for_every_cell_and_everything_else_there_is_to_know(run: Run):
    add_model(Path("cache"), "org/one")
    said = run()
    assert said.code == 0, said.err
    assert rows().height == 2 * 4
    assert rows()["ablation_id"].n_unique() == 8
    [model] = rows("models").to_dicts()
    assert (model["model_id"], model["n_layers"], model["n_heads"], model["status"]) == ("org/one", 2, 4, "loaded")
    assert json.loads(model["capability"])["noise"] >= 0
    [prompt] = rows("prompts").to_dicts()
    assert (prompt["prompt_id"], prompt["answer_token"]) == ("paris", "Paris")
    named = set(rows()["changed"].explode().struct.field("token_id")) | set(rows()["top1_clean"])
    assert named <= set(rows("vocabulary")["token_id"])
    assert rows("vocabulary")["token_id"].is_unique().all()
    assert rows("verifications")["passed"].all()
    assert rows("failures").is_empty()
    assert {"start", "loaded", "done", "stop"} <= set(rows("events")["kind"])
    [manifest] = raymi.store.open("store").runs()
    assert manifest.status == "done"
    assert "org/one" in said.out
    assert said.out.rstrip().endswith(f"raymi report {manifest.run} --store store")


def test_a_finished_run_does_nothing(run: Run, monkeypatch: pytest.MonkeyPatch):
    add_model(Path("cache"), "org/one")
    run()
    before = rows()
    monkeypatch.setattr("raymi.cluster.sweep._backend", None)  # not even asked for
    said = run()
    assert said.code == 0
    assert "nothing to do" in said.out
    assert rows().equals(before)


def test_an_added_prompt_and_an_added_model_bring_only_their_rows(run: Run):
    add_model(Path("cache"), "org/one")
    run()
    first = rows()
    write_job(prompts=[ROME, PARIS])
    said = run()
    assert said.code == 0, said.err
    assert rows().height == 16
    assert set(first["unit_id"]) < set(rows()["unit_id"])
    add_model(Path("cache"), "org/two")
    said = run()
    assert "org/one: 16 stored before, done" in said.err
    assert rows().height == 32
    assert rows("models").height == 3  # two loads of the first: one for each of its prompts
    assert rows()["ablation_id"].n_unique() == 32


def test_units_are_the_same_however_prompts_came_and_went(run: Run):
    add_model(Path("cache"), "org/one")
    write_job(prompts=[PARIS, ROME], more="")
    run("--set", "unit_ablations=6")  # a unit with both prompts
    both = set(rows()["unit_id"])
    write_job(prompts=[PARIS])
    said = run("--set", "unit_ablations=6")
    assert "nothing to do" in said.out
    assert set(rows()["unit_id"]) == both


def test_a_prompt_that_no_model_could_take_is_not_held_against_the_run(run: Run):
    add_model(Path("cache"), "org/one")
    long = "{id: long, text: " + " ".join(["the"] * 100) + "}"
    write_job(prompts=[PARIS, long])
    said = run()
    assert said.code == 1
    assert "more than the model's context" in said.err
    write_job(prompts=[PARIS])
    assert run().code == 0
    assert rows().height == 8


def test_a_prompt_may_not_become_another(run: Run):
    add_model(Path("cache"), "org/one")
    run()
    write_job(prompts=[PARIS.replace("France", "Peru")])
    said = run()
    assert said.code == 2
    assert "'paris' is not what it was" in said.err
    assert "--new" in said.err
    assert run("--new").code == 0
    names = [manifest.run for manifest in raymi.store.open("store").runs()]
    assert names[1] == f"{names[0]}-2"
    assert "nothing to do" in run().out, "without --new the newest run goes on"


def test_commits_do_not_move_under_a_run(run: Run):
    add_model(Path("cache"), "org/one", revision="1" * 40)
    run()
    write_job(prompts=[PARIS, ROME])
    add_model(Path("cache"), "org/one", revision="2" * 40)  # refs/main now points here
    assert run().code == 0
    assert set(rows()["revision"]) == {"1" * 40}
    assert run("--new").code == 0
    assert set(rows()["revision"]) == {"1" * 40, "2" * 40}


def test_a_commit_that_is_gone_fails_the_model_by_name(run: Run):
    import shutil

    add_model(Path("cache"), "org/one", revision="1" * 40)
    add_model(Path("cache"), "org/two")
    run()
    shutil.rmtree("cache/models--org--one")
    add_model(Path("cache"), "org/one", revision="2" * 40)
    write_job(prompts=[PARIS, ROME])
    said = run()
    assert said.code == 1
    assert "the run has it at commit 111111111111" in said.out
    assert rows().filter(model_id="org/two").height == 16


def test_a_commit_that_is_gone_is_not_called_an_empty_cache(run: Run):
    import shutil

    add_model(Path("cache"), "org/one", revision="1" * 40)
    run()
    shutil.rmtree("cache/models--org--one")
    add_model(Path("cache"), "org/one", revision="2" * 40)
    said = run()
    assert said.code == 2
    assert "org/one: the run has it at commit 111111111111" in said.err
    assert "--new" in said.err


def test_one_bad_model_stops_no_other_and_is_tried_again_when_it_is_mended(run: Run):
    add_model(Path("cache"), "org/bad")
    add_model(Path("cache"), "org/good")
    weights = Path("cache/models--org--bad/snapshots").glob("*/model.safetensors")
    [file] = weights
    header = file.read_bytes()[: -len(file.read_bytes()) // 3]
    file.resolve().write_bytes(header.replace(b"q_proj", b"p_proj") + bytes(len(file.read_bytes()) - len(header)))
    said = run()
    assert said.code == 1
    assert "org/bad" in said.out.partition("failed:")[2]
    [failure] = rows("failures").to_dicts()
    assert (failure["model_id"], failure["stage"], failure["kind"]) == ("org/bad", "load", BadWeights.__name__)
    assert rows()["model_id"].unique().to_list() == ["org/good"]
    file.resolve().write_bytes(safetensors(llama_shapes()))
    said = run()
    assert said.code == 0, said.err
    assert rows().height == 16
    assert rows("models").filter(model_id="org/good").height == 1


def test_tensors_beyond_the_config_fail_the_model_by_name_unless_it_may_leave_them_out(run: Run):
    add_model(Path("cache"), "org/deep", tensors=llama_shapes(LLAMA | {"num_hidden_layers": 3}))
    refused = run()
    assert refused.code == 1
    assert "model.layers.2.input_layernorm.weight" in refused.err + refused.out
    assert rows().is_empty()
    said = run("--allow-unused", "org/deep")
    assert said.code == 0
    [model] = rows("models").to_dicts()
    assert "model.layers.2.mlp.up_proj.weight" in model["unused"]
    assert f"org/deep: measured without {len(model['unused'])} tensors that its weights hold" in " ".join(
        said.out.split()
    )
    assert len(rows()) == 8
    assert run().code == 0  # all is done


def test_a_unit_that_fails_is_tried_again_then_named_and_again_by_the_next_command(run: Run, monkeypatch):
    from raymi.experiments.knockout import run as measure

    add_model(Path("cache"), "org/one")
    once = measure.measure
    secret = "hf_" + "x" * 30
    monkeypatch.setenv("HF_TOKEN", secret)

    def fails_on_layer_1(setting, spec, unit):
        if unit.items[0][1][0].layers == (1,):
            raise ValueError(f"NaN, says {secret}")
        return once(setting, spec, unit)

    monkeypatch.setattr(measure, "measure", fails_on_layer_1)
    said = run()
    assert said.code == 1
    assert rows().height == 4
    assert rows("failures")["attempt"].to_list() == [1, 2]
    assert "1 unit: ValueError" in said.out
    everything = said.out + said.err + "".join(rows("failures")["message"]) + "".join(rows("failures")["traceback"])
    assert secret not in everything
    assert secret not in Path("store").joinpath("runs").rglob("*.json").__next__().read_text()
    monkeypatch.setattr(measure, "measure", once)
    assert run().code == 0
    assert rows().height == 8


def test_numbers_that_do_not_agree_fail_the_model(run: Run, monkeypatch):
    from raymi.experiments.knockout import run as measure

    add_model(Path("cache"), "org/one")
    honest = measure.verify
    monkeypatch.setattr(
        measure, "verify", lambda *a, **k: [r | {"passed": False, "max_logit_diff": 0.5} for r in honest(*a, **k)]
    )
    said = run()
    assert said.code == 1
    assert "differ from full forwards" in said.err
    assert rows().is_empty()


@pytest.fixture
def wrong_cone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cone that goes wrong once a model has been loaded, from the second ablation of a batch on: no clean row, and
    no ablation that is measured alone, would show it."""
    from raymi.cluster.worker import Worker
    from raymi.model.cone import Cone

    honest = Cone._unembed

    def off(self, hidden_AD, returned):
        logits_AV = honest(self, hidden_AD, returned)
        logits_AV[2:, 3] += 0.25
        return logits_AV

    verify = Worker._verify

    def after_the_load(self, engine):
        monkeypatch.setattr(Cone, "_unembed", off)
        return verify(self, engine)

    monkeypatch.setattr(Worker, "_verify", after_the_load)


def test_verification_finds_a_cone_that_went_wrong(run: Run, wrong_cone: None):
    add_model(Path("cache"), "org/one", scale=20)
    said = run("--set", "verify=8")
    assert said.code == 1
    assert "differ from full forwards" in said.err
    assert "by up to 2.5e-01" in said.err.replace("\n", " ")
    assert rows().is_empty()
    verified = rows("verifications")
    assert verified.height == 8
    assert not verified["passed"].all()
    [differed] = tables.report(raymi.store.open("store")).mismatches.rows(named=True)
    assert (differed["engine"], differed["then"], differed["verified"]) == ("cone", "failed", 8)


def test_a_wrong_cone_gives_way_to_full_forwards_when_the_job_says_so(run: Run, wrong_cone: None):
    add_model(Path("cache"), "org/one", scale=20)
    assert run("--set", "on_mismatch=full", "--set", "verify=8").code == 0
    assert rows()["engine"].unique().to_list() == ["full"]
    first, second = (rows("verifications").filter(engine=engine)["passed"] for engine in ("cone", "full"))
    assert len(first) == len(second) == 8
    assert not first.all()
    assert second.all()
    report = tables.report(raymi.store.open("store"))
    assert report.models.select("engine", "verified", "agreed").rows() == [("full", 8, 8)]
    [differed] = report.mismatches.rows(named=True)
    assert (differed["engine"], differed["then"], differed["verified"]) == ("cone", "full", 8)
    assert differed["differed"] == (~first).sum()


def test_full_forwards_that_are_wrong_too_fail_the_model_all_the_same(run: Run, wrong_cone: None, monkeypatch):
    from raymi.cluster.worker import Worker
    from raymi.model.full import Full

    honest, verify = Full.measure, Worker._verify

    def off(self, cells, indices):
        for batch in honest(self, cells, indices):
            yield batch._replace(ablated_AV=batch.ablated_AV + 0.125)

    def after_the_load(self, engine):
        monkeypatch.setattr(Full, "measure", off)
        return verify(self, engine)

    monkeypatch.setattr(Worker, "_verify", after_the_load)
    add_model(Path("cache"), "org/one", scale=20)
    said = run("--set", "on_mismatch=full", "--set", "verify=8")
    assert said.code == 1
    assert "8 of 8 verified ablations differ" in said.err.replace("\n", " ")
    assert rows().is_empty()
    assert rows("verifications")["engine"].value_counts(sort=True).rows() == [("cone", 8), ("full", 8)]


def test_what_the_cone_cannot_serve_takes_full_forwards_and_is_told(run: Run, monkeypatch):
    """One sweep that is not exact, though all was when the model was loaded."""
    from raymi.cluster.worker import Worker
    from raymi.model.cone import Cone, NotClean

    add_model(Path("cache"), "org/one", scale=20)
    assert run().code == 0
    fast = rows().sort("ablation_id")
    honest, measure_unit = Cone.measure, Worker._measure

    def not_clean(self, cells, indices):
        monkeypatch.setattr(Cone, "measure", honest)
        raise NotClean("the experts went another way")

    def first_goes_wrong(self, unit):
        monkeypatch.setattr(Cone, "measure", not_clean)
        monkeypatch.setattr(Worker, "_measure", measure_unit)
        return measure_unit(self, unit)

    monkeypatch.setattr(Worker, "_measure", first_goes_wrong)
    assert run("--new").code == 0
    [message] = rows("events").filter(kind="full")["message"]
    assert message.startswith("unit ")
    assert message.endswith(": NotClean: the experts went another way")
    mixed = rows().filter(pl.col("run") != fast["run"][0]).sort("ablation_id")
    assert mixed["engine"].value_counts().sort("engine").rows() == [("cone", 4), ("full", 4)]
    assert ((fast["kl"] - mixed["kl"]).abs() / fast["kl"].clip(1.0)).max() < 1e-6


def test_the_slow_way_on_request_gives_the_same_rows(run: Run):
    add_model(Path("cache"), "org/one", scale=20)
    assert run().code == 0
    fast = rows().sort("ablation_id")
    assert run("--new", "--engine", "full").code == 0
    slow = rows().filter(engine="full").sort("ablation_id")
    assert fast["engine"].unique().to_list() == ["cone"]
    assert fast["ablation_id"].equals(slow["ablation_id"])
    # Weights twenty times as large as usual: some answers are thousands of nats away, and float32 has seven digits.
    assert ((fast["kl"] - slow["kl"]).abs() / slow["kl"].clip(1.0)).max() < 1e-6
    assert fast["kl"].max() > 1e-6


def test_models_that_cannot_run_are_skipped_or_fail_by_how_they_were_asked_for(run: Run):
    add_model(Path("cache"), "org/fine")
    add_model(Path("cache"), "org/silent", tokenizer=False)
    said = run()
    assert said.code == 0
    assert "skipped org/silent" in said.err
    write_job(models="[org/fine, org/silent]")
    said = run()
    assert said.code == 1
    assert "org/silent" in said.out
    assert rows("failures")["stage"].to_list() == ["select"]


def test_options_win_over_the_job(run: Run):
    add_model(Path("cache"), "org/one")
    add_model(Path("cache"), "org/two")
    assert run("--models", "org/two", "--device", "cpu", "--set", "dtype=bfloat16").code == 0
    assert rows()["model_id"].unique().to_list() == ["org/two"]
    assert rows()["dtype"].unique().to_list() == ["bfloat16"]


def test_a_rehearsal_says_what_would_be_done_and_does_nothing(run: Run):
    add_model(Path("cache"), "org/one")
    add_model(Path("cache"), "org/large", LLAMA | {"num_hidden_layers": 4},
              tensors=llama_shapes(LLAMA | {"num_hidden_layers": 4}))  # fmt: skip
    said = run("--dry-run")
    assert said.code == 0, said.err
    assert not Path("store").exists()
    lines = {line.split()[0]: line.split()[1:] for line in said.out.splitlines() if line.startswith("org/")}
    assert lines["org/one"][:2] == ["2", "8"]
    assert lines["org/large"][:2] == ["4", "16"]
    run()
    assert "-" in next(line for line in run("--dry-run").out.splitlines() if line.startswith("org/one")).split()


def test_a_rehearsal_names_the_models_that_the_run_would_fail(run: Run):
    add_model(Path("cache"), "org/one")
    add_model(Path("cache"), "org/large", LLAMA | {"num_hidden_layers": 4},
              tensors=llama_shapes(LLAMA | {"num_hidden_layers": 4}))  # fmt: skip
    said = run("--dry-run", "--set", "experiments.0.layers=3")
    assert said.code == 1
    assert "cannot run: org/one: experiment 'heads': layers: 3 is out of range" in said.err
    assert "org/large" in said.out


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        ({"models": "org/none"}, [], "no model 'org/none'"),
        ({"models": "none/*"}, [], "no model to run"),
        ({"prompts": ["{text: 5 }"]}, [], "job.yaml"),
        ({"more": "unit_ablation: 3\n"}, [], "unit_ablations"),
        ({}, ["--set", "dtype=float33"], "float32"),
        ({}, ["--device", "gpu"], "Error: --device: found 'gpu'; allowed: auto, cpu, mps, cuda or cuda:1"),
        ({}, ["--device", "cuda:77"], "device: found 'cuda:77'; there is here: auto, cpu"),
        ({}, ["--store", "job.yaml"], "is a file"),
        ({"prompts": [PARIS.replace("is,", "nothing,")]}, ["--set", "experiments.0.queries=99"], "out of range"),
    ],
)
def test_mistakes_have_exit_code_2_or_fail_the_model_by_name(run: Run, change, arguments, says):
    add_model(Path("cache"), "org/one")
    write_job(**change)
    said = run(*arguments)
    assert said.code == (1 if "99" in str(arguments) else 2)
    assert says in said.err
    assert "Traceback" not in said.err


def test_a_missing_job_file_is_a_mistake(run: Run):
    said = run(job="nothing.yaml")
    assert said.code == 2
    assert "nothing.yaml" in said.err


def test_an_unwritable_store_is_a_mistake(run: Run):
    add_model(Path("cache"), "org/one")
    Path("blocked").write_text("")
    said = run("--store", "blocked/store")
    assert said.code == 2
    assert "blocked" in said.err


def test_a_ray_client_address_is_refused_with_a_hint(folder: Path):
    add_model(Path("cache"), "org/one")
    arguments = ["run", "job.yaml", "--cache-dir", "cache", "--store", "store", "--address", "ray://head:10001"]
    process = subprocess.run(
        [sys.executable, "-m", "raymi", *arguments], capture_output=True, text=True, env=os.environ
    )
    assert process.returncode == 2
    assert "ray job submit" in process.stderr
    assert not Path("store").exists()


def test_a_second_driver_is_refused(run: Run):
    add_model(Path("cache"), "org/one")
    run()
    store = raymi.store.open("store")
    [manifest] = store.runs()
    write_job(prompts=[PARIS, ROME])
    with store.take(manifest.run, written="", resolved=manifest.jobs[0].resolved):
        said = run()
    assert said.code == 2
    assert "is being driven by" in said.err


def test_handlers_are_put_back(run: Run):
    add_model(Path("cache"), "org/one")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# -- models in which only some layers have attention -------------------------------------------------------------------


def test_all_layers_of_a_hybrid_are_those_that_have_attention(run: Run):
    save("lfm2", Path("cache"), "org/hybrid")
    windows = "  - {kind: knockout, name: windows, layers: {window: 2}, keys: first}\n"
    Path("job.yaml").write_text(Path("job.yaml").read_text().replace("unit_ablations", f"{windows}unit_ablations"))
    said = run("--set", "verify=6")
    assert said.code == 0, said.err
    heads = rows().filter(pl.col("experiment") == "heads")
    assert sorted(heads.select("layer", "head").rows()) == [(layer, head) for layer in (1, 4) for head in range(4)]
    assert sorted(rows().filter(pl.col("experiment") == "windows")["layers"].to_list()) == [[1], [1, 4]]
    assert rows()["engine"].unique().to_list() == ["layers"]
    assert rows().filter(pl.col("kl") > 0).height == rows().height
    assert rows("failures").is_empty()
    assert rows("verifications").height == 6
    assert rows("verifications")["passed"].all()


def test_a_rehearsal_counts_the_layers_that_have_attention(run: Run):
    save("lfm2", Path("cache"), "org/hybrid")
    add_model(Path("cache"), "org/one")
    said = run("--dry-run")
    assert said.code == 0, said.err
    lines = {line.split()[0]: line.split()[1:] for line in said.out.splitlines() if line.startswith("org/")}
    assert lines["org/one"][:2] == ["2", "8"]
    assert lines["org/hybrid"][:2] == ["2", "8"]  # two of six layers, four heads
    said = run("--dry-run", "--set", "experiments.0.layers=1", "--set", "experiments.0.heads=all")
    assert [line.split()[2] for line in said.out.splitlines() if line.startswith("org/")] == ["1", "1"]


def test_a_layer_that_has_no_attention_fails_the_models_where_it_has_none(run: Run):
    save("lfm2", Path("cache"), "org/hybrid")
    add_model(Path("cache"), "org/one")
    said = run("--set", "experiments.0.layers=0")
    assert said.code == 1
    assert rows()["model_id"].unique().to_list() == ["org/one"]
    [failure] = rows("failures").to_dicts()
    assert (failure["model_id"], failure["stage"]) == ("org/hybrid", "select")
    assert failure["message"] == "experiment 'heads': layers: 0 has no attention to cut; layers 1, 4 have"


def test_a_config_that_was_misunderstood_fails_the_model_in_words(run: Run, monkeypatch: pytest.MonkeyPatch):
    save("lfm2", Path("cache"), "org/hybrid")
    for misread, understood in ((None, "all layers"), ((1,), "layers 1")):
        monkeypatch.setattr("raymi.snapshot.attention_layers", lambda *_, misread=misread: misread)
        said = run("--new")
        assert said.code == 1
        assert rows().is_empty()
        message = rows("failures")["message"][-1]
        assert f"'heads': layers: config.json was understood to say that {understood} have attention" in message
        assert "in the loaded model it is layers 1, 4 that have" in message
    monkeypatch.setattr("raymi.snapshot.attention_layers", lambda *_: None)
    assert run("--new", "--set", "experiments.0.layers=[1, 4]").code == 0
    assert sorted(rows()["layer"].unique()) == [1, 4]


def test_a_plan_that_cuts_closed_edges_is_warned_of(run: Run):
    window = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 2}
    add_model(Path("cache"), "org/window", {**LLAMA, **window})
    for arguments in (("--dry-run",), ()):
        said = run(*arguments)
        assert said.code == 0, said.err
        assert "org/window: warning: experiment 'heads': of 8 ablations 8 cut nothing" in said.err
    assert rows().select("fired", "closed").rows() == [(0, 1)] * 8

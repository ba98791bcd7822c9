"""`raymi sae run` in this process, on a tiny model and autoencoders made for it; what it asks, and what it refuses."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
import torch
import yaml

import raymi.store
from raymi.cli.main import main
from raymi.cli.sae_question import Question, job_of
from raymi.errors import UserError
from raymi.experiments.sae.spec import SaeSpec
from tests.fakes import LLAMA, add_files, add_model, safetensors

ASKED = {
    "measures": ("quality",),
    "corpus": None,
    "context": None,
    "chunks": None,
    "prompt": None,
    "answer": None,
    "prompt_set": None,
    "features": (),
    "strengths": (),
    "skip_first": None,
    "device": None,
}
WORDS = "The capital of France is Paris and the capital of Italy is Rome"


class Said(NamedTuple):
    code: int
    out: str
    err: str


Raymi = Callable[..., Said]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take longer by two threads, and much longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a cache with a model and its autoencoder, and a corpus."""
    monkeypatch.chdir(tmp_path)
    add_model(Path("cache"), "org/one", scale=0.5)
    add_sae("org/sae")
    Path("corpus.txt").write_text(" ".join([WORDS] * 10))
    return tmp_path


@pytest.fixture
def raymi_(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Raymi:
    """`raymi ... --cache-dir cache`, in this process; runs keep their rows in `store` and go without Ray."""

    def call(*arguments: str) -> Said:
        run = ["--inline", "--store", "store"] if "run" in arguments else []
        monkeypatch.setattr(sys, "argv", ["raymi", *arguments, *run, "--cache-dir", "cache"])
        with pytest.raises(SystemExit) as exit:
            main()
        return Said(int(exit.value.code or 0), *capfd.readouterr())

    return call


def add_sae(id: str, *, model: str | None = "one", site: str = "blocks.1.hook_resid_post", width: int = 16) -> None:
    """Puts an autoencoder with 24 features into the cache."""
    config: dict[str, Any] = {
        "architecture": "standard",
        "d_in": width,
        "d_sae": 24,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": site, **({"model_name": model} if model else {})},
    }
    shapes = {"W_enc": (width, 24), "W_dec": (24, width), "b_enc": (24,), "b_dec": (width,)}
    add_files(Path("cache"), id, {"cfg.json": config, "sae_weights.safetensors": safetensors(shapes, scale=0.1)})


def rows(table: str) -> pl.DataFrame:
    return raymi.store.open("store").scan(table).collect()


def question(**asked: Any) -> Question:
    return Question(**{**ASKED, **asked})


ALL_FOUR = (
    *("--measure", "quality", "--measure", "features", "--measure", "injection", "--measure", "ablation"),
    *("--corpus", "corpus.txt", "--context", "12", "--chunks", "4", "--skip-first", "1"),
    *("--prompt", "The capital of France is", "--answer", " Paris"),
    *("--feature", "3", "--feature", "5", "--strength", "4", "--strength", "-4"),
)


def test_all_four_measures_come_from_one_command(raymi_: Raymi) -> None:
    said = raymi_("sae", "run", "org/sae", *ALL_FOUR)
    assert said.code == 0, said.err
    quality = rows("sae_quality")
    assert (quality["tokens"].sum(), quality["texts"].sum()) == (4 * 11, 4)
    assert rows("sae_features")["position"].min() == 1
    assert rows("sae_features").height == 4 * 11
    injections = rows("sae_injections")
    assert sorted(injections.select("feature", "strength").rows()) == [(3, -4.0), (3, 4.0), (5, -4.0), (5, 4.0)]
    assert injections["kl"].min() > 0
    active = rows("sae_ablations")
    assert active["feature"].drop_nulls().is_unique().all()
    assert active.height > 0
    assert {row["model_id"] for row in rows("saes").to_dicts()} == {"org/one"}
    assert rows("ablations").is_empty()
    for experiment in ("quality", "features", "injection", "ablation"):
        assert f"\n{experiment}: " in said.out
    assert "logit diff of the answer, clean - ablated" not in said.out
    assert said.out.rstrip().endswith("--store store")


def test_the_same_command_goes_on_and_another_prompt_is_another_run(raymi_: Raymi) -> None:
    asked = ("sae", "run", "org/sae", "--measure", "injection", "--feature", "3", "--strength", "4")
    assert raymi_(*asked, "--prompt", "The capital of France is").code == 0
    said = raymi_(*asked, "--prompt", "The capital of France is")
    assert (said.code, rows("sae_injections").height) == (0, 1)
    assert "nothing to do" in said.out
    assert raymi_(*asked, "--prompt", "The capital of Italy is").code == 0
    assert rows("sae_injections")["run"].n_unique() == 2


def test_the_manifest_holds_a_job_that_gives_the_same_run(raymi_: Raymi) -> None:
    assert raymi_("sae", "run", "org/sae", "--corpus", "corpus.txt", "--context", "12").code == 0
    (manifest,) = raymi.store.open("store").runs()
    Path("sae.yaml").write_text(manifest.jobs[0].written)
    said = raymi_("sae", "run", "sae.yaml")
    assert said.code == 0
    assert f"{manifest.run}: nothing to do" in said.out


def test_a_job_file_is_run_as_raymi_run_does(raymi_: Raymi) -> None:
    job = {
        "name": "both",
        "prompts": [{"id": "paris", "text": "The capital of France is", "answer": " Paris"}],
        "experiments": [
            {"kind": "knockout", "layers": "all", "heads": "all", "queries": "last", "keys": "first"},
            {"kind": "sae", "measure": "injection", "saes": "org/sae", "features": 3, "strengths": 4.0},
        ],
        "verify": 1,
    }
    Path("both.yaml").write_text(yaml.safe_dump(job))
    said = raymi_("sae", "run", "both.yaml", "--model", "org/one")
    assert said.code == 0, said.err
    assert (rows("ablations").height, rows("sae_injections").height) == (2, 1)
    said = raymi_("run", "both.yaml", "--models", "org/one")
    assert "nothing to do" in said.out
    said = raymi_("sae", "run", "both.yaml", "--measure", "quality")
    assert said.code == 2
    assert "--measure: it is both.yaml that says what is measured" in said.err
    assert "allowed: one job file, or SAEs" in raymi_("sae", "run", "both.yaml", "org/sae").err


def write_sweep(saes: str, *more: dict[str, Any]) -> None:
    quality = {"kind": "sae", "measure": "quality", "saes": saes, "corpus": {"file": "corpus.txt", "context": 12}}
    prompts = [{"id": "paris", "text": "The capital of France is", "answer": " Paris"}] if more else []
    job = {"name": "sweep", "models": "org/*", "experiments": [*more, quality], "verify": 4}
    Path("sweep.yaml").write_text(yaml.safe_dump({**job, **({"prompts": prompts} if prompts else {})}))


KNOCKOUT = {"kind": "knockout", "layers": "all", "heads": "all", "queries": "last", "keys": "first"}


def test_models_without_an_sae_have_their_knockouts_and_a_note(raymi_: Raymi) -> None:
    # Nor does it matter that the texts are too long for it.
    add_model(Path("cache"), "org/two", LLAMA | {"max_position_embeddings": 8}, scale=0.5)
    write_sweep("org/s*", KNOCKOUT)
    said = raymi_("run", "sweep.yaml")
    assert said.code == 0, said.err
    assert sorted(rows("ablations")["model_id"].unique()) == ["org/one", "org/two"]
    assert rows("sae_quality")["model_id"].unique().to_list() == ["org/one"]
    assert rows("verifications").filter(model_id="org/two").height == 2  # there are no more, and none is drawn twice
    assert "org/two: quality: no SAE in the cache that matches 'org/s*' fits this model" in said.out
    said = raymi_("run", "sweep.yaml")
    assert (said.code, "nothing to do" in said.out) == (0, True)


@pytest.mark.parametrize(
    ("saes", "others", "failed", "says"),
    [
        ("org/s*", (), {"org/two"}, "no SAE in the cache that matches 'org/s*' fits this model"),
        ("org/sae", (KNOCKOUT,), {"org/two"}, "was trained on one, not on org/two"),
        ("none/*", (KNOCKOUT,), {"org/one", "org/two"}, "no SAE in the cache matches 'none/*'"),
        ("org/wide", (KNOCKOUT,), {"org/one", "org/two"}, "takes 20 numbers"),
        ("*wide", (KNOCKOUT,), {"org/one"}, "takes 20 numbers"),
    ],
    ids=["nothing else to measure", "named, of another model", "matches nothing", "too wide", "its own too wide"],
)
def test_models_fail_by_name_where_nothing_was_found_that_had_to_be(
    raymi_: Raymi, saes: str, others: Any, failed: set[str], says: str
) -> None:
    add_model(Path("cache"), "org/two", scale=0.5)
    add_sae("org/wide", width=20)
    write_sweep(saes, *others)
    said = raymi_("run", "sweep.yaml")
    assert said.code == 1
    assert says in " ".join(said.out.split())
    assert set(rows("failures")["model_id"]) == failed


def test_a_rehearsal_measures_nothing(raymi_: Raymi) -> None:
    said = raymi_("sae", "run", "org/sae", "--corpus", "corpus.txt", "--context", "12", "--chunks", "4", "--dry-run")
    assert said.code == 0, said.err
    (line,) = [line.split() for line in said.out.splitlines() if line.startswith("org/one")]
    assert line[2] == "4"
    assert not Path("store").exists()


def test_without_a_model_each_sae_brings_its_own(raymi_: Raymi) -> None:
    add_model(Path("cache"), "org/two", scale=0.5)
    add_model(Path("cache"), "else/one", LLAMA | {"num_hidden_layers": 1})
    add_sae("org/of-two", model="org/two")
    prompt = ("--prompt", "The capital of France is")
    assert raymi_("sae", "run", "org/of-two", *prompt).code == 0
    assert rows("sae_quality")["model_id"].to_list() == ["org/two"]
    assert raymi_("sae", "run", "org/of-*", "--measure", "features", *prompt).code == 0
    assert rows("sae_features")["model_id"].unique().to_list() == ["org/two"]


@pytest.mark.parametrize(
    ("sae", "model", "says"),
    [
        ("org/none", None, "no repository 'org/none'"),
        ("none/*", None, "none/*: matches no SAE in the cache"),
        ("org/far", None, "was trained on gemma, which is not in the cache"),
        ("org/silent", None, "its files do not say which model it belongs to"),
        ("org/sae", "org/none", "no model 'org/none'"),
    ],
)
def test_what_is_not_there_is_named(raymi_: Raymi, sae: str, model: str | None, says: str) -> None:
    add_sae("org/far", model="gemma")
    add_sae("org/silent", model=None)
    said = raymi_("sae", "run", sae, "--prompt", "The capital", *(("--model", model) if model else ()))
    assert said.code == 2
    assert says in said.err
    assert "Traceback" not in said.err


def test_a_named_sae_that_does_not_fit_fails_the_model_by_name(raymi_: Raymi) -> None:
    add_sae("org/wide", width=20)
    said = raymi_("sae", "run", "org/wide", "--prompt", "The capital of France is")
    assert said.code == 1
    assert "this SAE takes 20 numbers" in said.err + said.out


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "there is no text to measure quality on"),
        ({"measures": ("ablation",), "corpus": Path("c.txt")}, "--corpus is for quality and features"),
        ({"corpus": Path("c.txt"), "prompt": "x"}, "--prompt: quality is measured on the corpus"),
        ({"measures": ("quality", "injection"), "corpus": Path("c.txt")}, "no text to measure injection on"),
        ({"prompt": "x", "prompt_set": "ioi"}, "allowed: one of the two"),
        ({"prompt": "x", "features": (1,)}, "--feature is for --measure injection"),
        ({"prompt": "x", "strengths": (1.0,)}, "--strength is for --measure injection"),
        ({"prompt": "x", "context": 4}, "--context is for --corpus"),
        ({"prompt_set": "ioi", "answer": " y"}, "--answer is for --prompt"),
        ({"measures": ("injection",), "prompt": "x", "skip_first": 1}, "--skip-first says which tokens count"),
        ({"measures": ("injection",), "prompt": "x", "features": (1,)}, "--strength: found nothing"),
        ({"measures": ("injection",), "prompt": "x", "strengths": (1.0,)}, "--feature: found nothing"),
        ({"measures": ("injection",), "prompt": "x", "strengths": (1.0,), "features": (-1,)}, "--feature: found -1"),
        ({"prompt": " "}, "--prompt: found an empty prompt"),
        ({"prompt": "x", "answer": ""}, "--answer: found ''"),
        ({"prompt": "x", "device": "gpu"}, "--device: found 'gpu'"),
        ({"prompt": "x", "skip_first": -1}, "--skip-first: found -1"),
        ({"corpus": Path("none.txt")}, "--corpus: there is no file 'none.txt'"),
        ({"corpus": Path(__file__)}, "--corpus: found"),
        ({"corpus": Path("corpus.txt"), "context": 1}, "--context: found 1"),
    ],
)
def test_options_that_make_no_sense_are_named(folder: Path, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        job_of(question(**asked).data(["org/sae"], ["org/one"]))
    assert says in str(error.value)


def test_prompts_are_for_those_that_a_corpus_is_not_for(folder: Path) -> None:
    asked = question(
        measures=("quality", "ablation"), corpus=Path("corpus.txt"), context=16, prompt_set="capitals", skip_first=2
    )
    quality, ablation = job_of(asked.data(["a/*", "b/c"], ["org/one"])).experiments
    assert isinstance(quality, SaeSpec)
    assert isinstance(ablation, SaeSpec)
    assert quality.corpus is not None
    assert quality.corpus.context == 16
    assert ablation.corpus is None
    assert ablation.chooses("capitals/France")
    assert [spec.skip.first for spec in (quality, ablation)] == [2, 2]
    assert [choice.sae for choice in quality.saes] == ["a/*", "b/c"]


def test_list_and_inspect_show_what_is_in_the_cache(raymi_: Raymi) -> None:
    said = raymi_("sae", "list")
    assert ["org/sae", "one", "blocks.1.hook_resid_post", "24", "standard", "float32", "saelens"] in [
        line.split() for line in said.out.splitlines()
    ]
    assert json.loads(raymi_("sae", "inspect", "org/sae", "--json").out)["d_sae"] == 24

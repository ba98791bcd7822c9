import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from raymi.cli import text
from raymi.cli.main import VERBS
from raymi.cli.main import raymi as cli
from raymi.cli.models import command
from tests.fakes import LLAMA, add_model, llama_shapes

LONG = "some-organisation/A-Model-With-A-Very-Long-Name-7B-Instruct-v0.3"
REVISION = "0123456789" * 4


def models(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, env={"COLUMNS": "80"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def raymi(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raymi", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as a keen collector has it: headers as long as those of real models of 32 layers, some in shards."""
    cache = tmp_path_factory.mktemp("cache")
    config = LLAMA | {"num_hidden_layers": 32, "hidden_size": 4, "intermediate_size": 4, "vocab_size": 4}
    shapes = llama_shapes(config)
    for i in range(200):
        add_model(
            cache, f"org-{i % 7}/model-{i}", config, tensors=shapes, shards=1 + i % 3, files={"README.md": str(i)}
        )
    return cache


def test_table_fits_a_terminal(tmp_path: Path) -> None:
    add_model(tmp_path, "org/tiny", revision=REVISION)
    add_model(tmp_path, LONG, tokenizer=False, dtype="BF16")

    lines = models("--cache-dir", str(tmp_path)).splitlines()

    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["model", "rev", "type", "layers", "heads", "params", "size", "dtype", "runs"]
    size = text.size(sum(file.stat().st_size for file in (tmp_path / "models--org--tiny" / "blobs").iterdir()))
    assert lines[1].split() == ["org/tiny", "0123456", "llama", "2", "4", "5.2K", *size.split(), "float32", "yes"]
    assert lines[2] == LONG
    assert lines[3].split()[-2:] == ["bfloat16", "no"]
    reasons = " ".join(line.strip() for line in lines[lines.index("Cannot run:") + 1 :])
    assert f"{LONG}: no tokenizer" in reasons


def test_parts_beside_the_language_model_are_listed(tmp_path: Path) -> None:
    beside = {
        "model.visual.blocks.0.norm.weight": (4,),
        "mtp.fc.weight": (4, 4),
        "model.layers.2.eh_proj.weight": (4, 8),
    }
    add_model(tmp_path, "org/more", tensors=llama_shapes() | beside)
    add_model(tmp_path, "org/tiny")
    assert "model.layers.2, model.visual, mtp" in models("--cache-dir", str(tmp_path))
    more, tiny = json.loads(models("--cache-dir", str(tmp_path), "--json"))
    assert (more["not_built"], tiny["not_built"]) == (["model.layers.2", "model.visual", "mtp"], [])


def test_damaged_models_come_with_what_to_do(tmp_path: Path) -> None:
    add_model(tmp_path, "org/tiny", tensors={})
    assert "raymi fetch MODEL" in models("--cache-dir", str(tmp_path))
    assert "raymi fetch MODEL" not in models("--cache-dir", str(tmp_path / "none"))


def test_json_holds_everything_untruncated(tmp_path: Path) -> None:
    folder = add_model(tmp_path, LONG, revision=REVISION)
    [model] = json.loads(models("--cache-dir", str(tmp_path), "--json"))
    assert model == {
        "id": LONG,
        "revision": REVISION,
        "path": str(folder),
        "model_type": "llama",
        "n_layers": 2,
        "n_heads": 4,
        "hidden_size": 16,
        "vocab_size": 32,
        "context": 64,
        "parameters": sum(a * b for a, b in ((s[0], s[-1] if len(s) > 1 else 1) for s in llama_shapes().values())),
        "size_on_disk": sum(file.stat().st_size for file in folder.iterdir()),
        "dtype": "float32",
        "reason": None,
        "n_kv_heads": 2,
        "intermediate_size": 32,
        "head_dim": 4,
        "weight_files": ["model.safetensors"],
        "needs_remote_code": False,
        "pickle_only": False,
        "heads_by_layer": None,
        "attention_layers": None,
        "not_built": [],
        "runnable": True,
    }


def test_lists_the_models_and_revisions_that_are_named(tmp_path: Path) -> None:
    add_model(tmp_path, "org/other")
    add_model(tmp_path, "org/tiny")
    add_model(tmp_path, "org/tiny", LLAMA | {"num_hidden_layers": 7}, revision=REVISION, refs=("old",))
    found = json.loads(models("--cache-dir", str(tmp_path), "--json", "org/tiny@old", "org/tiny"))
    assert [(model["id"], model["n_layers"]) for model in found] == [("org/tiny", 7), ("org/tiny", 2)]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_empty_cache_says_so_and_what_to_do_next(tmp_path: Path, flags: list[str]) -> None:
    result = raymi("models", "--cache-dir", str(tmp_path / "none"), *flags)
    assert result.returncode == 0
    assert f"No models in {tmp_path / 'none'}" in result.stderr
    assert "raymi fetch " in result.stderr
    assert result.stdout == ("[]\n" if flags else "")


def test_honours_where_hugging_face_keeps_its_cache(tmp_path: Path) -> None:
    add_model(tmp_path / "home" / "hub", "org/home")
    add_model(tmp_path / "cache", "org/cache")
    add_model(tmp_path / "option", "org/option")
    home = {"HF_HOME": str(tmp_path / "home")}
    cache = home | {"HF_HUB_CACHE": str(tmp_path / "cache")}
    for environment, options, expected in (
        (home, (), "org/home"),
        (cache, (), "org/cache"),
        (cache, ("--cache-dir", str(tmp_path / "option")), "org/option"),
    ):
        result = raymi("models", "--json", *options, **environment)
        assert [model["id"] for model in json.loads(result.stdout)] == [expected]


def test_what_goes_into_a_pipe_is_not_folded(tmp_path: Path) -> None:
    add_model(tmp_path, LONG)
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "raymi", "models", "--cache-dir", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[1].startswith(LONG)


MISTAKES = [
    (["models", "org/tinny"], "Error: no model 'org/tinny' in ", "Did you mean org/tiny?"),
    (["models", "org/tiny@v2"], "there is no revision 'v2'", "There is: main, "),
    (["models", "--jason"], "No such option", "--json"),
    (["modles"], "No such command 'modles'.", "Did you mean 'models'?"),
]


@pytest.mark.parametrize(("arguments", "what", "hint"), MISTAKES)
def test_mistakes_are_told_without_a_traceback(tmp_path: Path, arguments: list[str], what: str, hint: str) -> None:
    add_model(tmp_path, "org/tiny")
    result = raymi(*arguments, HF_HUB_CACHE=str(tmp_path))
    assert result.returncode == 2
    assert what in result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_control_c_is_130(tmp_path: Path) -> None:
    code = """
import raymi.cli.models, raymi.cli.main, sys
def interrupted(*_): raise KeyboardInterrupt
raymi.cli.models.catalog.scan = interrupted
sys.argv = ["raymi", "models"]
raymi.cli.main.main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("verb", [*VERBS, "sae list", "sae inspect", "sae fetch", "sae run"])
def test_help_of_every_verb_has_an_example(verb: str) -> None:
    said = CliRunner().invoke(cli, [*verb.split(), "--help"], env={"COLUMNS": "80"})
    assert said.exit_code == 0
    examples = said.output.partition("Example")[2].partition("Options:")[0].splitlines()
    assert [line for line in examples if line.strip().startswith(f"raymi {verb}")]
    assert max(map(len, examples)) <= 80


def test_help_speaks_of_all_and_of_completion() -> None:
    said = CliRunner().invoke(cli, ["--help"]).output
    assert "autoencoders" in said
    assert "_RAYMI_COMPLETE=bash_source raymi" in said


def test_help_names_every_verb() -> None:
    result = raymi("--help")
    assert result.returncode == 0
    assert [line.split()[0] for line in result.stdout.partition("Commands:\n")[2].splitlines()] == list(VERBS)


HEAVY = {"torch", "ray", "transformers", "polars", "pyarrow", "pydantic", "numpy", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["models"]])
def test_imports_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    add_model(tmp_path, "org/tiny")
    code = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps([name for name in sys.modules if "." not in name]), file=sys.stderr))
from raymi.cli.main import main
main()
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout
    assert HEAVY.isdisjoint(json.loads(result.stderr))


def cpu_seconds() -> float:
    """What this process's finished children have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_answers_at_once_with_two_hundred_models(two_hundred: Path) -> None:
    """The aim is half a second on a quiet machine. Busy neighbours slow a process down, so its own time is measured."""
    seconds: list[float] = []
    for _ in range(5):
        start = cpu_seconds()
        result = raymi("models", HF_HUB_CACHE=str(two_hundred))
        seconds.append(cpu_seconds() - start)
        assert len(result.stdout.splitlines()) == 201
    assert min(seconds) < 1


@pytest.mark.parametrize(
    ("number", "parameters", "n_bytes"),
    [
        (0, "0", "0 B"),
        (999, "999", "999 B"),
        (1000, "1.0K", "1 kB"),
        (134_515_008, "134.5M", "135 MB"),
        (256_900_000, "256.9M", "257 MB"),
        (999_400_000, "999.4M", "999 MB"),
        (999_999_999, "1.0B", "1.0 GB"),
        (13_476_839_424, "13.5B", "13.5 GB"),
        (1_234_567_890_123, "1.2T", "1.2 TB"),
    ],
)
def test_writes_numbers_for_people(number: int, parameters: str, n_bytes: str) -> None:
    assert text.count(number) == parameters
    assert text.size(number) == n_bytes

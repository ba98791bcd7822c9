import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import raymi
import raymi.model.loading
import raymi.single
from raymi.cli.knockout_text import percent
from raymi.cli.main import main
from tests.fakes import LLAMA, WORDS, add_model, llama_shapes

SMOL = "raymi-demo/SmolLM2-135M-Instruct-Q4_1"
REFERENCE_KEYS = {
    "model_id", "prompt", "n_layers", "n_heads", "hidden_size", "target_layer", "knockout_edge", "kl_divergence",
    "logit_diff", "top_changed",
}  # fmt: skip


class Result(NamedTuple):
    code: int | None
    out: str
    err: str


Knockout = Callable[..., Result]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    add_model(folder, "org/tiny", scale=0.6)
    return folder


@pytest.fixture
def knockout(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Knockout:
    """The command, in this process, on the tiny cache."""

    def call(*arguments: str, cache_dir: Path = cache, columns: int = 80) -> Result:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["raymi", "knockout", "--cache-dir", str(cache_dir), *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        return Result(exit.value.code or 0, *capsys.readouterr())  # pyright: ignore[reportArgumentType]

    return call


def records(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


# -- one model -------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
def test_demo_model_gives_the_known_numbers(demo_cache: Path, knockout: Knockout, tmp_path: Path) -> None:
    """The figures were computed by eager attention with an edited mask, in another program."""
    result = knockout(SMOL, "--output", str(tmp_path / "out.json"), cache_dir=demo_cache)

    assert result.code == 0
    [record] = records(tmp_path / "out.json")
    assert record["kl_divergence"] == pytest.approx(0.049847, abs=2e-6)
    assert record["logit_diff"] == pytest.approx(0.93340, abs=1e-4)
    assert (record["target_layer"], record["knockout_edge"]) == (15, [4, 0])
    assert record["clean_top"][0]["token"] == " Paris"
    assert record["weight_bytes"] == 4 * 134_515_008
    assert record["memory"]["after_load"]["ram"] - record["memory"]["before_load"]["ram"] > 0.5 * record["weight_bytes"]

    lines = [line.strip() for line in result.out.splitlines()]
    assert any(line.startswith("model ") and "30 layers, 9 heads, hidden size 576" in line for line in lines)
    assert any(line.startswith("weights ") and "538 MB as float32 on cpu" in line for line in lines)
    assert any(line.startswith("load ") and "RAM" in line for line in lines)
    assert any(line.startswith("cut ") and 'layer 15; all heads; 4 " is" -> 0 "The"' in line for line in lines)
    assert any(line.startswith("KL ") and line.endswith(f"{record['kl_divergence']:.6f} nats") for line in lines)
    assert any(line.startswith('1  " Paris"') and "77.1%" in line and "66.2%" in line for line in lines)
    assert [line.split()[0] for line in lines[-11:-1]] == [str(rank) for rank in range(1, 11)]
    assert "warning" not in result.out


def test_record_is_enough_to_measure_it_again(knockout: Knockout, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder" / "out.json"
    arguments = ("--wrong", " Lima", "--answer", " Paris", "--layers", "0,1", "--heads", "0,-1")
    assert knockout("org/tiny", *arguments, "--edge", 'last:"France"', "--output", str(output)).code == 0

    [record] = records(output)
    assert record.keys() >= REFERENCE_KEYS
    assert record["asked"]["layers"] == "0,1"
    assert record["asked"]["edges"] == ['last:"France"']
    assert record["token_ids"] == [WORDS.index(token) for token in record["tokens"]]
    assert {"raymi", "torch", "transformers"} <= record["versions"].keys()
    assert record["hardware"]["cpus"]
    assert record["timestamp"].endswith("+00:00")
    assert all(seconds > 0 for seconds in record["seconds"].values())

    again = raymi.load(f"{record['model_id']}@{record['revision']}", cache_dir=cache, dtype=record["dtype"])
    masks = [
        raymi.Mask(layer, tuple(record["heads"]), tuple((query, key) for query, key in record["edges"]))
        for layer in record["layers"]
    ]
    both = again.ablate(record["prompt"], masks)
    assert record["fired"] == both.fired == 2 * 2
    assert record["kl_divergence"] == pytest.approx(both.kl, rel=1e-3)
    clean, ablated = both.clean.logits, both.ablated.logits
    for name in ("answer", "wrong"):
        target = record[name]
        assert target["pieces"] == [target["text"].strip()] == [target["token"]]
        assert target["logit_clean"] == pytest.approx(float(clean[target["token_id"]]), abs=1e-5)
        assert target["logit_ablated"] == pytest.approx(float(ablated[target["token_id"]]), abs=1e-5)
    answer = record["answer"]
    assert answer["rank_clean"] == 1 + int((clean > clean[answer["token_id"]]).sum())
    assert record["logit_diff"] == pytest.approx(answer["logit_clean"] - answer["logit_ablated"], abs=1e-5)
    wrong_diff = record["wrong"]["logit_clean"] - record["wrong"]["logit_ablated"]
    assert record["margin_diff"] == pytest.approx(record["logit_diff"] - wrong_diff, abs=1e-5)

    p, q = clean.double().softmax(0), ablated.double().softmax(0)
    top = (p - q).abs().argsort(descending=True, stable=True)[:10].tolist()
    assert [each["token_id"] for each in record["top_changed"]] == top
    assert [each["rank"] for each in record["top_changed"]] == list(range(1, 11))
    assert [each["token"] for each in record["top_changed"]] == [WORDS[token] for token in top]
    assert [each["abs_diff"] for each in record["top_changed"]] == pytest.approx((p - q).abs()[top].tolist(), abs=1e-6)
    assert [each["token_id"] for each in record["clean_top"]] == p.argsort(descending=True)[:5].tolist()


@pytest.mark.parametrize(
    ("arguments", "layers", "heads", "edges"),
    [
        ([], [1], None, [[4, 0]]),
        (["--layers", "all"], [0, 1], None, [[4, 0]]),
        (["--layers", "0.0"], [0], None, [[4, 0]]),
        (["--layers", "0.5"], [1], None, [[4, 0]]),
        (["--layers", "-1, 0", "--heads", "3,0"], [0, 1], [0, 3], [[4, 0]]),
        (["--edge", "3:1"], [1], None, [[3, 1]]),
        (["--edge", "-1:-2", "--edge", "3:1", "--edge", "3:1"], [1], None, [[3, 1], [4, 3]]),
        (["--edge", 'last:"France"'], [1], None, [[4, 3]]),
        (["--edge", "last:'capital of'"], [1], None, [[4, 1], [4, 2]]),
        (["--edge", '"of France":first'], [1], None, [[2, 0], [3, 0]]),
        (["--edge", "2:all", "--edge", "first:all"], [1], None, [[0, 0], [2, 0], [2, 1], [2, 2]]),
        (["--prompt", "is it: he", "--edge", 'last:": he"'], [1], None, [[3, 2], [3, 3]]),
    ],
)
def test_everything_named_is_cut_together(
    knockout: Knockout, tmp_path: Path, arguments: list[str], layers: list[int], heads: Any, edges: list[list[int]]
) -> None:
    result = knockout("org/tiny", *arguments, "--output", str(tmp_path / "out.json"))
    assert result.code == 0, result.err
    [record] = records(tmp_path / "out.json")
    assert (record["layers"], record["heads"], record["edges"]) == (layers, heads, edges)
    assert record["target_layer"] == (layers[0] if len(layers) == 1 else None)
    assert record["knockout_edge"] == (edges[0] if len(edges) == 1 else None)
    assert record["fired"] == len(layers) * len(heads or range(4)) * len(edges)


def test_answer_belongs_to_its_prompt(knockout: Knockout, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    knockout("org/tiny", "--prompt", "The capital of Peru is", "--output", str(output))
    assert records(output)[0]["answer"] is None
    assert records(output)[0]["logit_diff"] is None
    knockout("org/tiny", "--output", str(output))
    assert records(output)[0]["answer"]["text"] == " Paris"


def test_reader_is_warned(knockout: Knockout, cache: Path) -> None:
    ranked = raymi.load("org/tiny", cache_dir=cache).clean("The capital of France is").top(32)["token"].to_list()
    likely, unlikely = (next(token for token in part if token.isalpha()) for part in (ranked[:5], ranked[5:]))
    assert "warning" not in knockout("org/tiny", "--answer", f" {likely}").out
    result = knockout("org/tiny", "--answer", f" {unlikely}")
    assert f'warning     "{unlikely}" is not among the 5 most likely tokens' in result.out
    assert "note" not in result.out
    result = knockout("org/tiny", "--answer", " Paris Lima", "--edge", "first:first")
    out = " ".join(result.out.split())
    assert 'note " Paris Lima" is 2 tokens, "Paris", "Lima"; "Paris" is measured.' in out
    assert "note 4 attention lines (a query in a head of a layer) were left with no key" in out


@pytest.mark.parametrize("columns", [80, 200])
def test_lines_fit_a_terminal(knockout: Knockout, cache: Path, columns: int) -> None:
    add_model(cache, "some-organisation/A-Model-With-A-Very-Long-Name-7B-Instruct-v0.3")
    prompt = " ".join(WORDS[3:] * 2)
    result = knockout("--prompt", prompt, "--edge", "last:all", "--answer", " Paris", columns=columns)
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= columns
    assert '"The"' in result.out
    assert "..., " in result.out.replace("\n", " "), "of a long prompt both ends are shown"


@pytest.mark.parametrize(
    ("probability", "shown"),
    [
        (1, "100.0%"),
        (0.3934546, "39.3%"),
        (0.01, "1.0%"),
        (0.0099, "0.990%"),
        (0.0001, "0.010%"),
        (0.000031, "3.1e-05"),
    ],
)
def test_probabilities_are_written_like_this(probability: float, shown: str) -> None:
    assert percent(probability) == shown


# -- several models --------------------------------------------------------------------------------------------------


def test_without_a_model_all_that_can_run_are_taken(knockout: Knockout, cache: Path, tmp_path: Path) -> None:
    add_model(cache, "org/second", LLAMA, scale=0.5)
    add_model(cache, "org/mute", tokenizer=False)
    result = knockout("--output", str(tmp_path / "out.json"))
    assert result.code == 0
    assert [record["model_id"] for record in records(tmp_path / "out.json")] == ["org/second", "org/tiny"]
    assert "Cannot run:\n  org/mute: no tokenizer" in result.err
    *_, head, second, tiny = result.out.strip().splitlines()
    assert head.split()[:3] == ["model", "layer", "KL"]
    assert (second.split()[:2], tiny.split()[:2]) == (["org/second", "1/2"], ["org/tiny", "1/2"])


def test_one_failure_stops_no_other(knockout: Knockout, cache: Path, tmp_path: Path) -> None:
    shapes = llama_shapes()
    del shapes["model.layers.1.mlp.up_proj.weight"]
    add_model(cache, "org/broken", tensors=shapes)
    add_model(cache, "org/mute", tokenizer=False)
    add_model(cache, "org/one-layer", LLAMA | {"num_hidden_layers": 1})
    output = tmp_path / "out.json"
    result = knockout("org/broken", "org/mute", "org/one-layer", "org/tiny", "--layers", "1", "--output", str(output))
    assert result.code == 1
    assert [record["model_id"] for record in records(output)] == ["org/tiny"]
    failed = result.err[result.err.index("Failed:") :]
    assert "org/mute: no tokenizer" in failed
    assert "org/one-layer: layers: 1 is out of range: the model has 1 layers" in failed
    assert "org/broken: BadWeights" in failed
    assert "up_proj" in failed
    assert "Traceback" not in result.err


def test_ctrl_c_keeps_what_is_done(
    knockout: Knockout, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_model(cache, "org/z")
    output, measure = tmp_path / "out.json", raymi.single.measure

    def interrupted(job: Any, model: Any, **options: Any) -> Any:
        if model.id == "org/z":
            raise KeyboardInterrupt
        return measure(job, model, **options)

    monkeypatch.setattr(raymi.single, "measure", interrupted)
    result = knockout("org/tiny", "org/z", "--output", str(output))
    assert result.code == 130
    assert "1 of 2 models" in result.err
    assert [record["model_id"] for record in records(output)] == ["org/tiny"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out.json"], "nothing half-written"


def test_output_of_before_stays_until_there_is_a_new_one(knockout: Knockout, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text("[1]")
    assert knockout("org/tiny", "--edge", "99:0", "--output", str(output)).code == 2
    assert records(output) == [1]


def test_models_are_let_go_of_one_after_the_other(
    knockout: Knockout, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "broken"):
        add_model(cache, f"org/{name}", scale=float("inf") if name == "broken" else 0.1)
    load, seen, alive = raymi.model.loading.load, list[weakref.ref[Any]](), list[int]()

    def counted(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(ref() is not None for ref in seen))
        loaded = load(*arguments, **options)
        seen.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(raymi.model.loading, "load", counted)
    gc.disable()  # the command has to collect by itself
    try:
        assert knockout().code == 1
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]
    assert len(seen) == 3


def test_pickles_are_loaded_by_name_only(knockout: Knockout, cache: Path, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(shape) + 0.1 for name, shape in llama_shapes().items()}, tmp_path / "weights")
    files = {"pytorch_model.bin": (tmp_path / "weights").read_bytes()}
    add_model(cache, "org/pickled", tensors={}, files=files)
    refused = knockout("org/pickled")
    assert refused.code == 2
    assert "pickle weights only" in refused.err
    assert knockout("org/pickled", "--allow-pickle", "org/other").code == 2
    assert knockout("org/pickled", "--allow-pickle", "org/pickled").code == 0


def test_tensors_beyond_the_config_are_left_out_by_name_only(knockout: Knockout, cache: Path) -> None:
    add_model(cache, "org/biased", tensors=llama_shapes() | {"model.layers.1.self_attn.q_proj.bias": (16,)})
    refused = knockout("org/biased")
    assert refused.code == 1
    assert "model.layers.1.self_attn.q_proj.bias. --allow-unused org/biased" in " ".join(refused.err.split())
    assert knockout("org/biased", "--allow-unused", "org/other").code == 2
    assert knockout("org/biased", "--allow-unused", "org/biased").code == 0


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["org/tny"], "no model 'org/tny'"),
        (["org/tiny@feedbeef"], "no revision 'feedbeef'"),
        (["other/*"], "other/*: matches no cached model"),
        (["org/tiny", "--layers", "midle"], "--layers: found 'midle'; allowed: all, middle"),
        (["org/tiny", "--layers", "0,1.5"], "--layers: found 1.5"),
        (["org/tiny", "--layers", "2"], "org/tiny: layers: 2 is out of range: the model has 2 layers"),
        (["org/tiny", "--heads", "4"], "org/tiny: heads: 4 is out of range"),
        (["org/tiny", "--heads", ""], "--heads: found ''"),
        (["org/tiny", "--edge", "last"], "--edge: found 'last'; allowed: QUERY:KEY"),
        (["org/tiny", "--edge", "last:France"], "--edge: found 'France'; allowed: first, last, all"),
        (["org/tiny", "--edge", "last:subject"], "--edge: found 'subject'; allowed: first, last, all"),
        (["org/tiny", "--edge", 'last:"Spain"'], "--edge: found 'Spain', which is not in the prompt"),
        (["org/tiny", "--edge", "1:3"], "--edge: found key 3 after query 1"),
        (["org/tiny", "--edge", "1:-2"], "org/tiny: key position 3 is after query position 1"),
        (["org/tiny", "--edge", "5:0"], "org/tiny: position 5 is out of range: the prompt has 5 tokens"),
        (["org/tiny", "--prompt", " "], "--prompt: found an empty prompt"),
        (["org/tiny", "--prompt", "is " * 65], "the prompt has 65 tokens, more than the model's context of 64"),
        (["org/tiny", "--answer", "is"], "are not tokenised jointly"),
        (["org/tiny", "--wrong", " Paris"], "--wrong: found ' Paris', which is the answer itself"),
        (["org/tiny", "--prompt", "is", "--wrong", " Lima"], "--wrong: a wrong answer needs an answer"),
        (["org/tiny", "--bos", "always"], "no beginning-of-sequence token"),
        (["org/tiny", "--device", "gpu"], "--device: found 'gpu'; allowed: auto, cpu"),
        (["org/tiny", "--device", "cuda:7"], "device: found 'cuda:7'; there is here: auto, cpu"),
        (["org/tiny", "--dtype", "float8"], "'float8' is not one of"),
        (["org/tiny", "--output", "."], "is a folder"),
        (["org/tiny", "--output", "/dev/null/out.json"], "cannot write /dev/null/out.json"),
    ],
)
def test_bad_input(knockout: Knockout, arguments: list[str], message: str) -> None:
    result = knockout(*arguments, columns=500)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_empty_cache(knockout: Knockout, tmp_path: Path) -> None:
    result = knockout(cache_dir=tmp_path / "nowhere")
    assert result.code == 2
    assert "no model to run" in result.err
    assert "raymi fetch" in result.err


def test_help_is_there_before_torch() -> None:
    code = """
import sys
from click.testing import CliRunner
from raymi.cli.knockout import command
result = CliRunner().invoke(command, ["--help"])
assert result.exit_code == 0 and "--edge" in result.output
assert not {"torch", "transformers", "ray", "polars", "pydantic"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

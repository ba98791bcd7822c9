"""What is whole, and no model that transformers loads, is called what it is: there is nothing to fetch."""

from pathlib import Path
from typing import Any

import pytest

from raymi import catalog
from raymi.errors import UserError
from raymi.job import make_job
from raymi.other_weights import other_weights
from raymi.plan.selection import selected
from tests.fakes import LLAMA, TOKENIZER, add_files, add_model

ADAPTER = {"adapter_model.safetensors": b"0", "tokenizer.json": TOKENIZER}
REPOSITORIES: dict[str, tuple[dict[str, Any], str]] = {
    "an adapter": (
        ADAPTER | {"adapter_config.json": {"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}},
        "holds an adapter to meta-llama/Llama-3.2-1B, and no whole model",
    ),
    "an adapter alone": (
        {"adapter_config.json": "{", "adapter_model.bin": b"0"},
        "holds an adapter, and no whole model",
    ),
    "gguf alone": (
        {"tiny.Q4_K_M.gguf": b"GGUF", "README.md": "#"},
        "holds GGUF weights, as llama.cpp takes them (tiny.Q4_K_M.gguf), none that transformers loads",
    ),
    "tensorflow": (
        {"config.json": LLAMA, "tf_model.h5": b"0", "tokenizer.json": TOKENIZER},
        "holds TensorFlow's weights (tf_model.h5), none that transformers loads",
    ),
    "flax": ({"config.json": LLAMA, "flax_model.msgpack": b"0"}, "holds Flax's weights (flax_model.msgpack), none"),
    "onnx": ({"config.json": LLAMA, "model.onnx": b"0"}, "holds ONNX weights (model.onnx), none"),
    "its makers' own": (
        {"config.json": LLAMA, "consolidated.safetensors": b"0", "tekken.json": "{}"},
        "holds safetensors under another name (consolidated.safetensors), none",
    ),
    "of a variant": (
        {"config.json": LLAMA, "pytorch_model.fp16.bin": b"0", "training_args.bin": b"0"},
        "holds PyTorch's weights under another name (pytorch_model.fp16.bin), none",
    ),
}


@pytest.mark.parametrize("case", REPOSITORIES)
def test_it_is_listed_as_what_it_is(tmp_path: Path, case: str) -> None:
    files, reason = REPOSITORIES[case]
    add_files(tmp_path, "org/other", files)
    [model] = catalog.scan(tmp_path)
    assert (model.reason or "").startswith(reason)
    assert not model.damaged, "raymi fetch would change nothing"


def test_what_is_on_its_way_is_incomplete_all_the_same(tmp_path: Path) -> None:
    add_files(tmp_path, "org/half", {"config.json": LLAMA, "tf_model.h5": b"0"})
    (tmp_path / "models--org--half" / "blobs" / "0123.incomplete").write_bytes(b"half")
    [model] = catalog.scan(tmp_path)
    assert model.reason == "incomplete snapshot: it holds no weights (download interrupted)"
    assert model.damaged


def test_shards_that_are_missing_are_missing(tmp_path: Path) -> None:
    folder = add_model(tmp_path, "org/shards", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")
    [model] = catalog.scan(tmp_path)
    assert (model.reason or "").startswith("incomplete snapshot: 1 of 3 weight files missing")


def test_files_that_are_no_weights_are_none() -> None:
    assert other_weights(["config.json", "training_args.bin", "optimizer.pt", "README.md"]) is None
    assert other_weights(["config.json", "model.safetensors", "model.gguf", "adapter_config.json"]) is None


def test_nothing_is_fetched_for_what_is_whole(tmp_path: Path) -> None:
    job = make_job({"name": "j", "prompts": [{"text": "a"}], "experiments": [{"kind": "knockout", "layers": "all"}]})
    add_files(tmp_path, "org/gguf", {"tiny.gguf": b"GGUF"})
    with pytest.raises(UserError, match="no model to run\n  org/gguf: holds GGUF weights") as error:
        selected(job, catalog.scan(tmp_path), catalog.find)
    assert "fetch" not in (error.value.hint or "")
    add_model(tmp_path, "org/half", tensors={})
    with pytest.raises(UserError, match="org/half: incomplete snapshot") as error:
        selected(job, catalog.scan(tmp_path), catalog.find)
    assert "raymi fetch ID" in (error.value.hint or "")

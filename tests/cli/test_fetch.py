import json
import os
import subprocess
import sys
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest

from raymi import catalog
from tests.fakes import LLAMA, TOKENIZER, llama_shapes, safetensors
from tests.hub import REVISION, Hub, serve

TOKEN = "hf_aSecretThatNobodyMaySee"
MODEL = {"config.json": json.dumps(LLAMA).encode(), "tokenizer.json": json.dumps(TOKENIZER).encode()}
WEIGHTS = {"model.safetensors": safetensors(llama_shapes())}
OTHERS = {"README.md": b"#", "onnx/model.onnx": b"0", "tf_model.h5": b"0"}
PICKLE = {"pytorch_model.bin": b"PK"}
REPOSITORIES: Mapping[str, Mapping[str, bytes] | str | int] = {
    "org/tiny": MODEL | WEIGHTS | OTHERS | PICKLE,
    "org/pickle": MODEL | PICKLE,
    "org/gguf": {"model.gguf": b"GGUF"},
    "org/adapter": {"adapter_config.json": b"{}", **WEIGHTS},
    "org/gated": "GatedRepo",
    "org/down": 500,
}


@pytest.fixture(scope="module")
def hub() -> Generator[Hub]:
    with serve(REPOSITORIES) as hub:
        yield hub


def fetch(url: str, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "raymi", "fetch", "--cache-dir", str(cache), *arguments],
        env=os.environ | {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert TOKEN not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_downloads_what_is_needed_and_nothing_twice(tmp_path: Path, hub: Hub) -> None:
    hub.downloads.clear()
    hub.tokens.clear()

    result = fetch(hub.url, tmp_path, "org/tiny")

    assert result.returncode == 0, result.stderr
    assert "org/tiny is at c0ffee0: 5.2K, " in result.stdout
    assert sorted(hub.downloads) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert f"Bearer {TOKEN}" in hub.tokens  # it was used, so that it could have been shown
    assert "100%" in result.stderr
    model = catalog.find("org/tiny", tmp_path)
    assert (model.revision, model.reason) == (REVISION, None)

    assert fetch(hub.url, tmp_path, "org/tiny").returncode == 0
    assert len(hub.downloads) == 3


def test_mends_a_truncated_file(tmp_path: Path, hub: Hub) -> None:
    assert fetch(hub.url, tmp_path, "org/tiny").returncode == 0
    blob = (catalog.find("org/tiny", tmp_path).path / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-10])
    assert catalog.find("org/tiny", tmp_path).damaged

    assert fetch(hub.url, tmp_path, "org/tiny").returncode == 0

    assert catalog.find("org/tiny", tmp_path).runnable


def test_pickles_come_only_when_they_are_allowed(tmp_path: Path, hub: Hub) -> None:
    hub.downloads.clear()
    refused = fetch(hub.url, tmp_path, "org/pickle")
    assert refused.returncode == 2
    assert "pickle weights only" in refused.stderr
    assert "--allow-pickle" in refused.stderr
    assert hub.downloads == []

    assert fetch(hub.url, tmp_path, "org/pickle", "--allow-pickle").returncode == 0
    assert sorted(hub.downloads) == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert not catalog.find("org/pickle", tmp_path).runnable  # allowing the download does not allow the loading


def test_one_that_fails_does_not_keep_the_others(tmp_path: Path, hub: Hub) -> None:
    result = fetch(hub.url, tmp_path, "org/gated", "org/tiny@main", "org/absent")
    assert result.returncode == 2
    assert "org/tiny@main is at" in result.stdout
    assert "org/gated is gated" in result.stderr
    assert "no model org/absent at 127.0.0.1" in result.stderr
    assert [model.id for model in catalog.scan(tmp_path)] == ["org/tiny"]


FAILURES = {
    "no such model": (
        "org/absent",
        {},
        "Error: there is no model org/absent at 127.0.0.1\nIf it is private, set HF_TOKEN",
    ),
    "no such revision": ("org/tiny@v9", {}, "Error: org/tiny has no revision 'v9' at 127.0.0.1"),
    "gated": ("org/gated", {}, "Error: org/gated is gated"),
    "a hub that is ill": ("org/down", {}, "Error: org/down cannot be fetched: 127.0.0.1 answered 500"),
    "no weights": (
        "org/gguf",
        {},
        "Error: org/gguf cannot be loaded: the repository holds GGUF weights, as llama.cpp takes them",
    ),
    "no config": ("org/adapter", {}, "holds no config.json for transformers"),
    "no id at all": (
        "a/b/c",
        {},
        "Error: 'a/b/c' is not the id of a model\nAn id has two parts, organisation/",
    ),
    "a page": (
        "https://hf.co/org/tiny/tree/main",
        {},
        "is not the id of a model\nOf a page, the id is what follows the",
    ),
    "a pattern": ("org/*", {}, "is not the id of a model\nA pattern only finds what is in the cache already"),
    "a job file": ("job.yaml", {}, "'job.yaml' is not the id of a model\nAn id looks like organisation/name, of"),
    "an autoencoder": ("org/sae:layer_3", {}, "`raymi sae fetch org/sae:layer_3` gets one."),
    "no revision": ("org/tiny@", {}, "Behind the @ a revision is missing: org/tiny@main, or just org/tiny."),
    "a blank": ("a b", {"HF_HUB_OFFLINE": "1"}, "'a b' is not the id of a model\nAn id looks like organisation/name"),
    "offline by choice": ("org/tiny", {"HF_HUB_OFFLINE": "1"}, "offline mode is on\nUnset HF_HUB_OFFLINE."),
    "no network": ("org/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1 cannot be reached (ConnectError)"),
    "no such host": ("org/tiny", {"HF_ENDPOINT": f"http://u:{TOKEN}@no.invalid"}, "no.invalid cannot be reached"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_says_what_went_wrong(tmp_path: Path, hub: Hub, case: str) -> None:
    model, environment, message = FAILURES[case]
    result = fetch(hub.url, tmp_path, model, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_cache_that_cannot_be_written(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "file").touch()
    result = fetch(hub.url, tmp_path / "file", "org/tiny")
    assert result.returncode == 2
    assert "org/tiny cannot be fetched: " in result.stderr


def test_asks_for_a_model() -> None:
    result = fetch("http://127.0.0.1:9", Path("unused"))
    assert result.returncode == 2
    assert "Missing argument 'MODEL...'" in result.stderr

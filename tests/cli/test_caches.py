"""The demo's cache stands in for an empty one of the user's own, and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import add_model


def raymi(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_HOME": str(home / "huggingface"), "RAYMI_CACHE": str(home / "raymi")}
    command = [sys.executable, "-m", "raymi", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_an_empty_cache_gives_way_to_the_demos(tmp_path: Path) -> None:
    add_model(tmp_path / "raymi" / "hub", "raymi-demo/tiny")

    done = raymi(tmp_path, "models")

    assert "raymi-demo/tiny" in done.stdout
    assert "your own cache has no models" in done.stderr
    assert str(tmp_path / "raymi" / "hub") in done.stderr


def test_a_cache_that_has_models_is_the_one(tmp_path: Path) -> None:
    add_model(tmp_path / "raymi" / "hub", "raymi-demo/tiny")
    add_model(tmp_path / "huggingface" / "hub", "org/own")

    done = raymi(tmp_path, "models")

    assert "raymi-demo" not in done.stdout
    assert "org/own" in done.stdout
    assert done.stderr == ""

    refused = raymi(tmp_path, "models", "raymi-demo/tiny")
    assert refused.returncode == 2
    assert f"--cache-dir {tmp_path / 'raymi' / 'hub'}" in refused.stderr


@pytest.mark.parametrize("given", [True, False])
def test_neither_a_cache_that_is_named_nor_a_missing_demo_is_replaced(tmp_path: Path, given: bool) -> None:
    if given:
        add_model(tmp_path / "raymi" / "hub", "raymi-demo/tiny")
    done = raymi(tmp_path, "models", *(["--cache-dir", str(tmp_path / "none")] if given else []))
    assert done.stdout == ""
    assert "No models in" in done.stderr
    assert "demo" not in done.stderr


def test_what_is_fetched_goes_into_the_users_own(tmp_path: Path) -> None:
    add_model(tmp_path / "raymi" / "hub", "raymi-demo/tiny")
    done = raymi(tmp_path, "fetch", "org/other")  # offline
    assert "demo" not in done.stderr
    assert "cannot be fetched" in done.stderr


def test_on_a_cluster_every_node_has_its_own(tmp_path: Path) -> None:
    add_model(tmp_path / "raymi" / "hub", "raymi-demo/tiny")
    (tmp_path / "job.yaml").write_text("nonsense: 1")
    done = raymi(tmp_path, "run", str(tmp_path / "job.yaml"), "--address", "auto")
    assert "demo" not in done.stderr

"""`make gpu`, rehearsed without a GPU, and what it is made of."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import unpack
from tests.device import Placed

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_rehearsal_comes_to_a_good_end_and_writes_its_section(tmp_path: Path) -> None:
    section = tmp_path / "results.md"
    less = [
        "DEVICE=cpu",
        f"GPU_PYTHON={sys.executable}",
        f"GPU=--tests tests/sae/test_metrics.py --cases heads-128 --dtypes float32 --markdown {section}",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    done = subprocess.run(
        ["make", "-s", "gpu", *less], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = section.read_text()
    assert written.strip() == done.stdout.strip()
    assert "not begun" in written
    assert " 0 failed" in written
    for said in (
        "proof of llama in float16",
        "memory runs out, cone",
        "held after a model",
        "TF32",
        "heads-128",
        "ended well",
    ):
        assert said in written


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "make gpu DEVICE=cpu" in done.stderr


def wheel(folder: Path, name: str, tag: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")


def test_only_what_is_missing_and_fits_is_unpacked(tmp_path: Path) -> None:
    for name, tag in (("pytest", "py3"), ("not_there_yet", "py2.py3"), ("of_another_python", "cp27")):
        wheel(tmp_path, name, tag)
    assert unpack(tmp_path, tmp_path / "out") == ["not_there_yet 1.0"]
    assert (tmp_path / "out" / "not_there_yet" / "__init__.py").exists()
    assert unpack(tmp_path / "none", tmp_path / "out") == []


def test_what_a_test_makes_is_on_the_device() -> None:
    """`meta` stands for one here."""
    with Placed(torch.device("meta")):
        assert torch.zeros(2).device.type == "meta"
        assert torch.zeros(2, device="cpu").device.type == "cpu"
        assert torch.randn(2, generator=torch.Generator().manual_seed(0)).device.type == "meta"
        assert (torch.ones(2, device="cpu") + torch.ones(2)).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "cpu"  # not in a test's own line

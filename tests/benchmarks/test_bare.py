"""Tests on a machine on which little is installed: what is not there is named, and the run ends in time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTS = {
    "test_needs.py": "import a_package_that_is_not_there\n\ndef test_it():\n    pass\n",
    "test_mixed.py": """
import time
import pytest

def test_finds(record_property):
    record_property("finding", "seven")

def test_needs_it_inside():
    import another_that_is_not_there

def test_fails():
    assert False

def test_skips():
    pytest.skip("no reason")

def test_takes_long():
    time.sleep(3)

def test_comes_too_late():
    pass
""",
    "test_broken.py": "import raymi.no_such_module\n",
}


def test_what_comes_of_a_run(tmp_path: Path) -> None:
    for name, text in TESTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = ["-p", "tests.bare", "--outcome", str(tmp_path / "outcome"), "--seconds", "2", "-q", str(tmp_path)]
    arguments += ["--continue-on-collection-errors", "-c", str(tmp_path / "pytest.ini")]
    subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    found: dict[str, Any] = json.loads((tmp_path / "outcome").read_text())
    failed = [name.rpartition("/")[2] for name in found.pop("failed")]
    assert sorted(failed) == ["test_broken.py", "test_mixed.py::test_fails"]
    assert found.pop("seconds") < 60
    assert found == {
        "passed": 2,
        "skipped": 2,
        "not_begun": 1,
        "missing": {"a_package_that_is_not_there": 1, "another_that_is_not_there": 1},
        "findings": ["seven"],
    }

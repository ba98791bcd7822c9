"""What README shows is typed as it stands, on the demo's models, by somebody whose own cache is empty."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONG = ("raymi run jobs/sae.yaml",)
"""Takes minutes, and is what `make demo` and other tests run."""


def commands() -> list[str]:
    """Of the quick start and of autoencoders, without their comments and what they print."""
    part = README[README.index("## Quick start") : README.index("## How fast")]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("$ ") for kind, block in blocks for line in block.splitlines() if not kind]
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("raymi ")]


def test_every_verb_is_shown() -> None:
    shown = {command.split()[1] for command in commands()}
    assert {"models", "knockout", "validate", "run", "report", "show", "runs", "sae"} <= shown


def test_why_one_would_switch_stands_in_the_first_screen() -> None:
    screen = README.splitlines()[:25]
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    found = {round(float(number.replace(",", ""))) for number in re.findall(r"[\d,]*\d\.\d+", measured)}
    rows = [line.split("|")[2:6] for line in screen if line.startswith("| ") and "tokens" in line]
    assert len(rows) == 3
    for ours, *others in rows:
        assert f" {ours.strip()} |" in measured
        for other in others:
            assert float(other.replace(",", "")) in found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_work_as_typed(demo_cache: Path, tmp_path: Path) -> None:
    for name in ("jobs", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "RAYMI_CACHE": str(demo_cache.parent),
        "HF_HOME": str(tmp_path / "empty"),
        "PYTHONPATH": str(ROOT),
    }
    said: dict[str, list[str]] = {}
    for command in commands():
        if command in LONG:
            continue
        typed = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(typed, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        said.setdefault(command, []).append(done.stdout)
        if command.split()[1] in ("models", "run", "knockout"):
            assert "so these are the demo's" in done.stderr
    first, again = said["raymi run jobs/heads.yaml"]
    assert "270" in first
    assert "nothing to do" in again

"""The bars of half precision are measured, and missed where a wrong head passes."""

import pytest

from benchmarks import half
from tests.model.measuring import one_thread

__all__ = ["one_thread"]


def test_three_dtypes(capsys: pytest.CaptureFixture[str]):
    assert half.main(["--shape", "tiny", "--device", "cpu", "--heads", "18"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "shape tiny" in line]
    assert [line.split(" | ")[1] for line in lines[:3]] == ["float32", "bfloat16", "float16"]
    assert all("| 0 of 18 | 90 of 90 (100.0%) | 0 (0.0%) |" in line and line.endswith("met |") for line in lines[:3])
    assert len(lines) == 9  # two lines of differences each


@pytest.mark.parametrize("what", ["passes all", "refuses all"])
def test_a_bar_that_is_missed(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(half._Half, "passes", lambda *_: what == "passes all")
    assert half.main(["--shape", "tiny", "--device", "cpu", "--heads", "18", "--dtype", "bfloat16"]) == 1
    assert "NOT MET" in capsys.readouterr().out


def test_pairs_are_of_one_layer():
    assert list(half._pairs([2, 1, 3])) == [(0, 1), (1, 0), (3, 4), (3, 5), (4, 3), (4, 5), (5, 3), (5, 4)]

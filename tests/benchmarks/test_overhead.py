"""What a run adds is measured on the same ablations, and said."""

from pathlib import Path

import pytest

from benchmarks.overhead import main


@pytest.mark.slow
def test_the_same_ablations_three_times(
    demo_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RAYMI_CACHE", str(demo_cache.parent))
    main(["--prompts", "2", "--markdown", str(tmp_path / "R.md")])
    section = (tmp_path / "R.md").read_text()
    assert "a whole run of 7,020 ablations" in section
    assert all(f"| {name} |" in section for name in ("engine and metrics alone", "raymi run --inline"))
    assert "raymi run, a local Ray" in capsys.readouterr().out

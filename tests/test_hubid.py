"""What is an id on the hub, and what is said of what is none."""

from pathlib import Path

import pytest

from raymi.hubid import why_none


@pytest.mark.parametrize("ref", ["gpt2", "Qwen/Qwen3-0.6B", "org/x@v1", "org/x@refs/pr/3", "a_b/c.d-e@0123abc"])
def test_ids_are_ids(ref: str) -> None:
    assert why_none(ref) is None


def test_an_id_may_be_called_as_a_folder_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert why_none("gpt2") is None
    assert "file or folder of this machine" in (why_none("./gpt2") or "")


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("", "An id looks like organisation/name"),
        ("@main", "An id looks like organisation/name"),
        ("a/b/c", "did you mean a/b?"),
        ("huggingface.co/org/x", "what follows the host: org/x"),
        ("hf://org/x", "what follows the host: org/x"),
        ("https://huggingface.co/org/x/resolve/main/config.json?download=true", "follows the host: org/x"),
        ("Qwen/Qwen3-[0-9]*", "A pattern"),
        ("org/x:blocks.3", "`raymi sae fetch org/x:blocks.3`"),
        ("org/../x", "An id looks like"),
    ],
)
def test_what_is_none_is_told_what_it_is(ref: str, says: str) -> None:
    assert says in (why_none(ref) or "")

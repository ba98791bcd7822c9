"""What reaches a terminal: nothing that it would obey, and no traceback when nothing reaches it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raymi.outlet import CLOSED, FULL, Outlet, OutputLost, clean

OBEYED = [
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069",
]
ANY = st.text(st.characters() | st.sampled_from([*OBEYED, "\ud800", "\udfff"]))
FULL_DEVICE = Path("/dev/full")


@given(ANY)
def test_nothing_obeyed_is_left_and_nothing_else_is_changed(text: str) -> None:
    shown = clean(text)
    assert not {*OBEYED, "\ud800"}.difference("\n\t") & set(shown)
    assert clean(shown) == shown
    shown.encode()  # no half of a pair
    if not set(OBEYED).difference("\n\t") & set(text) and text.isprintable():
        assert shown == text


@given(st.dictionaries(ANY, ANY))
@example({"\x1b[31m\x7f": "\u202e\ud800"})
def test_a_json_document_stays_what_it_is(document: dict[str, str]) -> None:
    for ascii in (False, True):
        written = json.dumps(document, ensure_ascii=ascii, indent=1)
        assert json.loads(clean(written)) == json.loads(written)


def written(*texts: str, encoding: str = "utf-8", matters: bool = True) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="")
    outlet = Outlet(stream, matters=matters)
    for text in texts:
        outlet.write(text)
    outlet.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("utf-8", "é▁𝔸"), ("latin-1", r"é\u2581\ud835\udd38"), ("ascii", r"\u00e9\u2581\ud835\udd38")],
)
def test_what_an_encoding_has_not_is_spelt_out(encoding: str, expected: str) -> None:
    assert written("é▁𝔸", encoding=encoding) == expected


def test_bars_of_downloads_go_back_to_their_line_and_what_is_in_them_does_not() -> None:
    bar = ["\rfile\r\x1b[A: 10%", "\n\n", "\x1b[A\x1b[A", "\r      \r"]
    assert written(*bar, matters=False) == "\rfile\\u000d\\u001b[A: 10%\n\n\x1b[A\x1b[A\r      \r"
    assert written(*bar[:1]) == "\\u000dfile\\u000d\\u001b[A: 10%"


@pytest.mark.parametrize(("error", "code"), [(BrokenPipeError(32, "Broken pipe"), CLOSED), (OSError(28, "full"), FULL)])
def test_only_what_matters_ends_a_command(error: OSError, code: int) -> None:
    class Broken(io.StringIO):
        def write(self, s: str, /) -> int:
            raise error

        def fileno(self) -> int:
            raise io.UnsupportedOperation

    Outlet(Broken(), matters=False).write("progress")
    with pytest.raises(OutputLost) as lost:
        Outlet(Broken(), matters=True).write("a table")
    assert lost.value.code == code


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Runs `command`, in which `raymi` is this one; several commands of a pipe."""
    raymi = f"{sys.executable} -m raymi"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; raymi() {{ {raymi} \"$@\"; }}; {command}"],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"PYTHONUNBUFFERED": ""},
    )  # fmt: skip


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="this system has no full device")
@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("raymi --help | true", CLOSED, ""),
        ("raymi models --cache-dir . --json 2>/dev/null | true", CLOSED, ""),
        ("raymi --help >&-", 0, ""),
        ("raymi --help <&- >&- 2>&-", 0, ""),
        ("raymi --version > /dev/full", FULL, "Error: standard output cannot be written: No space left on device\n"),
        ("raymi models --cache-dir . --json > /dev/full 2> /dev/full", FULL, ""),
        ("raymi nosuch 2> /dev/full", 2, ""),
        ("raymi nosuch 2>&-", 2, ""),
        ("raymi nosuch 2>&1 | true", 2, ""),
        ("raymi run nosuch.yaml 2> /dev/full", 2, ""),
    ],
)
def test_a_command_without_its_output_ends_with_a_code_and_no_traceback(command: str, code: int, error: str) -> None:
    done = shell(command)
    assert (done.returncode, done.stderr) == (code, error)

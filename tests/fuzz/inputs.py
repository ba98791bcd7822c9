"""What a fuzzer feeds: a few valid files by name, and those of them that were changed."""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Input:
    """Valid files, and changes of them."""

    target: str
    base: str
    """Which of the target's valid sets of files."""
    changed: Mapping[str, bytes | None]
    """File -> what it holds now; None where it is gone."""
    structured: bool = True
    """Whether all changes were made to what the files mean, and written as such files are: parsers take them."""
    about: str = ""
    """What it found, or why it is kept."""

    def write(self, folder: Path, valid: Files) -> None:
        for name, data in {**valid, **self.changed}.items():
            if data is not None:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    @cached_property
    def line(self) -> str:
        """A line of a corpus: text where it can be, so that a diff shows what it is."""
        record: dict[str, Any] = {"target": self.target, "base": self.base, "about": self.about}
        record["changed"] = {name: _said(data) for name, data in self.changed.items()}
        return json.dumps(record, ensure_ascii=True)


def parse(line: str) -> Input:
    record = json.loads(line)
    changed = {name: _bytes(said) for name, said in record["changed"].items()}
    return Input(record["target"], record["base"], changed, about=record["about"])


def _said(data: bytes | None) -> str | dict[str, str] | None:
    if data is None:
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = None
    packed = zlib.compress(data, 9)
    if text is not None and len(text) <= 4 * len(packed) + 400:
        return text
    return {"zlib": base64.b85encode(packed).decode()}


def _bytes(said: str | dict[str, str] | None) -> bytes | None:
    if said is None or isinstance(said, str):
        return said and said.encode() if said != "" else b""
    return zlib.decompress(base64.b85decode(said["zlib"]))

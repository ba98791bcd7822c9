"""The tensors of a checkpoint as its files hold them, beside what transformers has made of them."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

INTEGERS = frozenset(("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"))
_KINDS = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


@dataclass(slots=True)
class Stored:
    """The tensors of some files: safetensors, or pickles (`.bin`) that the user has allowed."""

    files: Sequence[Path]
    places: dict[str, list[Path]] = field(default_factory=dict[str, list[Path]])
    """Tensor -> the files that hold it."""
    kinds: dict[str, str] = field(default_factory=dict[str, str])
    """Tensor -> its dtype, as safetensors call it."""
    _pickled: dict[Path, Mapping[str, Tensor]] = field(default_factory=dict[Path, Mapping[str, Tensor]])

    def __post_init__(self) -> None:
        for file in self.files:
            if file.suffix == ".bin":
                self._pickled[file] = _unpickled(file)
                for name, tensor in self._pickled[file].items():
                    self._note(name, file, _KINDS.get(tensor.dtype, str(tensor.dtype)))
                continue
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    self._note(name, file, opened.get_slice(name).get_dtype())

    def _note(self, name: str, file: Path, kind: str) -> None:
        self.places.setdefault(name, []).append(file)
        self.kinds[name] = kind

    def read(self, name: str, place: Path | None = None) -> Tensor | None:
        """A tensor as it is stored, or None where nothing of the name is known."""
        if name not in self.places:
            return None
        file = place or self.places[name][-1]
        if file in self._pickled:
            return self._pickled[file][name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)


def weight_files(path: Path) -> list[Path]:
    """The files of a snapshot that transformers has taken the weights from, in its order of preference."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = path / name, path / f"{name}.index.json"
        if whole.exists():
            return [whole]
        if index.exists():
            return sorted({path / file for file in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    return []


def _unpickled(file: Path) -> dict[str, Tensor]:
    # weights_only makes tensors and plain containers and nothing else; transformers has read the same file so.
    whole = torch.load(  # noqa: TID251
        file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
    )
    return {name: value for name, value in whole.items() if isinstance(value, Tensor)}

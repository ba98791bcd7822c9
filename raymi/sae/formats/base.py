"""What a format is, and what several of them do alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from raymi.errors import UserError
from raymi.sae.description import Description, Stored
from raymi.sae.files import Member
from raymi.sae.source import Config, Source


@dataclass(frozen=True, slots=True)
class Format:
    name: str
    file: Callable[[Source], Path | None]
    """The weights in a folder, None where the folder is not of this format."""
    describe: Callable[[Source, Path], Description]
    """Raises UserError for what raymi cannot do exactly, by name."""


def has(weights: str, *others: str) -> Callable[[Source], Path | None]:
    """A format that is known by its files: the weights, and what lies beside them."""

    def file(source: Source) -> Path | None:
        return source.folder / weights if all(source.has(name) for name in (weights, *others)) else None

    return file


def member(file: Path, found: Mapping[str, Member], name: str, dimensions: int = 2) -> Member:
    """A tensor that sizes are read from.

    Raises:
        UserError: when it is missing, or has another number of dimensions.
    """
    if name not in found:
        there = ", ".join(sorted(found)) or "none"
        raise UserError(f"{file}: tensor {name!r} is missing", hint=f"There are: {there}.")
    if len(found[name].shape) != dimensions:
        raise UserError(
            f"{file}: tensor {name!r} has shape {list(found[name].shape)}, expected {dimensions} dimensions"
        )
    if 0 in found[name].shape:
        raise UserError(f"{file}: tensor {name!r} has shape {list(found[name].shape)}, which holds nothing")
    return found[name]


def need_k(config: Config, k: int | None) -> int:
    """A TopK autoencoder's k.

    Raises:
        UserError: when the config gives none: no default can be right.
    """
    if k is None or k < 1:
        raise UserError(f"{config.file}: this is a TopK SAE, but its k is {'missing' if k is None else k}")
    return k


def named(**stored: str | Stored) -> dict[str, Stored]:
    """Canonical name -> where it is stored."""
    return {name: where if isinstance(where, Stored) else Stored(where) for name, where in stored.items()}


def straight(*names: str) -> dict[str, Stored]:
    """Tensors that are stored under their canonical names."""
    return {name: Stored(name) for name in names}

"""Faults planted into raymi, each of a kind that was found or may come: a fuzzer is worth what it finds of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import yaml

import raymi.promptsets
import raymi.snapshot
import raymi.yamlfile
from raymi.prompts import Prompt
from raymi.sae.source import Config


class Planted(NamedTuple):
    target: str
    """Whose inputs find it."""
    plant: Callable[[pytest.MonkeyPatch], None]


def crash(patch: pytest.MonkeyPatch) -> None:
    """Rows of JSONL are taken for objects of text."""
    patch.setattr(
        raymi.promptsets, "_prompt", lambda place, row: Prompt(str(row.get("id", place)), row["text"].strip())
    )


def hang(patch: pytest.MonkeyPatch) -> None:
    """Aliases are put in their places one after the other."""

    def expand(node: Any) -> int:
        return 1 + sum(map(expand, node)) if isinstance(node, list) else 1

    load = raymi.yamlfile.YamlFile.data

    def data(file: raymi.yamlfile.YamlFile) -> dict[str, Any]:
        found = load(file)
        while any(isinstance(value, list) and expand(value) > 45 for value in found.values()):
            pass
        return found

    patch.setattr(raymi.yamlfile.YamlFile, "data", data)


def memory(patch: pytest.MonkeyPatch) -> None:
    """Room is made for as many layers as a config says."""
    sizes = raymi.snapshot.sizes

    def greedy(config: Mapping[str, Any]) -> dict[str, int | None]:
        layers = config.get("num_hidden_layers")
        if isinstance(layers, int) and layers > 10**5:
            len(b"x" * 2**30)
        return sizes(config)

    patch.setattr(raymi.snapshot, "sizes", greedy)


def wrong(patch: pytest.MonkeyPatch) -> None:
    """The last row of a file of prompts is lost, where there are many."""
    read = raymi.promptsets.read_file
    from tests.fuzz import targets_of_jobs

    def lossy(path: Any, notes: list[str] | None = None) -> list[Prompt]:
        found = read(path, notes)
        return found[:-1] if len(found) > 2 else found

    patch.setattr(targets_of_jobs, "read_file", lossy)


def untyped(patch: pytest.MonkeyPatch) -> None:
    """What an autoencoder's config says is taken as it is."""
    patch.setattr(Config, "_typed", lambda self, key, kind, expected: self.values.get(key))


def said(patch: pytest.MonkeyPatch) -> None:
    """A parser's own error comes through."""
    patch.setattr(raymi.promptsets, "UNREADABLE", (OSError,))


def yaml_error(patch: pytest.MonkeyPatch) -> None:
    """Tags are obeyed, and what cannot be made raises what it likes."""
    patch.setattr(raymi.yamlfile, "_Constructor", yaml.constructor.SafeConstructor)


PLANTED: Mapping[str, Planted] = {
    "a crash on rows of another form": Planted("prompts", crash),
    "a hang": Planted("job", hang),
    "memory without end": Planted("model", memory),
    "a wrong answer": Planted("prompts", wrong),
    "a config of other types": Planted("sae", untyped),
    "an error of a library": Planted("prompts", said),
    "a number that is none": Planted("job", yaml_error),
}

"""What is fuzzed: valid files of every kind, how each is spoilt, and what has to come of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.inputs import Files, Input

Mutator = Callable[[Random, bytes, list[bytes]], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of files that raymi reads."""

    name: str
    bases: Callable[[], Mapping[str, Files]]
    """Valid ones, by name."""
    check: Callable[[Path], Any]
    """Reads those in a folder: a UserError or a right answer, or what is no right answer as `guard.Wrong`."""
    left: tuple[str, ...] = ()
    """Files that are not changed."""
    alone: dict[str, Mutator] = field(default_factory=dict[str, Mutator])
    """How to change what a file means, by its name, where its ending does not tell."""

    def draw(self, seed: int, number: int) -> Input:
        """An input, the same whenever it is asked for: one, or seldom two of its files changed."""
        rng = Random(f"{self.name}/{seed}/{number}")
        base = rng.choice(sorted(self.bases()))
        files = self.bases()[base]
        names = [name for name in sorted(files) if name not in self.left]
        changed: dict[str, bytes | None] = {}
        structured = True
        plain = [name for name in names if Path(name).suffix in MUTATORS or Path(name).name in self.alone]
        names = names if rng.random() < 0.1 else plain
        for name in rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2)))):
            others = [files[name] for files in self.bases().values() if name in files]
            mutator = self.alone.get(Path(name).name) or MUTATORS.get(Path(name).suffix)
            if rng.random() < 0.01:
                changed[name], structured = None, False
            elif mutator is None or rng.random() < 0.25:
                changed[name], structured = mutate.of_bytes(rng, files[name]), False
            else:
                try:
                    changed[name] = mutator(rng, files[name], others)
                except (
                    ValueError,
                    TypeError,
                    OverflowError,
                    LookupError,
                    AttributeError,
                ):  # no such file can be written
                    changed[name], structured = mutate.of_bytes(rng, files[name]), False
        return Input(self.name, base, changed, structured)


MUTATORS: Mapping[str, Mutator] = {
    ".json": mutate.of_json,
    ".yaml": mutate.of_yaml,
    ".jsonl": mutate.of_jsonl,
    ".csv": mutate.of_csv,
    ".txt": mutate.of_text,
    ".parquet": mutate.of_parquet,
    ".safetensors": mutate.of_safetensors,
    ".npz": mutate.of_npz,
}


@cache
def targets() -> Mapping[str, Target]:
    from tests.fuzz.targets_of_jobs import JOB, PROMPTS
    from tests.fuzz.targets_of_models import MODEL, SAES
    from tests.fuzz.targets_of_stores import STORE

    return {target.name: target for target in (JOB, PROMPTS, MODEL, SAES, STORE)}

"""A worker without a model: deterministic rows, and every way of going wrong, by the names of units and models."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from raymi.catalog import CachedModel
from raymi.cluster.worker import Done, Failed, failure
from raymi.experiments.unit import Unit
from raymi.store import schemas


def model(id: str, parameters: int = 1000) -> CachedModel:
    return CachedModel(
        id, "0" * 40, Path(f"/models/{id}"), "llama", 2, 4, 16, 32, 64, parameters, 4000, "float32", None
    )


@dataclass
class FakeWorker:
    """What it is to do stands in the model's id and in those of the units: `dies`, `exits`, `raises`, `slow`.

    Args:
        model: the model.
        folder: `once` in a unit's id: only the first replica to create a file there goes wrong.
        threads: written into the rows.
    """

    model: CachedModel
    folder: Path
    threads: int | None = None
    draining: bool = False

    def prepare(self) -> dict[str, pa.Table] | Failed:
        if "unreadable" in self.model.id:
            return Failed(None, "UserError", "no tokenizer")
        return {table: schemas.rows(table, []) for table in ("prompts", "saes")}

    def load(self) -> dict[str, pa.Table] | Failed:
        if "broken" in self.model.id:
            return failure(OSError(f"truncated file, says {os.environ.get('HF_TOKEN')}"))
        if "deadly" in self.model.id:
            os._exit(1)
        row = {"model_id": self.model.id, "replica": str(os.getpid()), "device": str(self.threads)}
        return {"models": schemas.rows("models", [row])}

    def run(self, units: Sequence[Unit]) -> Iterator[Done | Failed]:
        for unit in units:
            if self.draining:
                return
            yield self._measure(unit)

    def drain(self) -> None:
        self.draining = True

    def _measure(self, unit: Unit) -> Done | Failed:
        name = unit.unit_id
        if "once" not in name or self._first(name):
            if "dies" in name:
                os._exit(1)
            if "raises" in name:
                return failure(ValueError(f"NaN in {name}"), name)
            if "bug" in name:
                raise RuntimeError("a bug of raymi's own")
        time.sleep(0.3 if "slow" in name else 0.0)
        row = {"unit_id": name, "ablation_id": name, "model_id": self.model.id}
        return Done(name, {"ablations": schemas.rows("ablations", [row])}, 0.01)

    def _first(self, name: str) -> bool:
        try:
            (self.folder / name.replace("/", "-")).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

"""Rows to put into a store, for tests that have no model."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from raymi.store import schemas
from raymi.store.layout import slug
from raymi.store.reader import Store
from raymi.store.writer import Run

MODEL = "org/tiny"
REVISION = "0" * 40
MOMENT = datetime(2026, 11, 22, 12, tzinfo=UTC)


def take(store: Store, run: str = "heads-1a2b3c4d", **more: Any) -> Run:
    return store.take(run, written="name: heads\n", resolved={"name": "heads"}, **more)


def cell(unit: str, layer: int, head: int | None = 0, /, *, model: str = MODEL, **more: Any) -> dict[str, Any]:
    """One ablation of one head of one layer; `more` replaces columns."""
    return {
        "unit_id": unit,
        "ablation_id": f"{unit}.{layer}.{head}",
        "experiment": "heads",
        "model_id": model,
        "revision": REVISION,
        "dtype": "float32",
        "prompt_id": "france",
        "n_tokens": 5,
        "layers": [layer],
        "heads": None if head is None else [head],
        "queries": [4],
        "keys": [0],
        "layer": layer,
        "head": head,
        "query": 4,
        "key": 0,
        "kl": 0.5,
        "logit_diff": 1.0,
        "answer_id": 7,
        "answer_prob_clean": 0.25,
        "answer_rank_clean": 0,
        "changed": [{"token_id": 7, "prob_clean": 0.25, "prob_ablated": 0.125}],
        "engine": "full",
    } | more


def units(names: Iterable[str], *, layers: int = 3, model: str = MODEL) -> pa.Table:
    """`layers` ablations for every unit."""
    return schemas.rows("ablations", [cell(name, layer, model=model) for name in names for layer in range(layers)])


def add_units(run: Run, *names: str, model: str = MODEL) -> None:
    for name in names:
        run.add("ablations", slug(model), units([name], model=model))


def failure(model: str = MODEL, **more: Any) -> pa.Table:
    record = {
        "model_id": model,
        "revision": REVISION,
        "stage": "load",
        "kind": "OSError",
        "message": "torn",
        "attempt": 1,
    }
    return schemas.rows("failures", [record | {"failed_at": MOMENT} | more])


def loaded(model: str = MODEL, **more: Any) -> pa.Table:
    record = {"model_id": model, "revision": REVISION, "n_layers": 3, "device": "cpu", "load_seconds": 1.5}
    return schemas.rows("models", [record | {"status": "ready", "loaded_at": MOMENT} | more])


def verified(engine: str = "cone", *differences: float, model: str = MODEL, **more: Any) -> pa.Table:
    """Ablations that were measured twice, one for each difference; those above 0.03 do not agree."""
    record = {"model_id": model, "revision": REVISION, "prompt_id": "france", "engine": engine, "effect": 0.5}
    record |= {"tolerance": 0.03, "measured_at": MOMENT} | more
    return schemas.rows(
        "verifications",
        [
            record | {"ablation_id": str(at), "max_logit_diff": difference, "passed": difference <= 0.03}
            for at, difference in enumerate(differences)
        ],
    )

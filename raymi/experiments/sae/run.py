"""From a unit of measurements with autoencoders to its rows, on one loaded model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.kind import Spec
from raymi.experiments.sae import verify as second
from raymi.experiments.sae.cells import ablations, injections
from raymi.experiments.sae.features import features
from raymi.experiments.sae.quality import quality
from raymi.experiments.sae.spec import Measure, SaeSpec
from raymi.experiments.sae.texts import Task
from raymi.experiments.setting import Drawn, Setting
from raymi.experiments.unit import Unit
from raymi.model.engine import Engine
from raymi.prompts import TokenizedPrompt
from raymi.sae import SAE

_MEASURES: Mapping[Measure, Callable[[Task], pa.Table]] = {
    "features": features,
    "quality": quality,
    "injection": injections,
    "ablation": ablations,
}


def measure(setting: Setting, spec: Spec, unit: Unit) -> pa.Table:
    """Measures a unit of an experiment; see `run`."""
    assert isinstance(spec, SaeSpec)
    return run(
        setting.engine,
        spec,
        unit,
        setting.prompts,
        setting.saes,
        special=setting.special,
        model_id=setting.model_id,
        revision=setting.revision,
        dtype=setting.dtype,
        top_k=setting.top_k,
    )


def verify(setting: Setting, drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Measures a few texts twice; see `raymi.experiments.sae.verify`."""
    asked = [(each.spec, each.prompt, each.work) for each in drawn if isinstance(each.spec, SaeSpec)]
    about = {"model_id": setting.model_id, "revision": setting.revision}
    return second.verify(setting.engine, asked, setting.saes, special=setting.special, **about)


def run(
    engine: Engine,
    spec: SaeSpec,
    unit: Unit,
    prompts: Mapping[str, TokenizedPrompt],
    saes: Callable[[SaeRef], SAE],
    *,
    special: frozenset[int],
    model_id: str,
    revision: str,
    dtype: str,
    top_k: int = 10,
) -> pa.Table:
    """Measure everything in a unit.

    Args:
        engine: the model, and the way it is measured.
        spec: the experiment that the unit is of.
        unit: what to measure; its texts all have the same number of tokens.
        prompts: prompt id -> text, at least those of the unit.
        saes: opens an autoencoder, or has it open, on the model's device.
        special: ids of the tokens that `skip.special` leaves out.
        model_id: written into the rows.
        revision: written into the rows.
        dtype: written into the rows.
        top_k: how many of the most changed tokens a row lists.

    Returns:
        A table of `SCHEMAS[spec.table]`, at least one row.

    Raises:
        UserError: features are to be added or taken out where the model cannot be changed.
        NotFinite, NotFired, NoSuchPlace, OutOfMemory: from the model room.
    """
    task = Task(engine, spec, unit.unit_id, unit.items, prompts, saes, special, model_id, revision, dtype, top_k)
    return _MEASURES[spec.measure](task)

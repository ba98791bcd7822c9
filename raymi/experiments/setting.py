"""What experiments are measured with: one loaded model, its texts, and what rows say of both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import pyarrow as pa

from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.kind import Company, Spec, Work
from raymi.experiments.kinds import kind_of
from raymi.experiments.unit import Unit
from raymi.model.engine import Engine
from raymi.prompts import TokenizedPrompt
from raymi.sae import SAE


@dataclass(frozen=True, slots=True)
class Setting:
    """As a replica has it."""

    engine: Engine
    """The model, and the way it is measured."""
    prompts: Mapping[str, TokenizedPrompt]
    """By id, at least those that are measured."""
    saes: Callable[[SaeRef], SAE]
    """Opens an autoencoder, or has it open, on the model's device."""
    special: frozenset[int]
    """Ids of the tokenizer's special tokens."""
    model_id: str
    revision: str
    dtype: str
    top_k: int = 10
    """How many of the most changed tokens a row lists."""


class Drawn(NamedTuple):
    """What is measured a second time."""

    spec: Spec
    prompt: TokenizedPrompt
    work: Work
    company: Callable[[], Company]
    """What it is measured among."""


def no_saes(ref: SaeRef) -> SAE:
    """Where nothing needs one."""
    raise AssertionError(f"{ref.name} is asked for where no autoencoders are")


class Running(Protocol):
    """The module that `Kind.running` names."""

    def measure(self, setting: Setting, spec: Spec, unit: Unit, /) -> pa.Table:
        """Rows of the experiment's table, `testbed` apart, of all that a unit holds; at least one."""
        ...

    def verify(self, setting: Setting, drawn: Sequence[Drawn], /) -> list[dict[str, Any]]:
        """Records of table `verifications`, of what was drawn of the kind's experiments."""
        ...


def running(spec: Spec) -> Running:
    """What measures an experiment of its kind; imports torch."""
    return cast(Running, import_module(kind_of(spec).running))

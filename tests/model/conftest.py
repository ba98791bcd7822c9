"""Models of every test in this room: tiny random ones of each family, and the demo models, each built twice at most."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from raymi.model.hooked import HookedModel
from raymi.model.loading import Loaded, load
from tests import families
from tests.model.measuring import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def hooked() -> Callable[[str], HookedModel]:
    """The tiny model of a family in raymi's hands. Tests leave it as they found it."""
    return cache(lambda family: HookedModel(families.build(family), family))


@pytest.fixture(scope="session")
def plain() -> families.Build:
    """The same model, built separately and never seen by raymi."""
    return cache(families.build)


@pytest.fixture(scope="session")
def demo(demo_models: Mapping[str, Path]) -> Callable[[str], Loaded]:
    """A demo model as raymi loads it."""
    return cache(lambda name: load(demo_models[name], name=name, device="cpu"))


@pytest.fixture(scope="session")
def plain_demo(demo_models: Mapping[str, Path]) -> families.Build:
    """A demo model that raymi has never seen."""

    def read(name: str) -> PreTrainedModel:
        path = demo_models[name]
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()

    return cache(read)

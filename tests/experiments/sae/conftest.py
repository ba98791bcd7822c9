import pytest

from raymi.model.engine import Engine, measure_capability
from raymi.model.hooked import HookedModel
from tests.experiments.sae.scene import Plain
from tests.families import PROMPT, build
from tests.model.measuring import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def tiny() -> Engine:
    model = HookedModel(build("llama", norms=True), "org/tiny")
    return Engine(model, measure_capability(model, PROMPT), "cone")


@pytest.fixture
def engine(tiny: Engine) -> Engine:
    """Without anything that another test has left behind."""
    return Engine(tiny.model, tiny.capability, "cone")


@pytest.fixture(scope="session")
def plain() -> Plain:
    return Plain()

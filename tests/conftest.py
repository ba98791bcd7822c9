"""What every test stands on: an environment that is nobody's own, and the demo models."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from demo.models import DEMO, DEMO_MODELS, cache_directory

# Where things are on this machine is read before the environment is changed, and both before anything imports
# huggingface_hub or ray, which read theirs when they are imported. Processes among which pytest-xdist shares out the
# tests inherit the changed environment, and what was read.
_HUB = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
DEMO_CACHE = Path(os.environ.setdefault("RAYMI_TESTS_DEMO_CACHE", str(cache_directory())))
USER_CACHE = Path(os.environ.setdefault("RAYMI_TESTS_USER_CACHE", str(_HUB))).expanduser()
HOME = Path(tempfile.mkdtemp(prefix="raymi-tests-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

for name in ("HF_HUB_CACHE", "HF_TOKEN", "TRANSFORMERS_CACHE", "RAY_ADDRESS"):
    os.environ.pop(name, None)
os.environ |= {
    "HF_HOME": str(HOME / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "RAYMI_CACHE": str(HOME / "raymi"),
    "OMP_NUM_THREADS": "2",  # torch's threads, here and in the processes that tests start
    "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the home directory
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on which tests went before it in its process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    """The cache directory that holds the demo models and their autoencoder, or a skip that says how to get them."""
    missing = [one.id for one in DEMO if not one.present(DEMO_CACHE)]
    if missing:
        pytest.skip(f"not fetched: {', '.join(missing)}; run `python demo/models.py`")
    return DEMO_CACHE / "hub"


@pytest.fixture(scope="session")
def demo_models(demo_cache: Path) -> Mapping[str, Path]:
    """The snapshot folder of every demo model, by its name without `raymi-demo/`."""
    return MappingProxyType({model.name: model.snapshot(demo_cache.parent) for model in DEMO_MODELS})


@pytest.fixture(scope="session")
def user_cache() -> Path:
    """The user's own Hugging Face cache, for tests of published models: look, never write."""
    return USER_CACHE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With RAYMI_REQUIRE_ORACLES=1 an oracle that did not speak is a failure, unless it needs a published model."""
    report = yield
    silent = report.skipped and item.get_closest_marker("oracle") and not item.get_closest_marker("published")
    if silent and os.environ.get("RAYMI_REQUIRE_ORACLES") == "1" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: an oracle test was skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself whole may hold oracles: with RAYMI_REQUIRE_ORACLES=1 that is a failure too."""
    report = yield
    if report.skipped and os.environ.get("RAYMI_REQUIRE_ORACLES") == "1":
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid}: skipped as a whole: {report.longrepr}"
    return report

"""`cluster.yaml` against the schema of the Ray that is installed: no cloud, no network."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


@pytest.mark.parametrize(
    ("where", "key"),
    [((), "max_worker"), (("auth",), "ssh_usr"), (("available_node_types", "gpu"), "resource")],
)
def test_ray_refuses_an_unknown_key(config: dict[str, Any], where: tuple[str, ...], key: str) -> None:
    place = config
    for step in where:
        place = place[step]
    place[key] = {}
    with pytest.raises(ValidationError, match=key):
        validate_config(prepare_config(config))


def test_nothing_starts_without_authentication(config: dict[str, Any]) -> None:
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_image_has_the_ray_of_the_constraints(config: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert config["docker"]["image"].startswith(f"rayproject/ray:{pins['ray']}-")

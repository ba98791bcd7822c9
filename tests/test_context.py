"""Contexts that a config says are stretched."""

from pathlib import Path
from typing import Any

import pytest

from raymi import catalog
from raymi.context import context
from tests.fakes import LLAMA, add_model

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("stated", "config", "found"),
    [
        (32768, {"rope_scaling": YARN}, 131072),  # as Qwen's documentation has it
        (131072, {"rope_scaling": YARN}, 131072),
        (163840, {"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, 163840),
        (4096, {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, 8192),
        (32768, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 65536),
        (2048, {"rope_parameters": {"rope_type": "dynamic", "factor": 1.5, "rope_theta": 10000.0}}, 3072),
        (64, {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}}, 131072),
        (64, {"text_config": {"rope_scaling": {"type": "dynamic", "factor": 4}}}, 256),
        # What is stated is what they were made for, or it cannot be told.
        (4096, {"rope_scaling": YARN | {"type": "llama3"}}, 4096),
        (4096, {"rope_scaling": YARN | {"type": "longrope"}}, 4096),
        (4096, {"rope_scaling": {"type": "linear", "factor": 4.0}}, 4096),
        (4096, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 4096),
        (4096, {}, 4096),
        (None, {"rope_scaling": YARN}, None),
        # Nonsense is no number.
        *((64, {"rope_scaling": nonsense}, 64) for nonsense in (None, [], "yarn", {"type": "yarn"}, {"type": []})),
        *((64, {"rope_scaling": YARN | {"factor": nonsense}}, 64) for nonsense in ("4", None, float("inf"), 0, -4)),
    ],
)  # fmt: skip
def test_contexts(stated: int | None, config: dict[str, Any], found: int | None) -> None:
    assert context(config, stated) == found


def test_the_catalog_says_it(tmp_path: Path) -> None:
    add_model(tmp_path, "org/yarn", LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    [model] = catalog.scan(tmp_path)
    assert model.context == 2 * LLAMA["max_position_embeddings"]

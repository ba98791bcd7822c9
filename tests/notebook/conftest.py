from pathlib import Path

import pytest

import raymi
from raymi import Model
from tests.fakes import LLAMA, add_model

MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 13}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    add_model(folder, "org/tiny", scale=0.6)
    add_model(folder, "org/windowed", MISTRAL, scale=0.6)
    add_model(folder, "org/mute", tokenizer=False)
    return folder


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Model:
    return raymi.load("org/tiny", cache_dir=cache)

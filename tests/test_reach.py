import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raymi.experiments.knockout.spec import Ablation
from raymi.experiments.unit import Unit
from raymi.model.hooked import HookedModel
from raymi.model.interventions import Mask
from raymi.reach import closed
from raymi.windows import Reach, reaches
from tests.conformance.configs import TYPES, build
from tests.conformance.table import read
from tests.families import prompt

LAST = 13
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


RUN = [kind for kind, line in read().items() if line.outcome in ("cone", "layers", "full") and "/" not in kind]
"""All types of transformers that raymi runs."""
UNNAMED = "moss_transcribe_diarize"
"""Its files do not name the family of its text part."""
BY_TEXT = ("doge", "qwen4_exp", "qwen4_exp_text")
"""Their masks depend on the text, and no config tells that."""


USUAL = ("gemma2", "gemma3_text", "mistral", "gpt_oss", "llama4_text", "qwen2", "olmo3", "cohere2", "phi3", "llama")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in USUAL else pytest.mark.slow) for kind in RUN])
def test_what_a_config_tells_is_what_the_model_s_masks_do(kind: str):
    model = HookedModel(build(kind), kind)
    if not model.tells_closed or kind in BY_TEXT:
        pytest.skip("what its own mask closes cannot be told from outside")
    config = json.loads(model.model.config.to_json_string())
    found = reaches(config, model.n_layers)
    edges = [(LAST, key) for key in range(LAST + 1)] + [(6, key) for key in range(7)]
    for layer in model.attention_layers:
        cuts = [(Mask(layer, (0,), (edge,)),) for edge in edges]
        closed_B = model.forward(prompt().expand(len(edges), -1), cuts).closed_B
        assert closed_B is not None
        reach = found[layer]
        said = [reach is not None and reach.closes(query, key) for query, key in edges]
        assert [bool(n) for n in closed_B.tolist()] == said, layer


def test_windows_are_told_of_many():
    """Or the test above would compare nothing with nothing."""
    told = [kind for kind in RUN if any(reaches(_saved(kind), _saved(kind).get("num_hidden_layers", 4)))]
    assert len(told) >= 20, told


def _saved(kind: str) -> dict[str, Any]:
    return json.loads(
        CONFIG_MAPPING[kind](**{k: v for k, v in TYPES[kind].items() if k != "model_type"}).to_json_string()
    )


@pytest.mark.parametrize("kind", [kind for kind in RUN if kind in TYPES and kind != UNNAMED])
@pytest.mark.parametrize("n_layers", [None, 13])
def test_older_files_mean_what_the_familys_own_class_makes_of_them(kind: str, n_layers: int | None):
    """Files leave out what a class works out, `layer_types` above all."""
    raw = {"model_type": kind, **TYPES[kind]}
    if n_layers is not None:
        lists = ("layer_types", "mlp_layer_types", "attention_types", "layers_block_type", "num_kv_shared_layers")
        raw = {name: value for name, value in raw.items() if name not in lists}
        raw |= {"num_hidden_layers": n_layers, "num_layers": n_layers}
    try:
        config = CONFIG_MAPPING[kind](**{k: v for k, v in raw.items() if k != "model_type"})
        found = config.get_text_config().num_hidden_layers
    except Exception as error:  # fields of one size do not always go with another
        pytest.skip(f"no such config: {error}")
    assert reaches(raw, found) == reaches(json.loads(config.to_json_string()), found)


def test_older_files_leave_the_pattern_to_the_family():
    assert reaches({"model_type": "gemma2", "sliding_window": 4096}, 4) == [Reach(4096), None] * 2
    assert reaches({"model_type": "gemma3_text", "sliding_window": 512}, 6) == [Reach(512)] * 5 + [None]
    assert reaches({"model_type": "qwen2", "sliding_window": 512}, 2) == [None, None]
    assert reaches({"model_type": "mistral", "sliding_window": None}, 2) == [None, None]


def units(*ablations: Ablation) -> list[Unit]:
    return [Unit("u", "heads", (("p", ablations),), 0)]


def test_what_cuts_nothing_is_counted_apart_from_what_cuts_less(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none", **WINDOWED}))
    plan = units(
        Ablation((0,), None, ((9, 0),)),
        Ablation((0, 1), None, ((9, 0),)),
        Ablation((0,), None, ((9, 6),)),
        Ablation((1,), None, ((9, 0),)),
    )
    [said] = closed(tmp_path, 2, plan, {"p": 10})
    assert "experiment 'heads': of 4 ablations 1 cut nothing and 1 less than they name" in said
    assert closed(tmp_path, 2, plan, {"p": 4}) == [], "no prompt is longer than the window"
    assert closed(tmp_path, 2, plan[:0], {"p": 10}) == []
    assert closed(tmp_path / "elsewhere", 2, plan, {"p": 10}) == []


def test_chunks_close_what_is_in_another():
    reach = Reach(4, chunked=True)
    assert [reach.closes(5, key) for key in range(6)] == [True] * 4 + [False] * 2

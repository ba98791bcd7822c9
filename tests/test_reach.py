import json
from pathlib import Path

import pytest

from raymi.experiments.knockout.spec import Ablation
from raymi.experiments.unit import Unit
from raymi.model.hooked import HookedModel
from raymi.model.interventions import Mask
from raymi.reach import Reach, closed, reaches
from tests.conformance.configs import build
from tests.families import prompt

LAST = 13
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


TYPES = (
    *("gemma2", "gemma3_text", "mistral", "mixtral", "starcoder2", "gpt_oss", "llama4_text", "qwen2", "qwen3", "olmo3"),
    *("cohere2", "modernbert-decoder", "llama", "exaone4", "phi3"),
)


@pytest.mark.parametrize("kind", TYPES)
def test_what_a_config_tells_is_what_the_model_s_masks_do(kind: str):
    model = HookedModel(build(kind), kind)
    config = json.loads(model.model.config.to_json_string())
    found = reaches(config, model.n_layers)
    edges = [(LAST, key) for key in range(LAST + 1)] + [(6, key) for key in range(7)]
    for layer in model.attention_layers:
        cuts = [(Mask(layer, (0,), (edge,)),) for edge in edges]
        closed_B = model.forward(prompt().expand(len(edges), -1), cuts).closed_B
        assert closed_B is not None
        reach = found[layer]
        said = [reach is not None and reach.closes(query, key) for query, key in edges]
        if reach is None and any(closed_B.tolist()):
            continue  # nobody is warned of what a config does not tell
        assert [bool(n) for n in closed_B.tolist()] == said, layer


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "mistral", "gpt_oss", "llama4_text"])
def test_the_usual_windows_are_told(kind: str):
    config = build(kind).config
    assert any(reaches(json.loads(config.to_json_string()), config.num_hidden_layers))


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

"""Which layers have attention: as config.json says, as transformers reads it, and as the loaded model shows."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raymi import catalog, snapshot
from raymi.model.hooked import HookedModel
from tests import families

HYBRIDS = {
    **dict.fromkeys(("bamba", "granitemoehybrid", "jamba", "lfm2", "minimax", "nemotron_h"), (1, 4)),
    **dict.fromkeys(("olmo_hybrid", "qwen3_next"), (1, 4)),
    "recurrent_gemma": (2, 5),
}
"""Families with layers without attention -> those that have it; all layers of the others have."""


@pytest.mark.parametrize("family", [*families.ODD, "llama", "gemma3_text", "gpt_oss"])
def test_the_catalog_knows_the_layers_that_the_loaded_model_has(family: str, tmp_path: Path) -> None:
    folder = families.save(family, tmp_path, "org/tiny")

    [found] = catalog.scan(tmp_path)
    hooked = HookedModel(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), family)

    assert found.reason is None
    assert found.n_layers == hooked.n_layers
    assert found.attention_layers == HYBRIDS.get(family)
    assert tuple(hooked.attention_layers) == HYBRIDS.get(family, tuple(range(hooked.n_layers)))


PUBLISHED: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 32, "attn_layer_indices": [9, 18, 27]},
    "bailing_hybrid": {"num_hidden_layers": 20, "layer_group_size": 5},
    "falcon_h1": {"num_hidden_layers": 12},
    "granitemoehybrid": {"num_hidden_layers": 6, "layer_types": ["mamba", "mamba", "attention"] * 2},
    "jamba": {"num_hidden_layers": 32, "attn_layer_period": 8, "attn_layer_offset": 4},
    "kimi_linear": {
        "num_hidden_layers": 8,
        "linear_attn_config": {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7]},
    },
    "lfm2": {"num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]},
    "llama": {"num_hidden_layers": 3},
    "nemotron_h": {"num_hidden_layers": 9, "hybrid_override_pattern": "M-M*EM-M*"},
    "qwen3_next": {"num_hidden_layers": 48, "full_attention_interval": 4},
    "qwen3_5_text": {"num_hidden_layers": 12, "full_attention_interval": 3},
    "recurrent_gemma": {"num_hidden_layers": 26, "block_types": ["recurrent", "recurrent", "attention"]},
    "zamba2": {"num_hidden_layers": 8, "layers_block_type": ["mamba", "mamba", "mamba", "hybrid"] * 2},
    "zaya": {"num_hidden_layers": 4, "layer_types": ["hybrid", "hybrid_sliding"] * 2, "sliding_window": 8},
    "deepseek_v32": {"num_hidden_layers": 4, "layer_types": ["deepseek_sparse_attention"] * 4},
}
"""What the families' own checkpoints say, of which transformers writes only some."""


@pytest.mark.parametrize("family", PUBLISHED)
def test_configs_of_published_checkpoints_are_read_as_transformers_reads_them(family: str) -> None:
    config = {"model_type": family, **PUBLISHED[family]}

    theirs = CONFIG_MAPPING[family](**PUBLISHED[family])
    n_layers: int = theirs.num_hidden_layers
    # Its classes know the kinds of layers by names of their own, one for each, and leave out what all layers are.
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * n_layers
    without = {"linear_attention", "conv", "moe", "mlp"}
    expected = tuple(layer for layer, kind in enumerate(kinds) if kind not in without)

    ours = snapshot.attention_layers(config, n_layers)
    assert (tuple(range(n_layers)) if ours is None else ours) == expected
    assert (ours is None) == (len(expected) == n_layers)


def test_a_nested_config_tells_of_the_language_model() -> None:
    nested = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
    assert snapshot.attention_layers({"model_type": "lfm2_vl", "text_config": nested}, 4) == (1, 3)


def test_a_model_may_have_no_attention_at_all() -> None:
    assert snapshot.attention_layers({"layer_types": ["mamba"] * 3}, 3) == ()


def test_layers_are_counted_where_they_are_only_listed() -> None:
    for config in ({"layers_block_type": ["mamba", "attention", "moe"]}, {"hybrid_override_pattern": "M*E"}):
        assert snapshot.sizes({"model_type": "nemotron_h", **config})["n_layers"] == 3


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layer_types": None, "full_attn_idxs": None},
        {"layer_types": [], "hybrid_override_pattern": ""},
        {"layer_types": 5, "layers_block_type": "mamba"},
        {"layer_types": [{"type": "mamba"}]},
        {"layer_types": ["of a kind to come"]},
        {"attn_layer_period": 0, "attn_layer_offset": 0},
        {"attn_layer_period": 2},
        {"full_attention_interval": 0},
        {"linear_attn_config": []},
    ],
    ids=str,
)
def test_what_tells_nothing_leaves_all_layers(config: dict[str, Any]) -> None:
    assert snapshot.attention_layers(config, 4) is None
    assert snapshot.attention_layers(config, None) is None

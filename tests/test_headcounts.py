"""Heads of each layer, as a config tells: no number is taken that nobody could list."""

from typing import Any

import pytest

from raymi.headcounts import heads_by_layer


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"per_layer_config": {"1": {"num_attention_heads": 8}}}, (4, 8)),
        ({"per_layer_config": {"1": {"num_attention_heads": 2**53}}}, None),
        ({"num_attention_heads_per_layer": [4, 2]}, (4, 2)),
        ({"num_attention_heads_per_layer": [4, 10**9]}, None),
        ({"attention_other_setting": {"num_attention_heads": 10**9}, "layer_types": ["full", "sliding"]}, None),
    ],
)
def test_what_is_no_number_of_heads_is_left_to_loading(said: dict[str, Any], found: tuple[int, ...] | None):
    assert heads_by_layer({"model_type": "nobody's", "num_attention_heads": 4, **said}, 2, 4) == found

"""Which tensors stand for parts beside the language model, by their names alone."""

import pytest

from raymi import parts


@pytest.mark.parametrize(
    ("names", "n_layers", "built", "beside"),
    [
        (["model.layers.0.mlp.up_proj.weight", "lm_head.weight"], 1, False, ()),
        (["vision_tower.vision_model.encoder.layers.30.norm.bias"], 4, False, ("vision_tower",)),
        (["vision_tower.vision_model.encoder.layers.30.norm.bias"], 4, True, ()),
        (["model.visual.blocks.0.a", "mtp.layers.0.b", "mtp.norm.weight"], 4, True, ("mtp",)),
        (["model.mtp_layers.0.eh_proj.weight"], 4, False, ("model.mtp_layers",)),
        (["model.layers.61.eh_proj.weight", "model.layers.61.enorm.weight"], 61, False, ("model.layers.61",)),
        (["model.layers.61.mlp.up_proj.weight"], 61, False, ()),  # a decoder layer: refused when the model is loaded
        (["model.layers.1.mlp.vision_gate.weight"], 2, False, ()),
        (
            ["v_head.summary.weight", "score.weight", "bert.pooler.dense.bias"],
            2,
            False,
            ("bert.pooler", "score", "v_head"),
        ),
        (["model.layers.7.eh_proj.weight"], None, False, ()),
    ],
)
def test_parts(names: list[str], n_layers: int | None, built: bool, beside: tuple[str, ...]):
    assert parts.beside(names, n_layers, media_built=built) == beside

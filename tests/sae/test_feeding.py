"""What autoencoders' files say of how they are fed, and of where they write: read, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raymi.errors import UserError
from raymi.sae import check_fits, describe, load
from tests.sae.making import D, F, saelens
from tests.sae.test_loading import FITS, dictionary, gemma_scope_2, llama_scope, sparsify


def old_saelens(folder: Path, **config: Any) -> Path:
    """A config of before version 6: flat."""
    saelens(folder)
    cfg = {"d_in": D, "d_sae": F, "dtype": "float32", "hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}
    (folder / "cfg.json").write_text(json.dumps(cfg | config))
    return folder


@pytest.mark.parametrize(
    ("options", "centred"),
    [
        ({"center_writing_weights": True}, True),
        ({"center_writing_weights": True, "fold_ln": False, "dtype": "bfloat16", "device_map": None}, True),
        ({"center_writing_weights": False, "n_devices": 2}, False),
        ({}, False),
    ],
)
def test_weights_that_were_centred(options: dict[str, Any], centred: bool, tmp_path: Path) -> None:
    for folder in (
        saelens(tmp_path / "new", metadata={"model_from_pretrained_kwargs": options}),
        old_saelens(tmp_path / "old", model_from_pretrained_kwargs=options),
    ):
        about = describe(folder)
        assert (about.centred, about.centred_out) == (centred, centred)
    of_heads = {"model_from_pretrained_kwargs": options, "hook_name": "blocks.1.attn.hook_z"}
    assert not describe(saelens(tmp_path / "z", metadata=of_heads)).centred  # the stream's mean is not in z


@pytest.mark.parametrize(
    "options",
    [{"fold_ln": True}, {"refactor_factored_attn_matrices": True}, {"checkpoint_index": 3}, {"fold_value_biases": 1}],
)
def test_other_ways_to_load_a_model_are_refused_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    [name] = options
    with pytest.raises(UserError, match=rf"cfg\.json: model_from_pretrained_kwargs has {name}"):
        describe(saelens(tmp_path, metadata={"model_from_pretrained_kwargs": options}))


def test_whether_texts_began_with_bos(tmp_path: Path) -> None:
    assert describe(saelens(tmp_path / "a")).prepend_bos is None
    assert describe(saelens(tmp_path / "b", metadata={"prepend_bos": False})).prepend_bos is False
    assert describe(old_saelens(tmp_path / "c")).prepend_bos is True
    with pytest.raises(UserError, match="prepend_bos: expected true or false, found 'yes'"):
        describe(saelens(tmp_path / "d", metadata={"prepend_bos": "yes"}))


def test_k_of_before_version_6_is_its_functions(tmp_path: Path) -> None:
    given = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "k": 9}
    assert describe(old_saelens(tmp_path / "old", **given)).k == 3
    assert describe(saelens(tmp_path / "new", "topk", k=9, activation_fn_kwargs={"k": 3})).k == 9


@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_functions_that_do_not_go_with_an_architecture(architecture: str, tmp_path: Path) -> None:
    folder = old_saelens(tmp_path, architecture=architecture, activation_fn="topk", activation_fn_kwargs={"k": 3})
    with pytest.raises(
        UserError, match=f"activation_fn is 'topk'; raymi knows 'relu' with architecture '{architecture}'"
    ):
        describe(folder)


def test_a_transcoder_has_to_say_where_it_writes(tmp_path: Path) -> None:
    hook = "blocks.1.ln2.hook_normalized"
    folder = saelens(tmp_path / "coder", architecture="transcoder", metadata={"hook_name": hook})
    with pytest.raises(UserError, match=r"do not say which site .*\nName it as `site_out`.*blocks\.1\.hook_mlp_out"):
        check_fits(describe(folder), **FITS)
    named = describe(folder, site_out="blocks.1.hook_mlp_out")
    check_fits(named, **FITS)
    assert (named.site, named.site_out) == (hook, "blocks.1.hook_mlp_out")
    with pytest.raises(UserError, match="`site_out` is for a transcoder"):
        describe(saelens(tmp_path / "sae"), site_out="blocks.1.hook_mlp_out")


@pytest.mark.parametrize(
    ("submodule", "io", "expected"),
    [
        ("mlp_out_layer_1", "out", ("blocks.1.hook_mlp_out", None)),
        ("mlp_out_layer_1", None, ("blocks.1.hook_mlp_out", None)),
        ("mlp_out_layer_1", "in", ("blocks.1.mlp.hook_in", None)),
        ("mlp_out_layer_1", "in_and_out", ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")),
        ("resid_post_layer_0", "in", ("blocks.0.hook_resid_pre", None)),
        ("resid_post_layer_0", "in_and_out", ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post")),
        ("attention_out_layer_1", "out", ("blocks.1.hook_attn_out", None)),
        ("attention_out_layer_1", "in", (None, None)),
        (None, "out", (None, None)),
    ],
)
def test_sides_of_a_module(
    submodule: str | None, io: str | None, expected: tuple[str | None, str | None], tmp_path: Path
) -> None:
    folder = dictionary(tmp_path, submodule_name=submodule)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"buffer": {"io": io}}))
    about = describe(folder)
    assert (about.site, about.site_out) == expected
    assert about.transcoder == (io == "in_and_out")
    if expected[0] is None:
        with pytest.raises(UserError, match="do not say at which site"):
            check_fits(about, **FITS, any_model=True)


def test_a_side_that_there_is_not(tmp_path: Path) -> None:
    folder = dictionary(tmp_path, submodule_name="mlp_out_layer_1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"buffer": {"io": "up"}}))
    with pytest.raises(UserError, match="io is 'up'; raymi knows 'in', 'out' and 'in_and_out'"):
        describe(folder)


def test_a_transcoder_of_a_module_without_a_known_input(tmp_path: Path) -> None:
    folder = tmp_path / "layers.1.self_attn"
    folder.mkdir()
    with pytest.raises(UserError, match="do not say at which site"):
        check_fits(describe(sparsify(folder, transcode=True)), **FITS)


@pytest.mark.parametrize(("length", "norms", "refused"), [(1.0, True, False), (1.3, True, True), (1.3, False, False)])
def test_lengths_that_llama_scope_multiplies_with(length: float, norms: bool, refused: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = llama_scope(tmp_path, sparsity_include_decoder_norm=norms)
    file = folder / "checkpoints" / "final.safetensors"
    decoder = torch.randn(D, F, generator=torch.Generator().manual_seed(0))
    save_file(load_file(file) | {"decoder.weight": decoder / decoder.norm(dim=0) * length}, file)
    if not refused:
        load(folder)
        return
    with pytest.raises(UserError, match=r"final\.safetensors: decoder rows are up to 0\.3 off length 1"):
        load(folder)


def test_a_checkpoint_of_the_model_is_told(tmp_path: Path) -> None:
    about = describe(saelens(tmp_path, metadata={"model_from_pretrained_kwargs": {"revision": "step3000"}}))
    assert about.model_revision == "step3000"


@pytest.mark.parametrize(
    ("predicts", "refused"),
    [
        (None, False),
        ("model.layers.1.post_feedforward_layernorm.output", False),
        ("model.layers.2.post_feedforward_layernorm.output", True),
        ("model.layers.1.output", True),
    ],
)
def test_what_a_transcoder_of_gemma_scope_2_predicts(predicts: str | None, refused: bool, tmp_path: Path) -> None:
    config = {"hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output", "hf_hook_point_out": predicts}
    folder = gemma_scope_2(tmp_path / "transcoder" / "layer_1_width_16k", **config)
    if refused:
        with pytest.raises(UserError, match=r"hf_hook_point_out is 'model\.layers.*post_feedforward_layernorm"):
            describe(folder)
    else:
        assert describe(folder).site_out == "blocks.1.hook_mlp_out"


def test_what_training_left_out_of_texts_is_noted(tmp_path: Path) -> None:
    given = {"seqpos_slice": [5, None], "exclude_special_tokens": True}
    assert describe(saelens(tmp_path / "a", metadata=given)).notes == (
        "trained with seqpos_slice [5, None]",
        "trained with exclude_special_tokens True",
    )
    assert describe(saelens(tmp_path / "b", metadata={"seqpos_slice": [None]})).notes == ()

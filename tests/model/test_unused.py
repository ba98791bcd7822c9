"""What a checkpoint holds beyond the model of its config: named where it would have been computed with, else listed."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymi.model.loading import BadWeights, load
from tests.families import CONFIGS, ODD, build, prompt

USUAL = ("llama", "gpt2", "gemma2", "opt", "mixtral", "falcon", "bloom", "deepseek_v3", "qwen3_next", "recurrent_gemma")
OTHERS = tuple(family for family in {**CONFIGS, **ODD} if family not in USUAL)


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def read(folder: Path) -> tuple[str, ...]:
    """Loads without measuring what the model can be trusted with; the parts that are not built."""
    from raymi.model import loading

    model, unexpected = loading._read(folder, "org/more", torch.float32, False, False)
    return loading._check_rest(model, unexpected, folder, "org/more", False).parts


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", [*USUAL, *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)])
def test_what_a_family_writes_is_read_clean_and_what_is_added_is_named(family: str, tmp_path: Path):
    build(family).save_pretrained(tmp_path)
    assert read(tmp_path) == ()

    whole = stored(tmp_path)
    inside = {name: re.match(r"(.*?\.)(\d+)(\..*)", name) for name in whole}
    layers = {name: found for name, found in inside.items() if found}
    last = max(int(found[2]) for found in layers.values())
    start = next(iter(layers.values()))[1]
    layer = {
        f"{start}{last + 1}{found[3]}": whole[name].clone() for name, found in layers.items() if int(found[2]) == last
    }
    added = [layer, {f"{start}1.self_attn.another_norm.weight": torch.ones(8)}]
    for n_dims in (1, 2):  # of a norm, of a linear map
        without = [name for name in layers if name.endswith(".weight") and whole[name].dim() == n_dims]
        biases = [f"{name.removesuffix('weight')}bias" for name in without]
        free = [(bias, name) for bias, name in zip(biases, without, strict=True) if bias not in whole]
        added += [{bias: torch.zeros(len(whole[name]))} for bias, name in free[:1]]
    for tensors in added:
        store(tmp_path, whole | tensors)
        with pytest.raises(BadWeights, match=r"org/more: .*(more than the model of its config|has shape)") as error:
            read(tmp_path)
        first = re.search(r"[a-z]+\.\d+\.", next(iter(tensors)))
        assert first is not None
        assert first[0] in str(error.value)  # what stands around it is renamed in some families


def test_biases_that_the_config_does_not_announce(llama: Path):
    """The model without them is another one: what `allow_unused` measures, and says so by being asked for."""
    whole, projections = stored(llama), ("q_proj", "k_proj", "v_proj", "o_proj")
    biases = {
        f"model.layers.{layer}.self_attn.{one}.bias": torch.randn(
            len(whole[f"model.layers.{layer}.self_attn.{one}.weight"])
        )
        for layer in range(4)
        for one in projections
    }
    store(llama, whole | biases)
    with pytest.raises(
        BadWeights, match=r"org/b: .*layers\.0\.self_attn\.k_proj\.bias, .* and 13 more.*--allow-unused org/b"
    ):
        load(llama, name="org/b", device="cpu")
    without = load(llama, name="org/b", device="cpu", allow_unused=True).model.forward(prompt()).logits_BV
    torch.testing.assert_close(without, build("llama")(prompt()).logits[:, -1])

    edit_config(llama, attention_bias=True)
    with_them = load(llama, name="org/b", device="cpu").model.forward(prompt()).logits_BV
    assert (with_them - without).abs().max() > 0.1


def test_more_layers_than_the_config_says(llama: Path):
    edit_config(llama, num_hidden_layers=3)
    with pytest.raises(BadWeights, match=r"org/deep: .*model\.layers\.3\.input_layernorm\.weight.*and 6 more"):
        load(llama, name="org/deep", device="cpu")


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        ({"mtp.layers.0.self_attn.q_proj.weight": (32, 32), "mtp.norm.weight": (32,)}, "mtp"),
        ({"model.layers.4.eh_proj.weight": (32, 64), "model.layers.4.mlp.up_proj.weight": (48, 32)}, "model.layers.4"),
        ({"vision_tower.blocks.3.attn.qkv.bias": (96,)}, "vision_tower"),
        ({"model.visual.patch_embed.proj.weight": (8, 3, 2, 2), "model.visual.merger.bias": (8,)}, "model.visual"),
        ({"model.image_newline": (32,)}, "model.image_newline"),
        ({"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)}, "v_head"),
        ({"another_head.dense.weight": (2, 32)}, "another_head"),
    ],
)
def test_parts_beside_the_model_are_listed(extra: dict[str, tuple[int, ...]], part: str, llama: Path):
    store(llama, stored(llama) | {name: torch.randn(shape) for name, shape in extra.items()})
    loaded = load(llama, device="cpu")
    assert loaded.not_built == (part,)
    torch.testing.assert_close(loaded.model.forward(prompt()).logits_BV, build("llama")(prompt()).logits[:, -1])


@pytest.mark.parametrize(
    "extra",
    [
        "model.embed_positions.weight",
        "model.embedding_norm.weight",
        "lm_head.bias",
        "model.layers.2.mtp_gate.weight",
        "model.layers.2.self_attn.vision_query.weight",
        "model.layers.1.mlp.up_proj.weight_scale",
        "model.norm.bias",
        "model.temperature",
        "model.layers.4.mlp.up_proj.weight",
    ],
)
def test_what_would_be_computed_with_is_refused(extra: str, llama: Path):
    store(llama, stored(llama) | {extra: torch.ones(32)})
    with pytest.raises(BadWeights, match=f"org/more: .*: {re.escape(extra)}. --allow-unused"):
        read(llama)


def test_a_checkpoint_of_the_base_model_alone_is_no_exception(tmp_path: Path):
    """Names without `transformer.`: what would be beside the base model is in it."""
    build("gpt2").transformer.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["GPT2LMHeadModel"])
    assert read(tmp_path) == ()
    store(tmp_path, stored(tmp_path) | {"embedding_norm.weight": torch.ones(32)})
    with pytest.raises(BadWeights, match=r"embedding_norm\.weight"):
        read(tmp_path)


def test_constants_of_older_releases_are_no_weights(tmp_path: Path):
    build("gptj").save_pretrained(tmp_path)
    whole = stored(tmp_path)
    old = {
        f"transformer.h.{layer}.attn.{name}": value.clone()
        for layer in range(4)
        for name, value in (
            ("bias", torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()),
            ("masked_bias", torch.tensor(-1e9)),
            ("rotary_emb.inv_freq", torch.rand(2)),
        )
    }
    store(tmp_path, whole | old)
    assert read(tmp_path) == ()
    store(tmp_path, whole | {"transformer.h.0.attn.bias": torch.randn(1, 1, 64, 64)})
    with pytest.raises(BadWeights, match=r"transformer\.h\.0\.attn\.bias"):
        read(tmp_path)


def test_pickles_are_looked_at_as_well(llama: Path):
    torch.save(build("llama").state_dict() | {"model.norm.bias": torch.zeros(32)}, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(BadWeights, match=r"model\.norm\.bias"):
        load(llama, device="cpu", allow_pickle=True)
    assert load(llama, device="cpu", allow_pickle=True, allow_unused=True).not_built == ()


def pickled(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """In place of the safetensors of a folder, the same and more as pickles."""
    whole = stored(folder) | dict(tensors)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(whole, folder / "pytorch_model.bin")
        return
    place = {name: f"pytorch_model-{at % shards + 1:05}-of-{shards:05}.bin" for at, name in enumerate(whole)}
    for file in set(place.values()):
        torch.save({name: tensor for name, tensor in whole.items() if place[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_that_contradict_themselves_are_refused(llama: Path, shards: int):
    """transformers would take the one or the other, without a word."""
    name = "layers.1.mlp.up_proj.weight"
    pickled(llama, {name: stored(llama)[f"model.{name}"] + 1}, shards)
    with pytest.raises(BadWeights, match=r"up_proj.weight .*is stored more than once, with different values"):
        load(llama, device="cpu", allow_pickle=True)


def test_integers_in_pickles_are_refused(llama: Path):
    name = "model.layers.0.mlp.up_proj.weight"
    pickled(llama, {name: (stored(llama)[name] * 100).to(torch.int8)}, 2)
    with pytest.raises(BadWeights, match=r"up_proj.weight is stored as integers \(I8\)"):
        load(llama, device="cpu", allow_pickle=True)


def test_constants_in_pickles_are_known_by_their_values(llama: Path):
    mask = torch.ones(1, 1, 64, 64).tril()
    constants = {"bias": mask.bool(), "masked_bias": torch.tensor(-1e4)}
    pickled(llama, {f"model.layers.0.self_attn.{name}": tensor for name, tensor in constants.items()})
    assert load(llama, device="cpu", allow_pickle=True).not_built == ()
    torch.save(
        {**torch.load(llama / "pytorch_model.bin"), "model.layers.0.self_attn.bias": torch.randn(32)},  # noqa: TID251
        llama / "pytorch_model.bin",
    )
    with pytest.raises(BadWeights, match=r"self_attn\.bias"):
        load(llama, device="cpu", allow_pickle=True)


def in_two_files(folder: Path, second: Mapping[str, Tensor]) -> None:
    whole = stored(folder)
    (folder / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": whole, "model-00002-of-00002.safetensors": dict(second)}
    for name, tensors in files.items():
        save_file(tensors, folder / name, {"format": "pt"})
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_two_values_of_one_tensor_are_not_settled_silently(llama: Path):
    name = "model.layers.1.mlp.up_proj.weight"
    value = stored(llama)[name]
    in_two_files(llama, {name: value.clone()})
    assert read(llama) == ()
    in_two_files_again = {name: value + 1}
    save_file(in_two_files_again, llama / "model-00002-of-00002.safetensors", {"format": "pt"})
    with pytest.raises(
        BadWeights, match=r"org/more: its weights are not one model: model\.layers\.1\.mlp\.up_proj\.weight is"
    ):
        read(llama)


def test_two_names_of_one_tensor_are_not_settled_silently(llama: Path):
    whole = stored(llama)
    store(llama, whole | {"layers.1.mlp.up_proj.weight": whole["model.layers.1.mlp.up_proj.weight"] + 1})
    with pytest.raises(BadWeights, match=r"layers\.1\.mlp\.up_proj\.weight also as "):
        read(llama)


def test_experts_with_a_gap_are_not_renumbered_silently(tmp_path: Path):
    build("mixtral").save_pretrained(tmp_path)
    whole = stored(tmp_path)
    assert any(".experts.3." in name for name in whole)
    store(tmp_path, {name.replace(".experts.3.", ".experts.5."): value for name, value in whole.items()})
    with pytest.raises(BadWeights, match=r"layers\.0\..*experts\.3 is missing"):
        read(tmp_path)


def test_integers_are_not_taken_for_weights(llama: Path):
    whole, name = stored(llama), "model.layers.0.self_attn.q_proj.weight"
    store(llama, whole | {name: (100 * whole[name]).to(torch.int8)})
    with pytest.raises(
        BadWeights, match=r"org/more: .*layers\.0\.self_attn\.q_proj\.weight is stored as integers \(I8\)"
    ):
        read(llama)


def test_an_adapter_that_is_not_applied_is_named(llama: Path):
    (llama / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(BadWeights, match=r"org/a: an adapter .*--allow-unused org/a"):
        load(llama, name="org/a", device="cpu")
    assert load(llama, device="cpu", allow_unused=True).not_built == ()


def test_kinds_of_layers_that_do_not_cover_the_layers_are_refused(tmp_path: Path):
    build("cohere2").save_pretrained(tmp_path)
    edit_config(tmp_path, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    with pytest.raises(BadWeights, match="org/more"):
        read(tmp_path)

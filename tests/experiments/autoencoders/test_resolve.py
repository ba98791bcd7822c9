"""Which autoencoders a model is measured with, and what a run is pinned to."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.autoencoders.modules import in_model, meant, something_behind
from raymi.experiments.autoencoders.refs import SaeRef
from raymi.experiments.autoencoders.resolve import check_unchanged, is_current, latest, refs, renewed, resolve
from raymi.experiments.sae.spec import SaeSpec
from raymi.sae import describe
from raymi.store import schemas
from tests.fakes import add_files, add_saes, sae_files, safetensors, write_sae

MODEL = CachedModel("org/tiny", "m" * 40, Path("/m"), "llama", 2, 4, 16, 32, 64, 1000, 4000, "float32", None)
OF_LAYER_NORMS = replace(MODEL, model_type="gpt2")
COMMIT = "c" * 40
L0, L1 = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def spec(saes: Any = "*", folder: Path = Path(), **fields: Any) -> SaeSpec:
    data = {"kind": "sae", "measure": "quality", "saes": saes, **fields}
    return SaeSpec.model_validate(data, context={"folder": folder})


def found(cache: Path, *specs: SaeSpec, model: CachedModel = MODEL) -> list[SaeRef]:
    records = schemas.rows("saes", resolve(specs, model, cache_dir=cache)).to_pylist()
    return [ref for its in refs(records).values() for ref in its]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    add_saes(tmp_path / "hub", "org/saes", {"b": L1, "a": L0}, revision=COMMIT)
    return tmp_path / "hub"


def test_a_pattern_takes_what_fits_and_leaves_the_rest(cache: Path) -> None:
    add_saes(cache, "org/wide", {"x": L0}, d_in=20)
    add_saes(cache, "org/foreign", {"x": L0}, model="other")
    add_saes(cache, "org/deep", {"x": "blocks.7.hook_resid_post"})
    add_saes(cache, "org/torn", {"x": L0}, architecture="nobody knows")
    one, two = found(cache, spec())
    assert one == SaeRef("org/saes:a", f"org/saes@{COMMIT}:a", COMMIT, L0, None, 40)
    assert (two.name, two.site) == ("org/saes:b", L1)
    assert [ref.name for ref in found(cache, spec("*/saes:b"))] == ["org/saes:b"]
    assert "org/foreign:x" in [ref.name for ref in found(cache, spec(any_model=True))]


def test_when_nothing_fits_the_reasons_are_told(cache: Path) -> None:
    with pytest.raises(UserError) as error:
        found(cache, spec("org/saes:*"), model=CachedModel("my/tiny", *_rest(hidden_size=24)))
    told = str(error.value)
    assert (
        "my/tiny: experiment 'quality': of 2 SAEs in the cache that match 'org/saes:*' none fits\n  org/saes:a" in told
    )
    assert "takes 16 numbers at blocks.0.hook_resid_post, where my/tiny has 24" in told
    with pytest.raises(UserError, match=r"no SAE in the cache matches 'nobody/\*'\n`raymi sae list`"):
        found(cache, spec("nobody/*"))


def test_a_pattern_may_mean_the_autoencoders_of_other_models(cache: Path) -> None:
    other = CachedModel("org/other", *_rest())
    with pytest.raises(UserError, match=r"org/other: experiment 'quality': no.* fits this model"):
        found(cache, spec(), model=other)
    # Where there is something else to do, that is no failure.
    [record] = resolve([spec()], other, cache_dir=cache, others=True)
    assert record["sae"] is None
    assert record["note"].endswith("fits this model")
    assert refs([record]) == {"quality": ()}


def _rest(**fields: Any) -> list[Any]:
    values = {name: getattr(MODEL, name) for name in MODEL.__slots__} | fields
    return [values[name] for name in MODEL.__slots__[1:]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/saes:c", "org/saes has no 'c' in the cache"),
        ("org/saes", "there are 2 SAEs"),
        ("org/seas:a", "no repository 'org/seas'.*\nDid you mean org/saes"),
        ("org/foreign:x", "this SAE was trained on other, not on org/tiny"),
        ({"sae": "org/saes:a", "site": "blocks.9.hook_resid_post"}, "there is no blocks.9.hook_resid_post in org/tiny"),
        ({"sae": "org/saes:a", "input_scale": 2.0}, "inputs are not scaled by an average norm"),
        ("org/scaled:x", "no file of this SAE states\nName the SAE with its `input_scale`"),
        (["org/saes:a", f"org/saes@{'d' * 40}:a"], "org/saes:a is named twice, in different ways"),
    ],
)
def test_what_is_named_has_to_be_there_and_to_fit(given: Any, expected: str, cache: Path) -> None:
    add_saes(cache, "org/foreign", {"x": L0}, model="other")
    add_saes(cache, "org/scaled", {"x": L0}, normalize_activations="expected_average_only_in")
    second = cache / "models--org--saes" / "snapshots" / ("d" * 40) / "a"
    write_sae(second, L0)
    with pytest.raises(UserError, match=expected):
        found(cache, spec(given))


def test_what_the_job_says_of_one_of_them(cache: Path) -> None:
    add_saes(cache, "org/scaled", {"x": L0}, normalize_activations="expected_average_only_in")
    moved = {"sae": "org/saes:a", "site": L1}
    scaled = {"sae": "org/scaled:x", "input_scale": 2.5}
    chosen = found(cache, spec([moved, scaled, "*"]))
    # By name each is as the job has it, and the pattern brings only the others.
    assert {(ref.name, ref.site, ref.input_scale) for ref in chosen} == {
        ("org/saes:a", L1, None), ("org/scaled:x", L0, 2.5), ("org/saes:b", L1, None),
    }  # fmt: skip


def test_of_two_experiments_each_has_its_own_and_the_order_is_always_the_same(cache: Path) -> None:
    records = resolve([spec(), spec("org/saes:b", name="b")], MODEL, cache_dir=cache)
    assert refs(records) == refs(reversed(records))
    assert {name: [ref.name for ref in its] for name, its in refs(records).items()} == {
        "quality": ["org/saes:a", "org/saes:b"],
        "b": ["org/saes:b"],
    }


def test_a_branch_is_pinned_to_its_commit(cache: Path) -> None:
    [ref] = found(cache, spec("org/saes@main:a"))
    assert (ref.name, ref.where, ref.version) == ("org/saes:a", f"org/saes@{COMMIT}:a", COMMIT)
    check_unchanged(ref)


def test_a_folder_is_known_by_its_files(tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "mine" / "sae", L0)
    [ref] = found(tmp_path / "hub", spec("mine/sae", tmp_path))
    assert (ref.name, ref.where, len(ref.version)) == ("mine/sae", str(folder), 64)
    check_unchanged(ref)

    config = folder / "cfg.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"apply_b_dec_to_input": False}))
    with pytest.raises(UserError, match=r"the SAE .*mine/sae is not what it was .*\n.*--new"):
        check_unchanged(ref)
    config.write_text(before)
    check_unchanged(ref)

    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(_bytes(sae_files(L0, seed=5)["sae_weights.safetensors"]))
    os.utime(weights, ns=(1, 1))
    with pytest.raises(UserError, match="is not what it was"):
        check_unchanged(ref)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not there any more"):
        check_unchanged(ref)


def _bytes(content: bytes | str | Mapping[str, Any]) -> bytes:
    assert isinstance(content, bytes)
    return content


def test_a_feature_that_none_of_them_has(cache: Path) -> None:
    injected = {"measure": "injection", "strengths": 1}
    with pytest.raises(UserError, match=r"org/tiny: experiment 'injection': features: 40 is out of range.*\(0 to 39"):
        found(cache, spec(features=[3, 40], **injected))
    add_saes(cache, "org/more", {"x": L0}, d_sae=41)
    assert len(found(cache, spec(features=[3, 40], **injected))) == 3


NORMALISED, FED = "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in"


def add_transcoder(cache: Path) -> None:
    metadata = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": NORMALISED}
    files = sae_files(
        "", architecture="transcoder", metadata={**metadata, "hook_name_out": "blocks.1.hook_mlp_out"}, d_out=16
    )
    add_files(cache, "org/coders", {f"x/{name}": content for name, content in files.items()})


def test_a_transcoder_is_pinned_with_what_it_predicts(cache: Path, tmp_path: Path) -> None:
    add_transcoder(cache)
    [ref] = found(cache, spec("org/coders:x"), model=stored_model(tmp_path, {}, {"rms_norm_eps": 1e-6}))
    assert (ref.site, ref.site_out, ref.layer) == (NORMALISED, "blocks.1.hook_mlp_out", 1)


def test_what_a_layer_norm_gives_is_asked_for_where_versions_differ(cache: Path) -> None:
    add_transcoder(cache)
    with pytest.raises(UserError, match=rf"before version 3.*\nName it with `site: {NORMALISED}`.*`site: {FED}`"):
        found(cache, spec("org/coders:x"), model=OF_LAYER_NORMS)
    identities = list[list[object]]()
    for site in (NORMALISED, FED):
        [ref] = found(cache, spec({"sae": "org/coders:x", "site": site}), model=OF_LAYER_NORMS)
        assert ref.site == site
        identities.append(ref.identity)
    assert identities[0] == [*identities[1], "before the norm's weights"]


def test_rows_of_before_a_norms_weights_were_told_apart(cache: Path, tmp_path: Path) -> None:
    """What an MLP is fed had the other's name: right rows keep their identity, what was fed wrongly has a new one."""
    add_transcoder(cache)
    model = stored_model(tmp_path, {}, {"rms_norm_eps": 1e-6})
    hook = "layers.1.mlp"
    tensors = {"encoder.weight": (40, 16), "encoder.bias": (40,), "W_dec": (40, 16), "b_dec": (16,)}
    config = {"activation": "topk", "k": 3, "num_latents": 40, "transcode": True}
    files = {f"{hook}/sae.safetensors": safetensors(tensors), f"{hook}/cfg.json": json.dumps(config).encode()}
    add_files(cache, "org/sparse", files)
    asked = spec(["org/coders:x", f"org/sparse:{hook}"])
    rows = schemas.rows("saes", resolve([asked], model, cache_dir=cache)).to_pylist()
    assert [row["site"] for row in rows] == [NORMALISED, FED]
    assert all(map(is_current, rows))
    old = [row | {"site": NORMALISED, "before_weights": None} for row in rows]
    assert not any(map(is_current, old))
    again = schemas.rows("saes", renewed(old, [asked], model, cache_dir=cache)).to_pylist()
    assert again == rows
    assert latest([*old, *again]) == again
    key = schemas.KEYS["saes"]
    assert len({tuple(row[name] for name in key) for row in [*old, *again]}) == 4  # each is written
    lens, sparse = (ref.identity for ref in refs(again)["quality"])
    assert lens == ["org/coders:x", rows[0]["version"], NORMALISED, "blocks.1.hook_mlp_out", None,
                    "before the norm's weights"]  # fmt: skip
    assert sparse == [f"org/sparse:{hook}", rows[1]["version"], NORMALISED, "blocks.1.hook_mlp_out", None]


def test_a_job_that_calls_what_a_module_is_given_by_the_old_name(cache: Path, tmp_path: Path) -> None:
    tensors = {"encoder.weight": (40, 16), "encoder.bias": (40,), "W_dec": (40, 16), "b_dec": (16,)}
    config = {"activation": "topk", "k": 3, "num_latents": 40, "transcode": True}
    add_files(cache, "org/odd", {"x/sae.safetensors": safetensors(tensors), "x/cfg.json": json.dumps(config).encode()})
    said = {"sae": "org/odd:x", "site": NORMALISED, "site_out": "blocks.1.hook_mlp_out"}
    [ref] = found(cache, spec(said))
    assert ref.site == FED


NORMS = {
    # Names of a layer's tensors -> whether something stands between a module and the residual stream.
    "llama": (["input_layernorm", "post_attention_layernorm"], {}, False),
    "gpt2": (["ln_1", "ln_2"], {}, False),
    "cohere": (["input_layernorm"], {}, False),
    "gemma3": (["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm"], {}, True),
    "olmo2": (["post_attention_layernorm", "post_feedforward_layernorm"], {}, True),
    "glm4": (["input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm",
              "post_mlp_layernorm"], {}, True),
    "granite": (["input_layernorm", "post_attention_layernorm"], {"residual_multiplier": 0.22}, True),
    "granite of one": (["input_layernorm", "post_attention_layernorm"], {"residual_multiplier": 1.0}, False),
}  # fmt: skip


@pytest.mark.parametrize("family", NORMS)
def test_what_a_module_gives_has_a_site_of_its_own_where_a_norm_follows(family: str, tmp_path: Path) -> None:
    norms, config, behind = NORMS[family]
    model = stored_model(tmp_path, {f"model.layers.0.{norm}.weight": (16,) for norm in norms}, config)
    assert something_behind(model) == behind
    about = replace(describe(write_sae(tmp_path / "sae", L1)), site="blocks.1.hook_mlp_out", of_modules=True)
    placed = in_model(about, model)
    assert placed.site == ("blocks.1.mlp.hook_out" if behind else "blocks.1.hook_mlp_out")
    assert meant(about) == "blocks.1.mlp.hook_out"
    # What SAELens and Gemma Scope call so is what the block adds.
    assert in_model(replace(about, of_modules=False), model).site == "blocks.1.hook_mlp_out"


def stored_model(folder: Path, tensors: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> CachedModel:
    (folder / "model.safetensors").write_bytes(safetensors(dict(tensors)))
    (folder / "config.json").write_text(json.dumps(config))
    return CachedModel("org/tiny", *_rest(path=folder, weight_files=("model.safetensors",)))


def test_centred_weights_are_for_layer_norms(cache: Path, tmp_path: Path) -> None:
    metadata = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": L0,
                "model_from_pretrained_kwargs": {"center_writing_weights": True}}  # fmt: skip
    files = sae_files(L0, metadata=metadata)
    add_files(cache, "org/centred", {f"x/{name}": content for name, content in files.items()})
    [ref] = found(cache, spec("org/centred:x"), model=OF_LAYER_NORMS)
    assert ref.centred
    assert ref.identity == [ref.name, ref.version, L0, None, None, "centred"]
    with_rms = stored_model(tmp_path, {}, {"rms_norm_eps": 1e-6})
    [ref] = found(cache, spec("org/centred:x"), model=with_rms)
    assert not ref.centred  # TransformerLens leaves the weights of such a model as they are
    assert ref.identity == [ref.name, ref.version, L0, None, None]
    # What is the family's default may be left out of the config.
    for family, centred in {"llama": False, "gpt2": True, "mistral": False, "gpt_neox": True, "own_code": True}.items():
        [ref] = found(cache, spec("org/centred:x"), model=stored_model(tmp_path, {}, {"model_type": family}))
        assert ref.centred == centred, family


def test_another_checkpoint_of_the_model(cache: Path) -> None:
    metadata = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": L0,
                "model_from_pretrained_kwargs": {"revision": "step99"}}  # fmt: skip
    files = sae_files(L0, metadata=metadata)
    add_files(cache, "org/early", {f"x/{name}": content for name, content in files.items()})
    with pytest.raises(UserError, match=r"trained on revision 'step99' of its model, and org/tiny is at mmmmmmmm"):
        found(cache, spec("org/early:x"))
    assert found(cache, spec("org/early:x", any_model=True))


OLD = ("centred", "prepend_bos", "bos", "plain", "z_moved")
"""Columns that rows of an older raymi do not have."""


def test_rows_of_an_older_raymi_are_looked_up_again(cache: Path) -> None:
    metadata = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": L0,
                "model_from_pretrained_kwargs": {"center_writing_weights": True}}  # fmt: skip
    files = sae_files(L0, metadata=metadata)
    add_files(cache, "org/centred", {f"x/{name}": content for name, content in files.items()})
    experiments = [spec("org/*"), spec("org/saes:a", measure="features")]
    rows = schemas.rows("saes", resolve(experiments, OF_LAYER_NORMS, cache_dir=cache)).to_pylist()
    old = [row | dict.fromkeys(OLD) for row in rows]
    add_saes(cache, "org/later", {"x": L0})  # that the pattern would match by now
    assert not any(map(is_current, old))
    again = renewed(old, experiments, OF_LAYER_NORMS, cache_dir=cache)
    assert schemas.rows("saes", again).to_pylist() == rows
    assert latest([*old, *again]) == again
    before = {(name, ref.name): ref.identity for name, its in refs(old).items() for ref in its}
    after = {(name, ref.name): ref.identity for name, its in refs(again).items() for ref in its}
    assert {key for key in after if after[key] != before[key]} == {("quality", "org/centred:x")}


@pytest.mark.parametrize(("kind", "moved"), [("qwen3_next", True), ("bert", True), ("llama", False)])
def test_what_a_gate_stood_before_is_measured_anew(kind: str, moved: bool, cache: Path) -> None:
    """`attn.hook_z` of such families was once taken behind their gate, or from their values."""
    add_saes(cache, "org/z", {"x": "blocks.1.attn.hook_z", "y": L1})
    model = replace(MODEL, model_type=kind)
    rows = schemas.rows("saes", resolve([spec("org/z:*")], model, cache_dir=cache)).to_pylist()
    before = refs([row | dict.fromkeys(OLD) for row in rows])["quality"]
    after = refs(rows)["quality"]
    assert [ref.site for ref in after] == ["blocks.1.attn.hook_z", L1]
    assert [ref.identity != was.identity for ref, was in zip(after, before, strict=True)] == [moved, False]

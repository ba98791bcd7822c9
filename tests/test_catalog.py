import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from raymi import catalog, snapshot
from raymi.catalog import CachedModel
from raymi.errors import UserError
from tests.fakes import LLAMA, add_files, add_model, llama_shapes, safetensors

A, B = "a" * 40, "ab" * 20


def only(cache: Path, **kwargs: bool) -> CachedModel:
    [model] = catalog.scan(cache, **kwargs)
    return model


def test_describes_a_model(tmp_path: Path) -> None:
    folder = add_model(tmp_path, "org/tiny", revision=A, dtype="BF16")

    model = only(tmp_path)

    per_layer = 2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16
    assert model == CachedModel(
        id="org/tiny",
        revision=A,
        path=folder,
        model_type="llama",
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        hidden_size=16,
        intermediate_size=32,
        head_dim=4,
        vocab_size=32,
        context=64,
        parameters=32 * 16 + 2 * per_layer + 16,
        size_on_disk=sum(file.stat().st_size for file in folder.iterdir()),
        dtype="bfloat16",
        reason=None,
        weight_files=("model.safetensors",),
    )
    assert model.runnable


def test_models_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    for id in ("org/b", "gpt2", "org/a--x"):
        add_model(tmp_path, id)
    (tmp_path / "datasets--org--data" / "snapshots" / A).mkdir(parents=True)
    (tmp_path / ".locks").mkdir()
    assert [model.id for model in catalog.scan(tmp_path)] == ["gpt2", "org/a/x", "org/b"]


def test_repositories_of_autoencoders_are_no_broken_models(tmp_path: Path) -> None:
    add_model(tmp_path, "org/model")
    add_files(tmp_path, "org/sae", {"cfg.json": "{}", "model.safetensors": b"weights"})
    add_files(tmp_path, "org/scope", {"README.md": "", "layer_0/width_16k/average_l0_105/params.npz": b"weights"})
    assert [model.id for model in catalog.scan(tmp_path)] == ["org/model"]
    (tmp_path / "models--org--scope" / "blobs" / "0123.incomplete").write_bytes(b"half of something")
    assert [model.id for model in catalog.scan(tmp_path)] == ["org/model", "org/scope"]


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    add_model(tmp_path, "whole")
    add_model(tmp_path, "shards", shards=3)
    shards, whole = catalog.scan(tmp_path)
    assert shards.weight_files == tuple(f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3))
    assert shards.parameters == whole.parameters
    assert shards.runnable


def damage(change: Callable[[Path], object], **kwargs: Any) -> Callable[[Path], object]:
    """A maker of a cache with one model to which something was done."""
    return lambda cache: change(add_model(cache, "org/tiny", **kwargs))


def config(**changes: Any) -> Callable[[Path], object]:
    """A maker of a cache with one model of another config; a field that is None is left out."""
    fields = {name: value for name, value in (LLAMA | changes).items() if value is not None}
    return lambda cache: add_model(cache, "org/tiny", fields)


def shorten(file: Path, by: int) -> None:
    file.resolve().write_bytes(file.read_bytes()[:-by])


def drop(*names: str) -> Callable[[Path], object]:
    return damage(lambda folder: [(folder / name).unlink() for name in names], shards=2)


def lose_blob(name: str) -> Callable[[Path], object]:
    return damage(lambda folder: (folder / name).resolve().unlink())


def no_weights(*, interrupted: bool = False, **files: str) -> Callable[[Path], object]:
    def make(cache: Path) -> None:
        add_model(cache, "org/tiny", tensors={}, files=files)
        if interrupted:
            (cache / "models--org--tiny" / "blobs" / "0123.incomplete").write_bytes(b"half")

    return make


def file(content: bytes) -> Callable[[Path], object]:
    return lambda cache: add_model(cache, "org/tiny", tensors={}, files={"model.safetensors": content})


def header(content: object, tail: bytes = b"") -> Callable[[Path], object]:
    text = json.dumps(content).encode()
    return file(len(text).to_bytes(8, "little") + text + tail)


REMOTE = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
CANNOT_RUN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (drop("config.json"), "incomplete snapshot: config.json is missing"),
    "config is no JSON": (
        lambda cache: add_model(cache, "org/tiny", files={"config.json": "{"}),
        "corrupt file: config.json is not JSON",
    ),
    "config is no object": (
        lambda cache: add_model(cache, "org/tiny", files={"config.json": "[]"}),
        "corrupt file: config.json is not a JSON object",
    ),
    "lost shard": (
        drop("model-00002-of-00002.safetensors"),
        "incomplete snapshot: 1 of 2 weight files missing (model-00002-of-00002.safetensors)",
    ),
    "broken link": (lose_blob("model.safetensors"), "incomplete snapshot: model.safetensors is a broken link"),
    "broken link of the tokenizer": (
        lose_blob("tokenizer.json"),
        "incomplete snapshot: tokenizer.json is a broken link",
    ),
    "no weights": (no_weights(), "incomplete snapshot: it holds no weights"),
    "interrupted": (
        no_weights(interrupted=True),
        "incomplete snapshot: it holds no weights (download interrupted)",
    ),
    "other formats": (
        no_weights(**{"model.gguf": "GGUF"}),
        "holds GGUF weights, as llama.cpp takes them (model.gguf), none that transformers loads",
    ),
    "outputs without names": (config(return_dict=False), "config.json has return_dict: false, where true is needed"),
    "pickles": (no_weights(**{"pytorch_model.bin": "PK"}), "pickle weights only"),
    "an index of nothing": (
        no_weights(**{"model.safetensors.index.json": "{}"}),
        "corrupt file: model.safetensors.index.json names no weights",
    ),
    "ref to nowhere": (
        damage(lambda folder: shutil.rmtree(folder)),
        "incomplete snapshot: its folder is missing",
    ),
    "nothing but a folder": (
        lambda cache: (cache / "models--org--tiny").mkdir(),
        "incomplete snapshot: its folder is missing",
    ),
    "truncated data": (
        damage(lambda folder: shorten(folder / "model.safetensors", 100)),
        "truncated file: model.safetensors has ",
    ),
    "truncated header": (
        file(safetensors(llama_shapes())[:500]),
        "truncated file: model.safetensors ends within its header",
    ),
    "bytes left over": (
        file(safetensors(llama_shapes()) + b"x"),
        "corrupt file: model.safetensors is not in safetensors format",
    ),
    "empty file": (file(b""), "corrupt file: model.safetensors is not in safetensors format"),
    "LFS pointer": (
        file(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"),
        "corrupt file: model.safetensors is not in safetensors format",
    ),
    "header is a list": (header([]), "corrupt file: model.safetensors is not in safetensors format"),
    "tensor without a shape": (
        header({"w": {"dtype": "F32", "data_offsets": [0, 0]}}),
        "corrupt file: model.safetensors is not in safetensors format",
    ),
    "shape of text": (
        header({"w": {"dtype": "F32", "shape": "big", "data_offsets": [0, 0]}}),
        "corrupt file: the header of model.safetensors does not describe tensors",
    ),
    "no tokenizer": (lambda cache: add_model(cache, "org/tiny", tokenizer=False), "no tokenizer"),
    "half a tokenizer": (
        lambda cache: add_model(cache, "org/tiny", tokenizer=False, files={"vocab.json": "{}"}),
        "no tokenizer",
    ),
    "encoder": (config(model_type="vit", architectures=["ViTModel"]), "not a causal LM (vit)"),
    "masked LM": (config(model_type="bert", architectures=["BertForMaskedLM"]), "not a causal LM (BertForMaskedLM)"),
    "no head": (config(architectures=["LlamaModel"]), "not a causal LM (LlamaModel)"),
    "reward model": (
        config(architectures=["LlamaForSequenceClassification"]),
        "not a causal LM (LlamaForSequenceClassification)",
    ),
    "encoder-decoder": (
        config(model_type="bart", architectures=["BartForConditionalGeneration"], is_encoder_decoder=True),
        "not a causal LM (bart is an encoder and a decoder)",
    ),
    "conditional generation without a text model": (
        config(architectures=["LlamaForConditionalGeneration"]),
        "not a causal LM (LlamaForConditionalGeneration)",
    ),
    "remote code": (config(model_type="own", **REMOTE), "needs remote code"),
    "remote code for something else": (
        config(model_type="own", auto_map={"AutoModel": "modeling_own.Own"}),
        "unknown type: own",
    ),
    "unknown type": (config(model_type="own"), "unknown type: own"),
    "type of another kind": (config(model_type=7), "unknown type: config.json names no model_type"),
    "no type": (config(model_type=None), "unknown type: config.json names no model_type"),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised weights (gptq) are not supported",
    ),
}


@pytest.mark.parametrize("case", CANNOT_RUN)
def test_says_why_a_model_cannot_run(tmp_path: Path, case: str) -> None:
    make, reason = CANNOT_RUN[case]
    make(tmp_path)

    model = only(tmp_path)

    assert model.id == "org/tiny"
    assert (model.reason or "").startswith(reason) if reason.endswith(" ") else model.reason == reason
    assert not model.runnable
    assert catalog.find("org/tiny", tmp_path) == model


CAN_RUN: dict[str, Callable[[Path], object]] = {
    "code that comes along but is not needed": config(**REMOTE),
    "no architectures": config(architectures=None),
    "slow tokenizer": lambda cache: add_model(
        cache, "org/tiny", tokenizer=False, files={"vocab.json": "{}", "merges.txt": ""}
    ),
    "pickles beside safetensors": lambda cache: add_model(cache, "org/tiny", files={"pytorch_model.bin": "PK"}),
    "a README that was lost": lambda cache: (add_model(cache, "org/tiny") / "README.md").symlink_to("nowhere"),
    "no ref, as after a fetch of a commit": lambda cache: add_model(cache, "org/tiny", refs=()),
    "an empty ref": lambda cache: (
        add_model(cache, "org/tiny"),
        (cache / "models--org--tiny" / "refs" / "main").write_text(""),
    ),
    "a ref with a newline": lambda cache: (
        add_model(cache, "org/tiny", revision=A),
        (cache / "models--org--tiny" / "refs" / "main").write_text(A + "\n"),
    ),
    "an old revision in pieces": lambda cache: (
        (add_model(cache, "org/tiny", revision=B, refs=()) / "config.json").resolve().unlink(),
        add_model(cache, "org/tiny", LLAMA | {"note": "new"}, revision=A),
    ),
    "a left-over of another download": lambda cache: (
        add_model(cache, "org/tiny"),
        (cache / "models--org--tiny" / "blobs" / "0123.incomplete").write_bytes(b"half"),
    ),
}


@pytest.mark.parametrize("case", CAN_RUN)
def test_runs_all_the_same(tmp_path: Path, case: str) -> None:
    CAN_RUN[case](tmp_path)
    assert only(tmp_path).reason is None


def test_what_was_asked_for_by_name_can_run(tmp_path: Path) -> None:
    add_model(tmp_path, "code", LLAMA | {"model_type": "own"} | REMOTE)
    add_model(tmp_path, "pickle", tensors={}, files={"pytorch_model.bin": "PK"})

    code, pickle = catalog.scan(tmp_path, allow_pickle=True, trust_remote_code=True)

    assert (code.runnable, code.needs_remote_code, code.pickle_only) == (True, True, False)
    assert (pickle.runnable, pickle.needs_remote_code, pickle.pickle_only) == (True, False, True)
    assert pickle.parameters is None  # a pickle is not opened to count
    assert not catalog.find("pickle", tmp_path, trust_remote_code=True).runnable
    assert not catalog.find("code", tmp_path, allow_pickle=True).runnable


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int | None]]] = {
    "GPT-2": (
        {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257},
        {"n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "hidden_size": 768, "head_dim": 64, "context": 1024,
         "intermediate_size": 3072, "vocab_size": 50257},
    ),
    "GPT-Neo": (
        {"model_type": "gpt_neo", "num_layers": 24, "num_heads": 16, "hidden_size": 2048, "vocab_size": 50257},
        {"n_layers": 24, "n_heads": 16, "head_dim": 128},
    ),
    "MPT": (
        {"model_type": "mpt", "n_layers": 32, "n_heads": 32, "d_model": 4096, "max_seq_len": 2048, "vocab_size": 50432},
        {"n_layers": 32, "n_heads": 32, "hidden_size": 4096, "context": 2048},
    ),
    "Falcon 7B": (
        {"model_type": "falcon", "num_hidden_layers": 32, "num_attention_heads": 71, "num_kv_heads": 71,
         "multi_query": True, "hidden_size": 4544, "vocab_size": 65024},
        {"n_heads": 71, "n_kv_heads": 1, "head_dim": 64},
    ),
    "Falcon 40B": (
        {"model_type": "falcon", "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
         "multi_query": True, "new_decoder_architecture": True, "hidden_size": 8192, "vocab_size": 65024},
        {"n_kv_heads": 8},
    ),
    "Gemma 3, which leaves its heads to the class": (
        {"model_type": "gemma3", "vision_config": {"num_attention_heads": 16, "num_hidden_layers": 27},
         "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                         "num_hidden_layers": 34}},
        {"n_layers": 34, "n_heads": 8, "n_kv_heads": 4, "head_dim": 256, "vocab_size": 262208, "hidden_size": 2560,
         "intermediate_size": 10240, "context": 131072},
    ),
    "Gemma 3, nested, with heads but without key heads": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 62,
                                                 "num_attention_heads": 32, "vocab_size": 262208}},
        {"n_layers": 62, "n_heads": 32, "n_kv_heads": 4},
    ),
    "Mamba has no heads": (
        {"model_type": "mamba", "num_hidden_layers": 24, "hidden_size": 768, "vocab_size": 50280},
        {"n_layers": 24, "n_heads": None, "n_kv_heads": None, "head_dim": None},
    ),
    "nothing to go by": ({}, {"n_layers": None, "n_heads": None, "intermediate_size": None}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_the_sizes_of_a_family(family: str) -> None:
    given_config, expected = FAMILIES[family]
    found = snapshot.sizes(given_config)
    assert {size: found[size] for size in expected} == expected


def test_a_multimodal_checkpoint_of_a_causal_family_runs(tmp_path: Path) -> None:
    nested = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    add_model(tmp_path, "org/tiny", nested | {"text_config": LLAMA | {"model_type": "gemma3_text"}})
    assert only(tmp_path).runnable


PARAMETERS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], int]] = {
    "tied": ({"embed.weight": (10, 4)}, {"tie_word_embeddings": True}, 40),
    "tied and stored twice": ({"embed.weight": (10, 4), "lm_head.weight": (10, 4)}, {"tie_word_embeddings": True}, 40),
    "tied, the head alone stored": ({"norm": (4,), "lm_head.weight": (10, 4)}, {"tie_word_embeddings": True}, 44),
    "untied": ({"embed.weight": (10, 4), "lm_head.weight": (10, 4)}, {"tie_word_embeddings": False}, 80),
    "masks of GPT-2 and NeoX": ({"w": (3,), "h.0.attn.bias": (1, 1, 8, 8), "h.0.attn.masked_bias": ()}, {}, 3),
    "rotary frequencies": ({"w": (3,), "layers.0.rotary_emb.inv_freq": (8,)}, {}, 3),
    "a scalar": ({"scale": ()}, {}, 1),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_counts_parameters(tmp_path: Path, case: str) -> None:
    shapes, tying, expected = PARAMETERS[case]
    add_model(
        tmp_path, "org/tiny", {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"} | tying, tensors=shapes
    )
    assert only(tmp_path).parameters == expected


def test_dtype_is_the_one_of_most_bytes(tmp_path: Path) -> None:
    big, small = safetensors({"big": (100,)}, dtype="F16"), safetensors({"small": (10,)})
    index = {"weight_map": {"big": "model-1-of-2.safetensors", "small": "model-2-of-2.safetensors"}}
    files = {"model.safetensors.index.json": index, "model-1-of-2.safetensors": big, "model-2-of-2.safetensors": small}
    add_model(tmp_path, "org/tiny", tensors={}, files=files)
    assert (only(tmp_path).dtype, only(tmp_path).parameters) == ("float16", 110)


REVISIONS = [
    ("org/tiny", A),
    ("org/tiny@main", A),
    ("org/tiny@v1.0", B),
    ("org/tiny@refs/pr/1", B),
    (f"org/tiny@{B}", B),
    ("org/tiny@abab", B),
    ("org/tiny@ABAB", B),
    ("org/tiny@aa", A),
]


@pytest.mark.parametrize(("ref", "revision"), REVISIONS)
def test_finds_a_revision(tmp_path: Path, ref: str, revision: str) -> None:
    add_model(tmp_path, "org/tiny", revision=A)
    add_model(tmp_path, "org/tiny", LLAMA | {"num_hidden_layers": 5}, revision=B, refs=("v1.0", "refs/pr/1"))

    model = catalog.find(ref, tmp_path)

    assert (model.revision, model.n_layers) == (revision, 2 if revision == A else 5)


NOT_FOUND = [
    ("org/tiny@a", "model 'org/tiny': 2 revisions begin with 'a' in the cache", "aaaaaaaa, abababab"),
    ("org/tiny@v2", "model 'org/tiny': there is no revision 'v2' in the cache", "main, aaaaaaaa, abababab"),
    ("org/tinny", "no model 'org/tinny' in ", "Did you mean org/tiny?"),
    ("tiny", "no model 'tiny' in ", "Did you mean org/tiny?"),
    ("ORG/TINY", "no model 'ORG/TINY' in ", "Did you mean org/tiny?"),
    ("meta/other", "no model 'meta/other' in ", "`raymi fetch meta/other`"),
    ("", "no model '' in ", "raymi models"),
]


@pytest.mark.parametrize(("ref", "what", "hint"), NOT_FOUND)
def test_what_is_not_there_is_named_with_what_comes_near(tmp_path: Path, ref: str, what: str, hint: str) -> None:
    add_model(tmp_path, "org/tiny", revision=A)
    add_model(tmp_path, "org/tiny", LLAMA | {"note": 1}, revision=B, refs=())
    with pytest.raises(UserError) as error:
        catalog.find(ref, tmp_path)
    assert error.value.what.startswith(what)
    assert hint in (error.value.hint or "")


def test_without_main_the_newest_snapshot_stands_for_the_model(tmp_path: Path) -> None:
    for revision, seconds in ((A, 2_000_000_000), (B, 1_000_000_000)):
        os.utime(add_model(tmp_path, "org/tiny", revision=revision, refs=()), (seconds, seconds))
    assert only(tmp_path).revision == A


def test_an_empty_or_absent_cache_has_no_models(tmp_path: Path) -> None:
    assert catalog.scan(tmp_path) == []
    assert catalog.scan(tmp_path / "absent") == []


def test_a_cache_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be read"):
        catalog.scan(tmp_path / "file")


REPOSITORY = [
    ".gitattributes", "README.md", "config.json", "generation_config.json", "merges.txt", "vocab.json",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_own.py", "onnx/model.onnx",
    "onnx/config.json", "original/consolidated.00.pth", "consolidated.safetensors", "model.fp16.safetensors",
    "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.gguf",
]  # fmt: skip
SMALL = ["chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "modeling_own.py",
         "tokenizer.json", "tokenizer_config.json", "vocab.json"]  # fmt: skip
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
PICKLES = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], ["pytorch_model.bin"]),
        (["model.safetensors"], ["model.safetensors"]),
        (SHARDS, SHARDS),
        (PICKLES, ["pytorch_model.bin"]),
        ([*PICKLES, *SHARDS], SHARDS),
        ([*SHARDS, "model.safetensors"], ["model.safetensors"]),
    ],
)
def test_takes_the_files_it_needs_and_one_form_of_the_weights(more: list[str], expected: list[str]) -> None:
    assert snapshot.files_needed([*REPOSITORY, *more]) == sorted([*SMALL, *expected])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*LLAMA, "text_config"]), inner),
    max_leaves=8,
)
KEYS = [*LLAMA, "text_config", "auto_map", "quantization_config", "is_encoder_decoder", "multi_query"]
TENSOR = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON | st.just([0, 0]) | st.just([1, 1]))


@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON), tensors=JSON | st.dictionaries(st.text(max_size=2), TENSOR)
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_makes_it_fail(tmp_path: Path, changes: dict[str, Any], tensors: object) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    text = json.dumps(tensors).encode()
    weights = len(text).to_bytes(8, "little") + text
    add_files(tmp_path, "org/tiny", {"config.json": json.dumps(LLAMA | changes), "model.safetensors": weights})
    assert only(tmp_path).reason  # there is no tokenizer, whatever else


def test_knows_the_types_that_transformers_knows() -> None:
    code = """
import json
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
print(json.dumps([list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()), sorted(MODEL_MAPPING_NAMES)]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    causal, base = json.loads(out.stdout)
    assert dict(causal) == snapshot.causal_types()
    assert set(base) <= snapshot.known_types()


def test_the_fake_files_are_what_safetensors_reads() -> None:
    shapes = llama_shapes()
    tensors = load(safetensors(shapes, dtype="F16"))
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes

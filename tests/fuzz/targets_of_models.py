"""Models in a cache, and sparse autoencoders of every format."""

import io
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from raymi import catalog, reach
from raymi.cli.models import record
from raymi.errors import UserError
from raymi.job import Job, make_job
from raymi.plan.selection import selected
from raymi.plan.units import units as units_of
from raymi.sae import discover, load
from raymi.sae.autoencoder import SAE
from raymi.sae.loading import tensors
from tests.fakes import LLAMA, TOKENIZER, llama_shapes, safetensors
from tests.fuzz.guard import Wrong
from tests.fuzz.inputs import Files
from tests.fuzz.targets import Target
from tests.fuzz.targets_of_jobs import tokens

COMMIT = "0" * 40
REPO = "cache/models--org--one"
AT = f"{REPO}/snapshots/{COMMIT}"
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 16,
        "n_positions": 64,
        "vocab_size": 32,
    },
    "gemma3": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            "model_type": "gemma3_text",
            "num_hidden_layers": 3,
            "hidden_size": 16,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    },
    "hybrid": {
        "model_type": "jamba",
        "architectures": ["JambaForCausalLM"],
        "num_hidden_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "vocab_size": 32,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "layers_block_type": ["mamba", "attention", "mamba", "attention"],
        "quantization_config": None,
    },
    "by layer": {
        **LLAMA,
        "num_attention_heads_per_layer": [4, 2],
        "per_layer_config": {"1": {"num_attention_heads": 2}},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "attention_chunk_size": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "auto_map": {},
    },
}


@cache
def models() -> dict[str, Files]:
    weights = safetensors(llama_shapes())
    beside = {
        f"{AT}/tokenizer.json": json.dumps(TOKENIZER).encode(),
        f"{REPO}/refs/main": COMMIT.encode(),
    }
    found = {
        name: {**beside, f"{AT}/config.json": json.dumps(config).encode(), f"{AT}/model.safetensors": weights}
        for name, config in CONFIGS.items()
    }
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    shards = {"model.safetensors.index.json": json.dumps(index).encode(), "model-00001-of-00001.safetensors": weights}
    shared = {f"{AT}/{name}": data for name, data in shards.items()}
    return found | {"shards": {**beside, f"{AT}/config.json": json.dumps(LLAMA).encode(), **shared}}


def question() -> Job:
    every = {"each": "all"}
    spec = {"kind": "knockout", "layers": every, "heads": every, "queries": "last", "keys": "first"}
    middle = {"kind": "knockout", "name": "middle", "layers": "middle"}
    return make_job({"name": "x", "prompts": [{"id": "a", "text": "The capital"}], "experiments": [spec, middle]})


def read_models(folder: Path) -> None:
    cache = folder / "cache"
    for model in catalog.scan(cache):
        json.dumps(record(model))
        try:
            again = catalog.find(model.id, cache)
        except UserError as error:
            raise Wrong("a model that is listed is not found") from error
        if again != model:
            raise Wrong("a model is another when it is looked at again")
        if not model.runnable:
            continue
        if not model.n_layers or model.n_layers < 0 or (model.n_heads is not None and model.n_heads <= 0):
            raise Wrong("a model without layers or heads can run")
        reach.reaches(json.loads((model.path / "config.json").read_bytes()), model.n_layers)
        job = question()
        try:
            selected(job, [model], {model.id: model}.__getitem__)
            prompts = [tokens(prompt, job) for prompt in job.prompts]
            units = [unit for spec in job.experiments for unit in units_of(job, spec, model, prompts)]
        except UserError:
            continue
        lengths = {prompt.prompt.id: len(prompt.token_ids) for prompt in prompts}
        reach.closed(model.path, model.n_layers, units, lengths)


MODEL = Target("model", models, read_models, left=(f"{AT}/tokenizer.json",))

# -- autoencoders ----------------------------------------------------------------------------------------------------

D, F = 4, 8
WHERE = "sae"


def numbers(*shape: int) -> Any:
    return (np.random.default_rng([len(shape), *shape]).standard_normal(shape) / 2).astype(np.float32)


def own(**more: Any) -> dict[str, Any]:
    return {"W_enc": numbers(D, F), "W_dec": numbers(F, D), "b_enc": numbers(F), "b_dec": numbers(D), **more}


def as_safetensors(tensors: dict[str, Any]) -> bytes:
    from safetensors.numpy import save

    return save(tensors)


def as_npz(tensors: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    np.savez(out, **tensors)
    return out.getvalue()


def as_pickle(tensors: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, out)
    return out.getvalue()


def lens(architecture: str, tensors: dict[str, Any], **config: Any) -> Files:
    metadata = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"}
    about = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "apply_b_dec_to_input": True}
    about |= {"normalize_activations": "none", **config, "metadata": metadata}
    return {
        f"{WHERE}/cfg.json": json.dumps(about).encode(),
        f"{WHERE}/sae_weights.safetensors": as_safetensors(tensors),
    }


@cache
def saes() -> dict[str, Files]:
    gated = {name: numbers(F) for name in ("b_gate", "b_mag", "r_mag")}
    linear = {"encoder.weight": numbers(F, D), "encoder.bias": numbers(F), "b_dec": numbers(D)}
    old = {
        "hook_point": "blocks.1.hook_resid_pre",
        "d_in": D,
        "d_sae": F,
        "model_name": "tiny",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "normalize_activations": "expected_average_only_in",
        "prepend_bos": True,
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }
    scope2 = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-v3-1b-pt",
        "affine_connection": False,
        "hf_hook_point_in": "model.layers.3.output",
        "hf_hook_point_out": "model.layers.3.output",
    }
    llama = {
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "jump_relu_threshold": 0.1,
        "dataset_average_activation_norm": {"in": 2.0, "out": 3.0},
        "hook_point_in": "blocks.1.hook_resid_post",
        "hook_point_out": "blocks.1.hook_resid_post",
        "sparsity_include_decoder_norm": False,
    }
    sparsify = {"activation": "topk", "num_latents": F, "k": 3, "signed": False, "transcode": False}
    trainer = {
        "dict_class": "AutoEncoderTopK",
        "activation_dim": D,
        "dict_size": F,
        "k": 3,
        "lm_name": "org/tiny",
        "submodule_name": "resid_post_layer_1",
    }
    small = own(threshold=numbers(F))
    return {
        "standard": lens("standard", own()),
        "jumprelu": lens("jumprelu", own(threshold=numbers(F))),
        "topk": lens("topk", own(), k=3, rescale_acts_by_decoder_norm=True),
        "gated": lens("gated", {name: array for name, array in {**own(), **gated}.items() if name != "b_enc"}),
        "transcoder": lens("skip_transcoder", own(W_skip=numbers(D, D)), hook_name_out="blocks.1.hook_mlp_out"),
        "before 6": {
            f"{WHERE}/cfg.json": json.dumps(old).encode(),
            f"{WHERE}/sae_weights.safetensors": as_safetensors(own()),
        },
        "gemma scope": {"gemma-scope-2b-pt-res/layer_1/params.npz": as_npz(own(threshold=numbers(F)))},
        "gemma scope 2": {
            f"{WHERE}/config.json": json.dumps(scope2).encode(),
            f"{WHERE}/params.safetensors": as_safetensors({name.lower(): array for name, array in small.items()}),
        },
        "llama scope": {
            f"{WHERE}/hyperparams.json": json.dumps(llama).encode(),
            f"{WHERE}/checkpoints/final.safetensors": as_safetensors(
                {
                    "encoder.weight": numbers(F, D),
                    "encoder.bias": numbers(F),
                    "decoder.weight": numbers(D, F),
                    "decoder.bias": numbers(D),
                }
            ),
        },
        "sparsify": {
            f"{WHERE}/cfg.json": json.dumps(sparsify).encode(),
            f"{WHERE}/sae.safetensors": as_safetensors({**linear, "W_dec": numbers(F, D)}),
        },
        "dictionary": {
            f"{WHERE}/config.json": json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}}).encode(),
            f"{WHERE}/ae.pt": as_pickle(
                {**linear, "decoder.weight": numbers(D, F), "k": np.array(3), "threshold": np.array(0.1, np.float32)}
            ),
        },
    }


def read_sae(folder: Path) -> None:
    [where] = list(folder.iterdir()) or [folder]
    for found in discover.scan(where):
        if (found.description is None) == (found.reason is None):
            raise Wrong("an autoencoder that is neither described nor refused")
    about = discover.describe(where)
    scale = 0.5 if about.normalisation == "expected_average_only_in" and about.input_scale is None else None
    right(load(where, input_scale=scale))


def right(sae: SAE) -> None:
    """Features of the simplest kinds as one line of algebra has them, and shapes of all."""
    about = sae.about
    if about.d_in * about.d_sae > 100_000:
        return
    x = torch.linspace(-1, 1, 3 * about.d_in).reshape(3, about.d_in)
    try:
        features = sae.encode(x)
        given = sae.reconstruct(x)
    except (UserError, ValueError) as error:  # what is not finite is no feature
        if "finite" in str(error) or "NaN" in str(error):
            return
        raise
    if features.shape != (3, about.d_sae) or given.shape[0] != 3:
        raise Wrong("features of another shape")
    plain = about.normalisation == "none" and not about.apply_b_dec_to_input and not about.centred
    if about.activation == "relu" and plain:
        found = tensors(about)
        expected = torch.relu(x @ found["W_enc"].float() + found["b_enc"].float())
        if not torch.allclose(features, expected, atol=1e-5, rtol=1e-4, equal_nan=True):
            raise Wrong("other features")


def of_pickle(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """Tensors of other kinds and shapes, and what is no tensor."""
    loaded: dict[Any, Any] = torch.load(io.BytesIO(data), weights_only=True)  # noqa: TID251
    name = rng.choice(list(loaded))
    values = [
        None,
        1,
        "x",
        [1],
        {},
        torch.zeros(0),
        torch.tensor(1.5),
        loaded[name].double(),
        loaded[name].T,
        loaded[name][None],
        loaded[name] * float("nan"),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(F, D).to_sparse(),
    ]
    match rng.randrange(5):
        case 0:
            del loaded[name]
        case 1:
            loaded[rng.choice([f"{name}x", 3, "k"])] = loaded.pop(name)
        case 2:
            out = io.BytesIO()
            torch.save(rng.choice([[], {}, None, loaded[name], {"a": loaded}, "x"]), out)
            return out.getvalue()
        case _:
            loaded[name] = rng.choice(values)
    out = io.BytesIO()
    torch.save(loaded, out, _use_new_zipfile_serialization=rng.random() < 0.7)
    return out.getvalue()


SAES = Target("sae", saes, read_sae, alone={"ae.pt": of_pickle})

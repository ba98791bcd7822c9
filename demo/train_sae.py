"""Train the demo's sparse autoencoder: a TopK one on a middle layer of the demo model, on text that Python carries.

    python demo/train_sae.py [--cache-dir DIR] [--out DIR] [--texts DIR] [--steps N] [--threads N]

The text is that of `pydoc_data.topics`, the language reference that `help()` shows. Some of its topics are held out: no
paragraph of theirs is ever trained on, though topics quote one another. It writes SAELens's format (`cfg.json`,
`sae_weights.safetensors`), a README.md that says how it was made and how good it is, and the text that was held out.

Legend: C chunks, T positions, D width of the residual stream, F features, N tokens, K active features, M dead ones.
"""

import argparse
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: `demo` is here, in no package

from demo.models import DEMO_MODELS, DEMO_SAE, cache_directory

MODEL = DEMO_MODELS[0]
LAYER = 15
SITE = f"blocks.{LAYER}.hook_resid_post"
CONTEXT = 128
"""Tokens of a chunk."""
WIDTH = 4
"""Features per dimension."""
K = 32
SEED = 0
HELD_OUT = (
    *("assignment", "augassign", "binary", "calls", "comparisons", "debugger", "dynamic-features", "exceptions"),
    *("execmodel", "import", "in", "naming", "objects", "raise", "strings", "typesmapping"),
)
"""Topics that are not trained on: a fourth of the text."""


@dataclass(frozen=True, slots=True)
class Training:
    """How it is trained."""

    steps: int = 600
    batch: int = 2048
    """Tokens."""
    rate: float = 2e-3
    """Of Adam; it rises over the first steps, and falls to nothing over the last third."""
    dead_after: int = 100_000
    """Tokens at which a feature was silent before it is called back."""
    dead_k: int = 64
    """Dead features that learn at a time what the others leave."""
    dead_share: float = 1 / 32
    """Of the loss."""


# ---- text ------------------------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    training: str
    held_out: str


def split(topics: Mapping[str, str], held_out: Sequence[str] = HELD_OUT) -> Texts:
    """Every paragraph once, in the order of the topics: those of the topics that are held out, and all others.

    Raises:
        KeyError: for a topic that there is not.
    """
    kept = {paragraph.strip(): paragraph for name in held_out for paragraph in _paragraphs(topics[name])}
    others = (paragraph for name in sorted(set(topics) - set(held_out)) for paragraph in _paragraphs(topics[name]))
    learnt = {paragraph.strip(): paragraph for paragraph in others if paragraph.strip() not in kept}
    return Texts(*("\n\n".join(paragraphs.values()) + "\n" for paragraphs in (learnt, kept)))


def _paragraphs(text: str) -> Iterator[str]:
    return (part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip())


# ---- activations -----------------------------------------------------------------------------------------------------


def chunks(tokenizer: Any, text: str) -> Tensor:
    """Token ids, cut to whole chunks without any token of the tokenizer's own: int64 [C, T]."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)


@torch.inference_mode()
def activations(model: Any, ids_CT: Tensor, layer: int = LAYER) -> Tensor:
    """What the layer hands on, [C, T, D]. The model forgets its later layers."""
    model.model.layers = model.model.layers[: layer + 1]
    caught: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: Any) -> None:
        caught.append(output if isinstance(output, Tensor) else output[0])

    handle = model.model.layers[layer].register_forward_hook(keep)
    try:
        for ids in ids_CT.split(16):
            model.model(ids, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(caught).clone()


# ---- training --------------------------------------------------------------------------------------------------------


def train(x_ND: Tensor, d_sae: int, k: int = K, how: Training | None = None, seed: int = SEED) -> dict[str, Tensor]:
    """Trains a TopK autoencoder with decoder rows of length 1.

    A token's error counts relative to the square of its length, where that is beyond the usual. First tokens are a
    hundred times as long as others: so a feature learns them, and they do not drown the rest.

    Args:
        x_ND: activations.
        d_sae: F.
        k: how many features a token may have.
        how: steps and rates.
        seed: of the order of the tokens and of the first weights.

    Returns:
        W_enc [D, F], W_dec [F, D], b_enc [F] and b_dec [D], float32, for activations as they were given.
    """
    how = how or Training()
    random = torch.Generator().manual_seed(seed)
    scale = x_ND.shape[1] ** 0.5 / float(x_ND.norm(dim=-1).median())
    x_ND = x_ND * scale
    weight_N = (x_ND.shape[1] / x_ND.square().sum(-1)).clamp(max=1.0)
    weights = _beginning(x_ND[weight_N > 0.5].mean(0), d_sae, random)
    adam = torch.optim.Adam(weights.values(), lr=how.rate, betas=(0.9, 0.99))
    silent_F = torch.zeros(d_sae, dtype=torch.int64)
    batches = _batches(len(x_ND), how.batch, random)
    started = time.perf_counter()
    for step in range(how.steps):
        adam.param_groups[0]["lr"] = how.rate * min(1.0, (step + 1) / 50, 3 * (how.steps - step) / how.steps)
        chosen = next(batches)
        silent_F += len(chosen)
        loss = _loss(weights, x_ND[chosen], weight_N[chosen], k, silent_F, how)
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            weights["W_dec"] /= weights["W_dec"].norm(dim=-1, keepdim=True)
        if (step + 1) % 50 == 0:
            dead = int((silent_F > how.dead_after).sum())
            seconds = time.perf_counter() - started
            print(f"step {step + 1}: loss {loss.item():.4f}, {dead} silent, {seconds:.0f} s", flush=True)
    trained = {name: tensor.detach() for name, tensor in weights.items()}
    return trained | {name: trained[name] / scale for name in ("b_enc", "b_dec")}


def _beginning(mean_D: Tensor, d_sae: int, random: torch.Generator) -> dict[str, Tensor]:
    """Random decoder rows, and an encoder that reads what they write."""
    decoder = torch.randn(d_sae, len(mean_D), generator=random)
    decoder /= decoder.norm(dim=-1, keepdim=True)
    made = {"W_enc": decoder.T.contiguous().clone(), "W_dec": decoder, "b_enc": torch.zeros(d_sae), "b_dec": mean_D}
    return {name: tensor.clone().requires_grad_() for name, tensor in made.items()}


def _batches(n: int, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Rows in random order, over and over."""
    while True:
        yield from torch.randperm(n, generator=random)[: max(n // size, 1) * size].split(size)


def _loss(
    weights: Mapping[str, Tensor], x_ND: Tensor, weight_N: Tensor, k: int, silent_F: Tensor, how: Training
) -> Tensor:
    """Mean squared error of an element; and what the dead features, if there are any, make of what is left."""
    before_NF = torch.addmm(weights["b_enc"], x_ND - weights["b_dec"], weights["W_enc"])
    values_NK, features_NK = before_NF.topk(k)
    values_NK = values_NK.relu()
    out_ND = embedding_bag(features_NK, weights["W_dec"], per_sample_weights=values_NK, mode="sum") + weights["b_dec"]
    left_ND = x_ND - out_ND
    loss = (weight_N * left_ND.square().mean(-1)).mean()
    silent_F[features_NK[values_NK > 0]] = 0
    dead_M = (silent_F > how.dead_after).nonzero()[:, 0]
    if not len(dead_M):
        return loss
    values, which = before_NF[:, dead_M].topk(min(how.dead_k, len(dead_M)))
    again_ND = embedding_bag(dead_M[which], weights["W_dec"], per_sample_weights=values.relu(), mode="sum")
    return loss + how.dead_share * (weight_N * (left_ND.detach() - again_ND).square().mean(-1)).mean()


# ---- what is written -------------------------------------------------------------------------------------------------


def save(weights: Mapping[str, Tensor], k: int, out: Path) -> None:
    """Writes SAELens's format, the numbers as float16; they are computed with in float32."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    d_in, d_sae = weights["W_enc"].shape
    save_file({name: weights[name].half().contiguous() for name in sorted(weights)}, out / "sae_weights.safetensors")
    metadata = {
        "sae_lens_version": "6.54.12",  # whose format this is; it was not trained by SAELens
        "sae_lens_training_version": None,
        "model_name": MODEL.id,
        "hook_name": SITE,
        "context_size": CONTEXT,
        "prepend_bos": False,
        "dataset_path": "pydoc_data.topics",
    }
    config = {
        "architecture": "topk", "k": k, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False, "metadata": metadata,
    }  # fmt: skip
    (out / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Quality(NamedTuple):
    """How well some tokens are reconstructed."""

    skipped: int
    """Positions that were left out, of every chunk."""
    tokens: int
    explained_variance: float
    cossim: float
    l0: float
    dead: int


def quality(folder: Path, x_CTD: Tensor, skipped: int) -> Quality:
    """Measures by `raymi.sae.evaluate`, with what is on disk."""
    from raymi.sae import load
    from raymi.sae.evaluate import metrics, reconstruction

    sae = load(folder)
    x_ND = x_CTD[:, skipped:].flatten(0, 1)
    features = sae.encode_sparse(x_ND)
    found = metrics(reconstruction(x_ND, sae.decode(features), features))
    numbers = [found[name] for name in ("explained_variance", "cossim", "l0", "dead_features")]
    variance, cosine, l0, dead = (float("nan") if number is None else number for number in numbers)
    return Quality(skipped, len(x_ND), variance, cosine, l0, int(dead))


class Made(NamedTuple):
    """What the README says of a training."""

    how: Training
    tokens: int
    """Different ones."""
    characters: Texts
    seconds: tuple[float, float]
    """Of reading the text with the model, and of training."""
    qualities: Sequence[Quality]


def card(made: Made) -> str:
    """The README.md beside the autoencoder."""
    how, texts = made.how, made.characters
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    facts = (
        f"model: `{MODEL.id}` at `{MODEL.revision}`, in float32",
        f"text: `pydoc_data.topics` of Python {platform.python_version()} (Python Software Foundation License), every "
        f"paragraph once, none of the held-out ones in training; chunks of {CONTEXT} tokens, no BOS",
        f"training: {made.tokens:,} different tokens ({len(texts.training):,} characters, sha256 "
        f"`{_sha256(texts.training)}`)",
        f"held out: the topics {', '.join(HELD_OUT)} ({len(texts.held_out):,} characters, sha256 "
        f"`{_sha256(texts.held_out)}`), which are `demo/texts/held_out.txt`",
        "all positions are trained on; a token's error is relative to the square of its length where that is beyond "
        "the usual, since first tokens are a hundred times as long as others",
        f"{how.steps} steps of {how.batch:,} tokens, Adam at {how.rate:g}, seed {SEED}; {made.seconds[0]:.0f} s of the "
        f"model's forwards and {made.seconds[1]:.0f} s of training on {torch.get_num_threads()} threads of a busy "
        "machine",
        f"versions: Python {platform.python_version()}, {versions}",
        "licence: Apache-2.0, as the model's",
    )
    rows = (
        f"| {q.skipped} | {q.tokens:,} | {q.explained_variance:.4f} | {q.cossim:.4f} | {q.l0:.2f} | {q.dead} |"
        for q in made.qualities
    )
    parts = (
        f"---\nlicense: apache-2.0\n---\n\n# {DEMO_SAE.id}",
        f"A sparse autoencoder for raymi's demo and tests: TopK, k = {K}, {WIDTH} features a dimension, at `{SITE}` of "
        f"`{MODEL.id}`. In SAELens's format; the tensors are float16, and are computed with in float32. Made by "
        "`python demo/train_sae.py`; not a repository of the Hugging Face hub.",
        "\n".join(fill(f"- {fact}", 120, subsequent_indent="  ", break_on_hyphens=False) for fact in facts),
        "On the held-out text, by `raymi.sae.evaluate`, without the first positions of every chunk:",
        "| positions left out | tokens | explained variance | cosine | l0 | features that never fire |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(rows),
        "Where a chunk begins with a word that the model does not take for a beginning, or with the same word twice, "
        "the token that follows is as long as a first one. The few of those are most of the variance of the first row; "
        "that of the second is of ordinary tokens, and is the figure to quote.",
    )
    return "\n\n".join(part if "\n" in part else fill(part, 120, break_on_hyphens=False) for part in parts) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache-dir", type=Path, default=cache_directory(), help="raymi's cache, with the demo model")
    parser.add_argument("--out", type=Path, default=here / "sae", help="where the autoencoder goes")
    parser.add_argument("--texts", type=Path, default=here / "texts", help="where the held-out text goes")
    parser.add_argument("--steps", type=int, default=Training().steps)
    parser.add_argument("--threads", type=int, default=2, help="of torch; figures of another number differ slightly")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    texts = split(topics)
    options.texts.mkdir(parents=True, exist_ok=True)
    (options.texts / "held_out.txt").write_text(texts.held_out, encoding="utf-8")
    path = MODEL.snapshot(options.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    started = time.perf_counter()
    training_CTD, held_out_CTD = (activations(model, chunks(tokenizer, text)) for text in texts)
    read = time.perf_counter()
    print(
        f"{training_CTD.shape[:2].numel():,} tokens to train on, {held_out_CTD.shape[:2].numel():,} held out",
        flush=True,
    )

    how = Training(steps=options.steps)
    weights = train(training_CTD.flatten(0, 1), WIDTH * training_CTD.shape[-1], K, how)
    seconds = (read - started, time.perf_counter() - read)
    save(weights, K, options.out)
    qualities = [quality(options.out, held_out_CTD, skipped) for skipped in (1, 8)]
    made = Made(how, training_CTD.shape[:2].numel(), texts, seconds, qualities)
    (options.out / "README.md").write_text(card(made), encoding="utf-8")
    print(card(made).partition("\n# ")[2])


if __name__ == "__main__":
    main()

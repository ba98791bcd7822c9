"""What is measured, on which model.

Legend: P prompts, T positions.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from demo.models import DEMO_MODELS, cache_directory
from raymi.model.hooked import Cell
from raymi.model.interventions import Mask

DEMO = DEMO_MODELS[0]

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 3, "hidden": 48, "inner": 96, "heads": 6, "key_heads": 2, "vocabulary": 300},
    "1b": {"layers": 16, "hidden": 2048, "inner": 8192, "heads": 32, "key_heads": 8, "vocabulary": 128256},
    "8b": {"layers": 32, "hidden": 4096, "inner": 14336, "heads": 32, "key_heads": 8, "vocabulary": 128256},
}
"""Llamas with random weights, for machines that the demo model is too small for, or has not reached."""


class Part(NamedTuple):
    """Ablations of prompts of one length."""

    ids_PT: Tensor
    cells: list[Cell]


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    about: str
    parts: list[Part]
    rounds: int = 5
    """How often raymi measures all of it, at most."""
    clean_counts: bool = False
    """Whether clean runs are part of the job: where every prompt has just one ablation."""

    @property
    def n_cells(self) -> int:
        return sum(len(part.cells) for part in self.parts)


# ---- models ----------------------------------------------------------------------------------------------------------


def load_demo(dtype: torch.dtype, device: str) -> tuple[str, PreTrainedModel, Tensor]:
    """Name, model, and the token ids of a long text."""
    from pydoc_data.topics import topics

    path = DEMO.snapshot(cache_directory())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager", local_files_only=True)
    text = "\n\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 5000)[:100_000]
    stream = AutoTokenizer.from_pretrained(path, local_files_only=True)(text, return_tensors="pt").input_ids[0]
    return DEMO.id, model.eval().to(device), stream


def make_shape(shape: str, dtype: torch.dtype, device: str) -> tuple[str, PreTrainedModel, Tensor]:
    """Name, model and token ids; weights and tokens are random, the same ones every time."""
    size = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["key_heads"],
        vocab_size=size["vocabulary"],
        max_position_embeddings=8192,
        tie_word_embeddings=shape == "1b",
        initializer_range=size["hidden"] ** -0.5,  # so that an ablation makes a difference
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return f"a Llama of shape {shape}, random weights", model.eval(), torch.randint(size["vocabulary"], (20_000,))


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model object over the same weights: everyone wraps or patches the modules of theirs."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


# ---- cases -----------------------------------------------------------------------------------------------------------


def cases(stream: Tensor, n_layers: int, n_heads: int, quick: bool) -> Iterator[Case]:
    """All cases, from the first tokens of a long text."""
    heads = list(product(range(n_layers), range(n_heads)))
    for n_tokens in (5, 16, 128, 1000):
        cells = [_cut([layer], (head,), n_tokens - 1, 0) for layer, head in heads]
        about = f"every layer x head, key first, query last, {n_tokens} tokens"
        yield Case(f"heads-{n_tokens}", about, [Part(stream[None, :n_tokens], cells)])
    cells = [_cut([layer], None, 127, key) for layer, key in product(range(n_layers), range(128))]
    yield Case("keys-128", "every layer x key, all heads, query last, 128 tokens", [Part(stream[None, :128], cells)])
    for n_tokens, of_heads in ((128, n_heads), (1000, 1)):
        cells = [_cut([layer], (head,), n_tokens // 2, 0) for layer, head in heads if head < of_heads]
        about = f"every layer x {'head' if of_heads > 1 else 'first head'}, key first, query T/2, {n_tokens} tokens"
        yield Case(f"middle-{n_tokens}", about, [Part(stream[None, :n_tokens], cells)], rounds=2)
    windows = [range(max(0, layer - 5), min(n_layers, layer + 5)) for layer in range(n_layers)]
    cells = [_cut(window, (head,), 127, 0) for window, head in product(windows, range(n_heads))]
    about = "windows of ten layers x head, key first, query last, 128 tokens"
    yield Case("windows-128", about, [Part(stream[None, :128], cells)])
    n_prompts = 100 if quick else 1000
    about = f"{n_prompts} prompts of 5 to 20 tokens, one ablation each, clean runs included"
    parts = _many_prompts(stream, n_prompts, n_layers, n_heads)
    yield Case("prompts", about, parts, rounds=3, clean_counts=True)


def _cut(layers: Sequence[int], heads: tuple[int, ...] | None, query: int, key: int, prompt: int = 0) -> Cell:
    return Cell(prompt, tuple(Mask(layer, heads, ((query, key),)) for layer in layers))


def _many_prompts(stream: Tensor, n_prompts: int, n_layers: int, n_heads: int) -> list[Part]:
    lengths = [5 + i % 16 for i in range(n_prompts)]
    parts: list[Part] = []
    for n_tokens in sorted(set(lengths)):
        mine = [i for i, length in enumerate(lengths) if length == n_tokens]
        ids_PT = torch.stack([stream[20 * i % (len(stream) - 20) :][:n_tokens] for i in mine])
        cells = [_cut([i * 7 % n_layers], (i * 5 % n_heads,), n_tokens - 1, 0, prompt) for prompt, i in enumerate(mine)]
        parts.append(Part(ids_PT, cells))
    return parts

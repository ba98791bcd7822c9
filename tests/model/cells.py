"""Ablations drawn at random, and what an untouched model makes of them with plain hooks: no arithmetic of raymi."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from raymi.model.hooked import Cell
from raymi.model.interventions import EDITABLE, Edit, Mask
from tests import oracles


class Widened(TorchFunctionMode):
    """Whatever a forward would do in float32 it does in float64: what then remains of a difference is no rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = {name: self._wide(value) for name, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*map(self._wide, args), **wide)

    @staticmethod
    def _wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*error)


# ---- where things are, by the names that transformers gives them ---------------------------------------------------

_LLAMA = ("model.layers", "self_attn", "mlp", "self_attn.o_proj")
_POST_NORMS = ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.o_proj")
_GPT = ("transformer.h", "attn", "mlp", "attn.out_proj")
_NAMES = {
    "gpt2": ("transformer.h", "attn", "mlp", "attn.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp", "attention.dense"),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "exaone4"), _POST_NORMS),
    "glm4": ("model.layers", "post_self_attn_layernorm", "post_mlp_layernorm", "self_attn.o_proj"),
    "llama4_text": ("model.layers", "self_attn", "feed_forward", "self_attn.o_proj"),
    "opt": ("model.decoder.layers", "self_attn", "fc2", "self_attn.out_proj"),
    "phi": ("model.layers", "self_attn", "mlp", "self_attn.dense"),
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h", "self_attention.dense"),
    "codegen": _GPT,
    "gptj": _GPT,
    "falcon": ("transformer.h", "self_attention", "mlp", "self_attention.dense"),
    "gpt_neo": ("transformer.h", "attn", "mlp", "attn.attention.out_proj"),
    "mpt": ("transformer.blocks", "attn", "ffn.down_proj", "attn.out_proj"),
    "lfm2": ("model.layers", "", "", "self_attn.out_proj"),
    "nemotron_h": ("model.layers", "", "", "mixer.o_proj"),
    "recurrent_gemma": ("model.layers", "", "", "temporal_block.o_proj"),
    "gpt_bigcode": ("transformer.h", "attn", "mlp", "attn.c_proj"),
    "jetmoe": ("model.layers", "self_attention", "mlp", ""),
}
_NO_PARTS = (
    *("granite", "granitemoehybrid", "minimax"),  # what they add is scaled before
    *("bamba", "falcon_h1", "jamba", "lfm2", "nemotron_h", "olmo_hybrid", "qwen3_next", "recurrent_gemma"),
    *("afmoe", "gemma4_text"),
)
"""Families of which no module gives what attention or MLP add to the residual stream, at least not in every layer."""


_GATED = ("afmoe", "qwen3_next")
"""Families whose attention's output is multiplied by a gate before its last matrix."""
ITSELF = ("gemma2", "gemma3_text", "olmo2", "exaone4", "glm4")
"""Post-norm families, whose attention and MLP have Llama's names; a norm makes of what they give what is added."""


def sites(family: str) -> tuple[str, ...]:
    """What can be changed in a family, and is by these tests."""
    if family == "gemma3n_text":
        return ("attn.hook_z",)  # there is not one residual stream
    not_there = {"hook_attn_out", "hook_mlp_out"} if family in _NO_PARTS else set[str]()
    if family in (*_GATED, "jetmoe"):
        # No module is fed with it: a gate comes between, or experts project it. `tests/conformance` has them.
        not_there = not_there | {"attn.hook_z"}
    if family not in ITSELF and family in (*_NAMES, *_NO_PARTS) and family not in ("granite", "afmoe"):
        not_there = not_there | {"attn.hook_out", "mlp.hook_out"}  # `tests/model/test_sites.py` has them
    return tuple(site for site in EDITABLE if site not in not_there)


def module(model: nn.Module, family: str, layer: int, site: str) -> nn.Module:
    layers, attention, mlp, z = _NAMES.get(family, _LLAMA)
    inside = {"hook_attn_out": attention, "hook_mlp_out": mlp, "attn.hook_z": z}.get(site)
    if site in ("attn.hook_out", "mlp.hook_out"):
        inside = {"attn.hook_out": "self_attn", "mlp.hook_out": "mlp"}[site]
    return model.get_submodule(f"{layers}.{layer}" + (f".{inside}" if inside else ""))


# ---- the oracle ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cuts:
    """Several masks as what `oracles.by_edited_softmax` asks for."""

    masks: Sequence[Mask]

    def cut(self, layer: int, shape: Sequence[int]) -> Tensor:
        of_each = [oracles.Knockout((m.layer,), m.heads, m.edges).cut(layer, shape) for m in self.masks]
        return torch.stack(of_each).any(0) if of_each else oracles.NOTHING.cut(layer, shape)


def _change(x_1TD: Tensor, edit: Edit, n_heads: int) -> Tensor:
    at_z = edit.site == "attn.hook_z"
    x = (x_1TD.unflatten(-1, (n_heads, -1)) if at_z else x_1TD).clone()
    for i, position in enumerate(edit.positions):
        shift = edit.shift
        if shift is not None and shift.dim() == (3 if at_z else 2):
            shift = shift[i]
        for j, head in enumerate(edit.heads or range(n_heads)) if at_z else [(0, None)]:
            place = (0, position) if head is None else (0, position, head)
            new = torch.zeros_like(x[place]) if edit.factor == 0 else x[place] * edit.factor
            if shift is not None:
                new = new + (shift[j] if at_z and shift.dim() == 2 else shift)
            x[place] = new
    return x.reshape(x_1TD.shape)


def by_plain_hooks(
    model: PreTrainedModel, family: str, ids_PT: Tensor, cell: Cell, attention_layers: Sequence[int]
) -> tuple[Tensor, int, int, int]:
    """[V] logits of a cell, what fired in it, how many lines were left with no key, and edges that were closed."""
    n_heads, n_tokens = model.config.get_text_config().num_attention_heads, ids_PT.shape[1]
    cuts = _Cuts([one for one in cell.interventions if isinstance(one, Mask)])
    fired = sum(int(cuts.cut(layer, (n_heads, n_tokens, n_tokens)).sum()) for layer in attention_layers)
    with ExitStack() as stack:
        for edit in cell.interventions:
            if not isinstance(edit, Edit):
                continue
            fired += len(edit.positions) * (
                1 if edit.site != "attn.hook_z" else n_heads if edit.heads is None else len(edit.heads)
            )
            place = module(model, family, edit.layer, edit.site)
            if edit.site in ("hook_resid_pre", "attn.hook_z"):

                def before(_: nn.Module, args: Any, kwargs: Any, edit: Edit = edit) -> Any:
                    if args:
                        return (_change(args[0], edit, n_heads), *args[1:]), kwargs
                    return args, {**kwargs, "hidden_states": _change(kwargs["hidden_states"], edit, n_heads)}

                stack.callback(place.register_forward_pre_hook(before, with_kwargs=True).remove)
            else:

                def after(_: nn.Module, __: Any, output: Any, edit: Edit = edit) -> Any:
                    x = output[0] if isinstance(output, tuple) else output
                    changed = _change(x.reshape(1, n_tokens, -1), edit, n_heads).reshape(x.shape)
                    return (changed, *output[1:]) if isinstance(output, tuple) else changed

                stack.callback(place.register_forward_hook(after).remove)
        ids_T: Tensor = ids_PT[cell.prompt]
        found = oracles.by_edited_softmax(model, ids_T, cuts, attention_layers)  # type: ignore[arg-type]
    return found.logits_V, fired - found.n_closed, found.n_empty, found.n_closed


# ---- drawing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """What ablations can be drawn from."""

    n_layers: int
    n_heads: int
    width: int
    hidden_size: int
    attention_layers: tuple[int, ...]
    sites: tuple[str, ...]


def _subset(values: Sequence[int], most: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True).map(tuple)


@st.composite
def _masks(draw: st.DrawFn, space: Space, n_tokens: int) -> tuple[Mask, ...]:
    """One mask, or one at every layer of a window."""
    layers = space.attention_layers
    begin = draw(st.integers(0, len(layers) - 1))
    end = draw(st.sampled_from([begin + 1, begin + 2, len(layers)]))
    heads = draw(st.none() | _subset(range(space.n_heads)))
    queries = draw(_subset(range(n_tokens)) | st.just((n_tokens - 1,)))
    if draw(st.integers(0, 4)) == 0:  # no key left
        edges = tuple((queries[0], key) for key in range(queries[0] + 1))
    else:
        edges = tuple((q, draw(st.integers(0, q))) for q in queries)
    return tuple(Mask(layer, heads, edges) for layer in layers[begin:end])


@st.composite
def _edits(draw: st.DrawFn, space: Space, n_tokens: int) -> tuple[Edit, ...]:
    site, layer = draw(st.sampled_from(space.sites)), draw(st.integers(0, space.n_layers - 1))
    at_z = site == "attn.hook_z"
    layer = draw(st.sampled_from(space.attention_layers)) if at_z or "resid" not in site else layer
    positions = draw(_subset(range(n_tokens)) | st.just((n_tokens - 1,)))
    heads = draw(st.none() | _subset(range(space.n_heads))) if at_z else None
    factor = draw(st.sampled_from([0.0, 0.0, 1.0, -0.5, 1.5]))
    if factor not in (0.0, 1.0) or (factor == 0.0 and draw(st.booleans())):
        return (Edit(layer, site, positions, heads, factor, None),)
    n_heads = space.n_heads if heads is None else len(heads)
    shapes = [(space.width,), (n_heads, space.width), (len(positions), n_heads, space.width)]
    shape = draw(st.sampled_from(shapes if at_z else [(space.hidden_size,), (len(positions), space.hidden_size)]))
    value = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))), dtype=torch.float32)
    return (Edit(layer, site, positions, heads, factor, value),)


@dataclass(frozen=True)
class Request:
    """Prompts of one length, what to do to them, and how many rows fit at a time."""

    ids_PT: Tensor
    cells: list[Cell]
    rows: int


@st.composite
def requests(draw: st.DrawFn, space: Space, vocab_size: int, lengths: Sequence[int], most: int = 6) -> Request:
    n_tokens, n_prompts = draw(st.sampled_from(lengths)), draw(st.sampled_from([1, 1, 2, 3]))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    cells: list[Cell] = []
    for _ in range(draw(st.integers(1, most))):
        several = draw(st.lists(_masks(space, n_tokens) | _edits(space, n_tokens), min_size=1, max_size=3))
        cells.append(Cell(draw(st.integers(0, n_prompts - 1)), tuple(one for of in several for one in of)))
    ids_PT = torch.randint(2, vocab_size, (n_prompts, n_tokens), generator=seed)
    return Request(ids_PT, cells, draw(st.sampled_from([2, 3, 100])))

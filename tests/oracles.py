"""Second opinions: knockouts, captures and metrics computed without anything of raymi.

Each way of cutting an edge stands on other ground than raymi's attention function: transformers' eager attention with
an edited mask, its eager attention with an edited softmax, an attention written out key by key, and TransformerLens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

OWN_ATTENTION = ("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "rembert", "roformer")
"""Families of the tests that do not dispatch their attention."""

BRIDGED = (
    *("llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral", "starcoder2"),
    *("gpt_oss", "granite", "mixtral", "olmo2", "phi", "stablelm", "bloom", "codegen", "falcon", "mpt"),
)
"""Families whose TransformerBridge (3.9) computes what the model does and whose score hook acts.

Not so: Cohere (other logits), and OPT, GPT-Neo, GPT-J and Llama 4, where writing to `hook_attn_scores` changes nothing.
"""


@dataclass(frozen=True)
class Knockout:
    """At every one of `layers`, every one of `heads` (None: all) loses every (query, key) of `edges`."""

    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    edges: tuple[tuple[int, int], ...]

    def keys_cut(self, layer: int, head: int, query: int) -> set[int]:
        if layer not in self.layers or (self.heads is not None and head not in self.heads):
            return set()
        return {key for at, key in self.edges if at == query}

    def cut(self, layer: int, shape: Sequence[int]) -> Tensor:
        """[1, heads, queries, keys] booleans: True where an edge is cut in this layer."""
        where = torch.zeros(1, *shape[-3:], dtype=torch.bool)
        if layer in self.layers:
            for head in range(shape[-3]) if self.heads is None else self.heads:
                for query, key in self.edges:
                    where[0, head, query, key] = True
        return where


NOTHING = Knockout((), None, ())


def dispatches(model: PreTrainedModel) -> bool:
    return model.config.model_type not in OWN_ATTENTION


@torch.no_grad()
def last_logits(model: nn.Module, ids_T: Tensor) -> Tensor:
    """[V] logits of the last position, as the model itself computes them."""
    return model(ids_T[None], use_cache=False).logits[0, -1]


# ---- transformers' eager attention, its additive mask edited --------------------------------------------------------


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> attention module, by their `layer_idx` and the name of their class."""
    return {
        int(module.layer_idx): module
        for module in model.modules()
        if hasattr(module, "layer_idx") and "Attention" in type(module).__name__
    }


def by_edited_mask(model: PreTrainedModel, ids_T: Tensor, knockout: Knockout) -> Tensor:
    """[V] logits. Does not know what a line without keys is: the mask then forbids all alike."""
    n_heads = model.config.get_text_config().num_attention_heads
    handles = []
    for layer in knockout.layers:

        def edit(module: nn.Module, args: Any, kwargs: dict[str, Any], layer: int = layer) -> Any:
            mask = kwargs["attention_mask"]
            cut = knockout.cut(layer, (n_heads, len(ids_T), len(ids_T)))
            lowest = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask.expand(-1, n_heads, -1, -1).masked_fill(cut, lowest)}

        handles.append(attention_modules(model)[layer].register_forward_pre_hook(edit, with_kwargs=True))
    try:
        return last_logits(model, ids_T)
    finally:
        for handle in handles:
            handle.remove()


# ---- transformers' eager attention, its softmax replaced ------------------------------------------------------------


class _EditedSoftmax(TorchFunctionMode):
    """Every attention softmax is done in float64 over the keys that are left."""

    def __init__(self, knockout: Knockout, n_tokens: int, attention_layers: Sequence[int]) -> None:
        super().__init__()
        self.knockout, self.n_tokens, self.waiting = knockout, n_tokens, list(attention_layers)
        self.empty = 0
        """Lines of a cut head that are left with no key."""
        self.closed = 0
        """Edges to cut that the model had forbidden itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") != "softmax" or not self._is_attention(args[0]):
            return func(*args, **kwargs)
        given, layer = args[0], self.waiting.pop(0)
        forbidden = given <= torch.finfo(given.dtype).min / 4
        cut = torch.zeros_like(forbidden)
        cut[..., : self.n_tokens] = self.knockout.cut(layer, (given.shape[1], self.n_tokens, self.n_tokens))
        self.closed += int((cut & forbidden).sum())
        keys_left = ~(forbidden | cut)[..., : self.n_tokens]  # a sink is a column more, and no key
        self.empty += int((cut.any(-1) & ~keys_left.any(-1)).sum())
        pattern = given.double().masked_fill(forbidden | cut, -torch.inf).softmax(-1).nan_to_num(0.0)
        return pattern.to(kwargs.get("dtype") or given.dtype)

    def _is_attention(self, given: Tensor) -> bool:
        return given.dim() == 4 and given.shape[-2] == self.n_tokens and given.shape[-1] - self.n_tokens in (0, 1)


class Softmaxed(NamedTuple):
    logits_V: Tensor
    n_empty: int
    """Lines left with no key."""
    n_closed: int
    """Edges to cut that the model's own mask had closed."""


def by_edited_softmax(
    model: PreTrainedModel, ids_T: Tensor, knockout: Knockout, attention_layers: Sequence[int] | None = None
) -> Softmaxed:
    """What a knockout does; works for whatever calls a softmax over its scores.

    Args:
        attention_layers: which layers have attention, where not all have; they call it in order.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    mode = _EditedSoftmax(knockout, len(ids_T), attention_layers or range(n_layers))
    with mode:
        logits_V = last_logits(model, ids_T)
    assert not mode.waiting, f"layers {mode.waiting} never took a softmax"
    return Softmaxed(logits_V, mode.empty, mode.closed)


# ---- an attention that walks over lists of keys ---------------------------------------------------------------------

_NAIVE = "oracle_naive"
_naive_knockout: list[Knockout] = [NOTHING]


def _naive(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    (n_rows, n_heads, n_queries, width), n_key_heads = query.shape, key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    out = torch.zeros(n_rows, n_queries, n_heads, value.shape[-1], dtype=query.dtype)
    forbids = torch.finfo(attention_mask.dtype).min / 4
    for row in range(n_rows):
        for head in range(n_heads):
            keys_SD = key[row, head * n_key_heads // n_heads].double().numpy()
            values_SD = value[row, head * n_key_heads // n_heads].double().numpy()
            mask_QS = attention_mask[row, head if attention_mask.shape[1] > 1 else 0]
            for at in range(n_queries):
                lost = _naive_knockout[0].keys_cut(int(module.layer_idx), head, at)
                left = [k for k, added in enumerate(mask_QS[at].tolist()) if added > forbids and k not in lost]
                if not left:
                    continue
                scores = keys_SD[left] @ query[row, head, at].double().numpy() * scale
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                sinks = np.array([] if s_aux is None else [float(s_aux[head])])
                peak = max([*scores, *sinks])
                weights = np.exp(scores - peak)
                total = weights.sum() + np.exp(sinks - peak).sum()
                out[row, at, head] = torch.from_numpy(weights / total @ values_SD[left])
    return out, None


AttentionInterface.register(_NAIVE, _naive)
AttentionMaskInterface.register(_NAIVE, eager_mask)


def by_naive_attention(model: PreTrainedModel, ids_T: Tensor, knockout: Knockout) -> Tensor:
    """[V] logits, for families that dispatch their attention."""
    assert dispatches(model)
    model.set_attn_implementation(_NAIVE)
    _naive_knockout[0] = knockout
    try:
        return last_logits(model, ids_T)
    finally:
        _naive_knockout[0] = NOTHING
        model.set_attn_implementation("eager")


# ---- TransformerLens ------------------------------------------------------------------------------------------------


def bridge(model: PreTrainedModel) -> Any:
    """TransformerLens's bridge around a model, which it takes over. Nothing is downloaded."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    # It insists on a tokenizer, and looks for another one on the hub when that has a BOS token.
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    model.config.architectures = [type(model).__name__]
    return TransformerBridge.boot_transformers("local", hf_model=model, tokenizer=tokenizer, device="cpu")


@torch.no_grad()
def by_bridge(lens: Any, ids_T: Tensor, knockout: Knockout) -> Tensor:
    """[V] logits, with -inf written at TransformerLens's `hook_attn_scores` and zeros where its pattern becomes NaN."""

    def cut(scores: Tensor, hook: Any) -> Tensor:
        # Its causal mask is a very low number: a line that loses all other keys would attend to the future.
        forbidden = scores <= torch.finfo(scores.dtype).min / 4
        return scores.masked_fill(forbidden | knockout.cut(hook.layer(), scores.shape), -torch.inf)

    def revive(pattern: Tensor, hook: Any) -> Tensor:
        return pattern.nan_to_num(0.0)

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in knockout.layers]
    hooks += [(f"blocks.{layer}.attn.hook_pattern", revive) for layer in knockout.layers]
    return lens.run_with_hooks(ids_T[None], return_type="logits", fwd_hooks=hooks)[0, -1]


@torch.no_grad()
def bridge_cache(lens: Any, ids_BT: Tensor) -> Mapping[str, Tensor]:
    return lens.run_with_cache(ids_BT, return_type="logits")[1]


# ---- metrics, in float64 --------------------------------------------------------------------------------------------


def log_softmax(logits_V: Tensor) -> np.ndarray:
    wide = logits_V.double().numpy().astype(np.longdouble)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def kl(clean_V: Tensor, ablated_V: Tensor) -> float:
    """KL(clean || ablated) in nats, by the textbook's formula in numpy's longest floats."""
    lp, lq = log_softmax(clean_V), log_softmax(ablated_V)
    return float((np.exp(lp) * (lp - lq)).sum())


def probabilities(logits_V: Tensor) -> np.ndarray:
    return np.exp(log_softmax(logits_V)).astype(np.float64)


def total_variation(clean_V: Tensor, ablated_V: Tensor) -> float:
    return float(np.abs(np.exp(log_softmax(clean_V)) - np.exp(log_softmax(ablated_V))).sum() / 2)


def rank(logits_V: Tensor, token: int) -> int:
    """How many tokens have a larger logit."""
    values = logits_V.tolist()
    return sum(value > values[token] for value in values)


def top_changes(clean_V: Tensor, ablated_V: Tensor, k: int) -> list[tuple[int, float, float]]:
    """(token, probability clean, ablated) of the k largest changes; equal ones by id."""
    p, q = probabilities(clean_V), probabilities(ablated_V)
    order = sorted(range(len(p)), key=lambda i: (-abs(q[i] - p[i]), i))
    return [(i, float(p[i]), float(q[i])) for i in order[:k]]

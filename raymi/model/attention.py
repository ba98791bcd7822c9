"""The one attention function that every dispatching family of transformers calls, and what it can be asked to do.

A family hands over queries and keys after their rotary embedding, so cutting edges and reading patterns need no code
per family. The arithmetic is that of the families' own eager functions: scale, softcap, position bias, mask, sinks,
softmax in float32.

Legend: B rows of the batch, H query heads, K key heads, G = H / K, Q query positions, S key positions, D head width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "raymi"
"""What models are switched to: `model.set_attn_implementation(NAME)`."""

IGNORED = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)
"""Keyword arguments that change nothing here: windows and chunks are in the mask, and nothing is dropped when evaluating."""


class UnsupportedAttention(RuntimeError):
    """A family passes something to its attention function that raymi's does not know, so its numbers would be wrong."""


@dataclass(slots=True)
class Cut:
    """Edges to cut in one layer, as parallel index tensors, one entry an edge of one head of one row of the batch."""

    row_E: Tensor
    head_E: Tensor
    query_E: Tensor
    key_E: Tensor
    line_3N: Tensor
    """(row, head, query) of the N distinct score lines that lose an edge."""
    per_row_B: Tensor
    """How many edges each row of the batch loses here."""

    @classmethod
    def of(cls, edges: list[tuple[int, int, int, int]], n_rows: int, device: torch.device) -> "Cut":
        """From (row, head, query, key) quadruples."""
        edge_4E = torch.tensor(edges, dtype=torch.long).T.contiguous()
        lines = edge_4E[:3].unique(dim=1)
        per_row = torch.bincount(edge_4E[0], minlength=n_rows)
        row, head, query, key = edge_4E.to(device).unbind()
        return cls(row, head, query, key, lines.to(device), per_row.to(device))


@dataclass(slots=True)
class Tap:
    """What the attention function does beside attending, in the forward that is running.

    One object a model, shared by all its attention modules; a forward fills it in and `clear` empties it.
    """

    cuts: dict[int, Cut] = field(default_factory=dict[int, Cut])
    captures: dict[tuple[int, str], Tensor | None] = field(default_factory=dict[tuple[int, str], "Tensor | None"])
    """(layer, name) -> the tensor, None until the layer has run."""
    fired_B: Tensor | None = None
    """Edges that were really cut, a row."""
    empty_B: Tensor | None = None
    """Score lines left without any key, a row: those heads attend to nothing."""
    called: dict[int, nn.Module] = field(default_factory=dict[int, nn.Module])
    """Which module asked for which layer's attention: how a model's attention layers are found."""

    def begin(self, n_rows: int, device: torch.device) -> None:
        self.fired_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.empty_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.called.clear()

    def clear(self) -> None:
        self.cuts.clear()
        self.captures.clear()
        self.fired_B = self.empty_B = None

    def capture(self, layer: int, name: str, value: Tensor) -> None:
        if (layer, name) in self.captures:
            self.captures[layer, name] = value


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, Tensor]:
    """Attention as `transformers` asks for it, with the edges of the module's `Tap` cut.

    Args:
        module: the attention module; its `layer_idx` says which layer this is.
        query: [B, H, Q, D], after rotary embedding.
        key: [B, K, S, D].
        value: [B, K, S, Dv]; Dv may differ from D.
        attention_mask: None (causal, or nothing to mask when the module is not), bool (True: attend) or float (added).
        scaling: 1 / sqrt(D) where None.
        softcap: softcap * tanh(scores / softcap), before any mask.
        s_aux: [H] attention sinks: a logit that takes part in the softmax and in nothing else.
        position_bias: added to the scores.

    Returns:
        Output [B, Q, H, Dv] and pattern [B, H, Q, S].

    Raises:
        UnsupportedAttention: for a keyword argument that is neither known nor known to be harmless.
    """
    unknown = sorted(name for name, given in others.items() if given is not None and name not in IGNORED)
    if unknown:
        raise UnsupportedAttention(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function, which raymi does not know"
        )
    tap, layer = _tap(module), int(module.layer_idx)  # pyright: ignore[reportArgumentType]
    tap.called[layer] = module
    n_rows, n_heads, n_queries, width = query.shape
    n_key_heads, n_keys = key.shape[1], key.shape[2]
    for name, states in (("rot_q", query), ("rot_k", key), ("v", value)):
        tap.capture(layer, name, states.transpose(1, 2))

    # Query heads that share a key head are folded into its query axis: grouped keys are never copied.
    query_BKGQD = query.reshape(n_rows, n_key_heads, -1, width)
    scores_BHQS = (query_BKGQD @ key.transpose(2, 3)).view(n_rows, n_heads, n_queries, n_keys)
    scores_BHQS = scores_BHQS * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_BHQS = softcap * torch.tanh(scores_BHQS / softcap)
    if position_bias is not None:
        scores_BHQS = scores_BHQS + position_bias
    scores_BHQS = _masked(scores_BHQS, attention_mask, bool(getattr(module, "is_causal", True)))
    pattern_BHQS = _pattern(tap, layer, scores_BHQS, s_aux).to(value.dtype)
    tap.capture(layer, "pattern", pattern_BHQS)
    folded = pattern_BHQS.reshape(n_rows, n_key_heads, -1, n_keys)
    out_BHQD = (folded @ value).view(n_rows, n_heads, n_queries, value.shape[3])
    return out_BHQD.transpose(1, 2).contiguous(), pattern_BHQS


def _masked(scores_BHQS: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores with -inf wherever the model's own mask forbids a key: "forbidden" must stay so for a line that loses all others."""
    if mask is None:
        n_queries, n_keys = scores_BHQS.shape[2:]
        if not causal or n_queries == 1:
            return scores_BHQS
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores_BHQS.device).tril(n_keys - n_queries)
    if mask.dtype == torch.bool:
        return scores_BHQS.masked_fill(~mask, -torch.inf)
    forbidden = mask <= torch.finfo(mask.dtype).min / 2
    return (scores_BHQS + mask).masked_fill(forbidden, -torch.inf)


def _pattern(tap: Tap, layer: int, scores_BHQS: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Softmax over the keys, in float32, of the scores with the tap's edges cut; a line without keys attends to nothing."""
    cut, dead_N = tap.cuts.get(layer), None
    if cut is not None:
        scores_BHQS[cut.row_E, cut.head_E, cut.query_E, cut.key_E] = -torch.inf
        dead_N = scores_BHQS[cut.line_3N.unbind()].isneginf().all(-1)
        assert tap.fired_B is not None and tap.empty_B is not None
        tap.fired_B += cut.per_row_B
        tap.empty_B.index_add_(0, cut.line_3N[0], dead_N.long())
    tap.capture(layer, "attn_scores", scores_BHQS)
    if sinks_H is not None:
        sink_BHQ1 = sinks_H.view(1, -1, 1, 1).expand(*scores_BHQS.shape[:3], 1).to(scores_BHQS.dtype)
        return torch.softmax(torch.cat([scores_BHQS, sink_BHQ1], -1), -1, dtype=torch.float32)[..., :-1]
    pattern_BHQS = torch.softmax(scores_BHQS, -1, dtype=torch.float32)
    if cut is not None and dead_N is not None:
        row, head, query = cut.line_3N[:, dead_N]
        pattern_BHQS[row, head, query] = 0.0
    return pattern_BHQS


def attach(module: nn.Module, tap: Tap) -> None:
    """Let an attention module's calls go by this tap."""
    module.__dict__["_raymi_tap"] = tap


def _tap(module: nn.Module) -> Tap:
    tap = module.__dict__.get("_raymi_tap")
    return tap if isinstance(tap, Tap) else Tap()


def _mask(*args: object, **kwargs: object) -> Tensor | None:
    """The model's own mask as booleans, never left out for being plainly causal: cuts need it written down."""
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)  # pyright: ignore[reportArgumentType]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)

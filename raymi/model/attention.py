"""The one attention function that every dispatching family of transformers calls, and what it can be asked to do.

A family hands over queries and keys after their rotary embedding, so cutting edges and reading patterns need no code
per family. The arithmetic is that of the families' own eager functions: scale, softcap, position bias, mask, sinks,
softmax in float32.

Legend: B rows of the batch, P prompts, H query heads, K key heads, G = H / K, Q query positions, S key positions,
D head width. Scores are laid out [K, B, G, Q, S]: what is shared by all rows is then one matrix product a key head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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
        "logits_to_keep",
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
"""Keyword arguments that change nothing here: windows and chunks are in the mask, nothing is dropped in evaluation."""


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

    def to(self, device: torch.device) -> "Cut":
        """The same where a layer computes, which on several devices need not be where the prompt is."""
        if self.row_E.device == device:
            return self
        return Cut(*(getattr(self, name).to(device) for name in self.__slots__))

    def of_rows(self, rows: slice) -> "Cut | None":
        """The same for some rows of the batch, which count from 0 then; None where nothing of them is cut."""
        edges_E = (self.row_E >= rows.start) & (self.row_E < rows.stop)
        if not bool(edges_E.any()):
            return None
        lines_N = (self.line_3N[0] >= rows.start) & (self.line_3N[0] < rows.stop)
        lines_3N = self.line_3N[:, lines_N].clone()
        lines_3N[0] -= rows.start
        return Cut(
            self.row_E[edges_E] - rows.start,
            self.head_E[edges_E],
            self.query_E[edges_E],
            self.key_E[edges_E],
            lines_3N,
            self.per_row_B[rows],
        )


FEW = 32
"""Edges up to which a list is quicker than tensors."""


@dataclass(slots=True)
class Edges:
    """What is to be cut in a forward, as it is collected row by row: (layer, row, head, query, key) of every edge."""

    few: list[tuple[int, int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int, int]])
    many: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, layer: int, row: int, heads: Sequence[int], edges: Sequence[tuple[int, int]], start: int) -> None:
        """Every edge (query, key) of every head; queries count from `start` on."""
        if len(heads) * len(edges) <= FEW:
            self.few += [(layer, row, head, query - start, key) for head in heads for query, key in edges]
            return
        query_E, key_E = torch.tensor(edges).T
        head_HE = torch.tensor(heads)[:, None].expand(-1, len(edges))
        parts = torch.broadcast_tensors(torch.tensor(layer), torch.tensor(row), head_HE, query_E - start, key_E)
        self.many.append(torch.stack(parts).flatten(1))

    def cuts(self, n_rows: int, device: torch.device) -> dict[int, Cut]:
        """By layer."""
        few = [torch.tensor(self.few).T] if self.few else []
        parts = [*few, *self.many]
        return cuts(torch.cat(parts, 1), n_rows, device) if parts else {}


def cuts(edge_5E: Tensor, n_rows: int, device: torch.device) -> dict[int, Cut]:
    """From (layer, row, head, query, key) of every edge, what each layer loses; what is named twice is cut once."""
    # As one number each: unique rows of a matrix take fifty times as long to find. All layers at once: a tensor that
    # goes to a GPU by itself costs more than what is in it.
    n_layers, _, n_heads, n_queries, n_keys = (edge_5E.amax(1) + 1).tolist()
    line_E = ((edge_5E[0] * n_rows + edge_5E[1]) * n_heads + edge_5E[2]) * n_queries + edge_5E[3]
    edge_E = (line_E * n_keys + edge_5E[4]).unique()
    line_E, key_E = edge_E // n_keys, edge_E % n_keys
    line_N = line_E.unique_consecutive()

    def places(line: Tensor) -> Tensor:
        of_head = line // n_queries
        return torch.stack([of_head // n_heads % n_rows, of_head % n_heads, line % n_queries])

    def by_layer(whole: Tensor, line: Tensor) -> Sequence[Tensor]:
        sizes = torch.bincount(line // (n_rows * n_heads * n_queries), minlength=n_layers)
        return whole.to(device).split(sizes.tolist(), -1)

    per_row_LB = torch.bincount(line_E // (n_heads * n_queries), minlength=n_layers * n_rows).view(-1, n_rows)
    edges = by_layer(torch.cat([places(line_E), key_E[None]]), line_E)
    lines, per_row = by_layer(places(line_N), line_N), per_row_LB.to(device)
    return {
        layer: Cut(row_E, head_E, query_E, key_E, line_3N, per_row[layer])
        for layer, ((row_E, head_E, query_E, key_E), line_3N) in enumerate(zip(edges, lines, strict=True))
        if len(row_E)
    }


@dataclass(frozen=True, slots=True)
class Prefix:
    """Clean keys and values of the positions before a suffix that is computed anew, of P prompts of equal length."""

    length: int
    states: dict[int, tuple[Tensor, Tensor]]
    """Layer -> keys [P, K, T, D] and values [P, K, T, Dv], of which the first `length` positions count."""
    prompt_B: Tensor | None
    """Which prompt each row of the batch belongs to; None when there is only one, and all rows share it.

    While rows are still joining, the batch is a beginning of this.
    """


class HeadShape(NamedTuple):
    """The heads of one layer."""

    n_heads: int
    """Query heads."""
    n_key_heads: int
    width: int
    """Of a query and a key."""
    value_width: int


@dataclass(slots=True)
class Tap:
    """What the attention function does beside attending, in the forward that is running.

    One object a model, shared by all its attention modules; a forward fills it in and `clear` empties it.
    """

    cuts: dict[int, Cut] = field(default_factory=dict[int, Cut])
    keep: dict[int, tuple[Tensor, Tensor]] | None = None
    """Filled, when it is a dictionary, with every layer's keys and values, [B, K, S, D]."""
    prefix: "Prefix | None" = None
    """Clean keys and values that stand before the first position which this forward computes."""
    captures: dict[tuple[int, str], Tensor | None] = field(default_factory=dict[tuple[int, str], "Tensor | None"])
    """(layer, name) -> the tensor, None until the layer has run."""
    at_z: dict[int, list[Callable[[Tensor], Tensor]]] = field(
        default_factory=dict[int, "list[Callable[[Tensor], Tensor]]"]
    )
    """Layer -> what is done, in turn, with what its attention gives, [B, Q, H, Dv]: edits, and what only looks on."""
    dead: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Layer -> (row, head, query) of lines without keys, where a family's own attention does not know what to make of
    them: its output is made zero there."""
    fired_B: Tensor | None = None
    """Edges that were named and came by, a row; those that the model's own mask had closed among them."""
    closed_B: Tensor | None = None
    """How many of these edges were closed before, a row: by a window or a chunk. To cut them changes nothing."""
    empty_B: Tensor | None = None
    """Score lines left without any key, a row: those heads attend to nothing."""
    called: dict[int, nn.Module] = field(default_factory=dict[int, nn.Module])
    """Which module asked for which layer's attention: how a model's attention layers are found."""
    shapes: dict[int, "HeadShape"] = field(default_factory=dict[int, "HeadShape"])
    """Layer -> the heads that it came with: what a model really has, whatever its config is understood to say."""
    masks: dict[object, tuple[Tensor, bool]] = field(default_factory=dict[object, "tuple[Tensor, bool]"])
    """Address and shape -> a mask, kept so that no other can take its place, and whether it forbids anything."""

    def begin(self, n_rows: int, device: torch.device) -> None:
        self.fired_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.empty_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.closed_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.called.clear()
        self.shapes.clear()
        self.masks.clear()

    def clear(self) -> None:
        self.cuts.clear()
        self.captures.clear()
        self.masks.clear()
        self.at_z.clear()
        self.dead.clear()
        self.keep = self.prefix = self.fired_B = self.empty_B = self.closed_B = None

    def forbids(self, mask: Tensor) -> bool:
        """Whether a bool mask has anything False: looked at once a forward, since a GPU is waited for."""
        place = mask.data_ptr(), mask.shape, mask.stride()
        if place not in self.masks:
            self.masks[place] = mask, not bool(mask.all())
        return self.masks[place][1]

    def of_rows(self, layer: int, rows: slice) -> "Tap":
        """What is to be done at a layer to some rows of the batch; what is counted there is counted here, too."""
        prefix = self.prefix
        if prefix is not None and prefix.prompt_B is not None:
            prefix = replace(prefix, prompt_B=prefix.prompt_B[rows])
        cut = self.cuts[layer].of_rows(rows) if layer in self.cuts else None
        assert self.fired_B is not None
        assert self.empty_B is not None
        assert self.closed_B is not None
        part = Tap({layer: cut} if cut is not None else {}, prefix=prefix, masks=self.masks)
        part.fired_B, part.empty_B, part.closed_B = self.fired_B[rows], self.empty_B[rows], self.closed_B[rows]  # views
        return part

    def count(self, cut: Cut, closed_E: Tensor, dead_N: Tensor) -> None:
        """Note that a cut was made, which of its edges were closed before, and which of its lines have no key left."""
        assert self.fired_B is not None
        self.fired_B += cut.per_row_B.to(self.fired_B.device)
        assert self.empty_B is not None
        assert self.closed_B is not None
        for count_B, row_N, found_N in (
            (self.closed_B, cut.row_E, closed_E),
            (self.empty_B, cut.line_3N[0], dead_N),
        ):
            count_B.index_add_(0, row_N.to(count_B.device), found_N.long().to(count_B.device))

    def pass_z(self, layer: int, z_BQHD: Tensor) -> Tensor:
        """What an attention gives, after all that is to be done with it."""
        if (dead_3N := self.dead.get(layer)) is not None and dead_3N.shape[1]:
            row, head, query = dead_3N.to(z_BQHD.device)
            z_BQHD = z_BQHD.clone()
            z_BQHD[row, query, head] = 0.0
        for step in self.at_z.get(layer, ()):
            z_BQHD = step(z_BQHD)
        return z_BQHD

    def capture(self, layer: int, name: str, value: Tensor, *, by_key_head: bool = False) -> None:
        """Keep a tensor that was asked for; [K, B, G, Q, S] is given back as TransformerLens's [B, H, Q, S]."""
        if (layer, name) in self.captures:
            self.captures[layer, name] = value.transpose(0, 1).flatten(1, 2) if by_key_head else value


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
) -> tuple[Tensor, None]:
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
        Output [B, Q, H, Dv], and no pattern: whoever wants one captures it.

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
    tap.shapes[layer] = HeadShape(query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    if tap.keep is not None:
        tap.keep[layer] = key, value
    for name, states in (("rot_q", query), ("rot_k", key), ("v", value)):
        tap.capture(layer, name, states.transpose(1, 2))

    def attend(tap: Tap, rows: slice) -> Tensor:
        given = attention_mask, position_bias
        mask, bias = (each if each is None or len(each) == 1 else each[rows] for each in given)
        return _attend(module, tap, layer, query[rows], key[rows], value[rows], mask, scaling, softcap, s_aux, bias)

    n_rows, step = len(query), _rows_at_once(tap, layer, query, key)
    if n_rows <= step:
        return tap.pass_z(layer, attend(tap, slice(0, n_rows))), None
    blocks = [slice(begin, min(begin + step, n_rows)) for begin in range(0, n_rows, step)]
    out_BQHD = torch.cat([attend(tap.of_rows(layer, rows), rows) for rows in blocks])
    return tap.pass_z(layer, out_BQHD), None


NUMBERS = {"cpu": 1 << 22, "gpu": 1 << 27}
"""Scores, and copies of keys and values, made at a time; on a CPU 16 MB, which memory is kept for and which stays near
the processor."""


def _rows_at_once(tap: Tap, layer: int, query: Tensor, key: Tensor) -> int:
    n_rows, n_heads, n_queries, _ = query.shape
    captured = any(at == layer for at, _ in tap.captures)
    if captured:
        return n_rows
    prefix = tap.prefix
    n_keys = key.shape[2] + (prefix.length if prefix is not None else 0)
    numbers = n_heads * n_queries * n_keys
    if prefix is not None and prefix.prompt_B is not None:  # every row has a copy of its own prompt's keys and values
        numbers += prefix.length * sum(states.shape[1] * states.shape[3] for states in prefix.states[layer])
    return max(1, NUMBERS["cpu" if query.device.type == "cpu" else "gpu"] // numbers)


def _attend(
    module: nn.Module,
    tap: Tap,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
    position_bias: Tensor | None,
) -> Tensor:
    """Attention of some rows, [B, Q, H, Dv]; arguments as in `attention`."""
    n_rows, n_heads, n_queries, width = query.shape
    n_key_heads = key.shape[1]
    # Query heads that share a key head are folded into its query axis: grouped keys are never copied.
    group = n_heads // n_key_heads
    factor = width**-0.5 if scaling is None else scaling
    query_KBQD = (query * factor).reshape(n_rows, n_key_heads, group * n_queries, width).transpose(0, 1)
    prefix = _prefix(tap, layer, n_rows)
    scores_KBGQS = _scores(query_KBQD, key.transpose(0, 1), prefix).unflatten(2, (group, n_queries))
    if softcap is not None:
        scores_KBGQS = torch.tanh_(scores_KBGQS.div_(softcap)).mul_(softcap)
    if position_bias is not None:
        scores_KBGQS += _by_key_head(position_bias, n_key_heads)
    _forbid(scores_KBGQS, attention_mask, bool(getattr(module, "is_causal", True)), tap)
    pattern_KBGQS = _pattern(tap, layer, scores_KBGQS, s_aux).to(value.dtype)
    tap.capture(layer, "pattern", pattern_KBGQS, by_key_head=True)
    out_KBQD = _mix(pattern_KBGQS.flatten(2, 3), value.transpose(0, 1), prefix)
    out_BQHD = out_KBQD.unflatten(2, (group, n_queries)).permute(1, 3, 0, 2, 4)
    # Contiguous, as the families' own functions give it: some go on to take a view of it.
    return out_BQHD.reshape(n_rows, n_queries, n_heads, -1).contiguous()


def _prefix(tap: Tap, layer: int, n_rows: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values before the suffix: [K, 1, length, D] shared by all rows, or [K, B, length, D]."""
    if tap.prefix is None:
        return None
    keys, values = (states[:, :, : tap.prefix.length] for states in tap.prefix.states[layer])
    if tap.prefix.prompt_B is not None:
        rows_B = tap.prefix.prompt_B[:n_rows].to(keys.device)
        keys, values = keys[rows_B], values[rows_B]
    return keys.transpose(0, 1), values.transpose(0, 1)


def _scores(query_KBQD: Tensor, key_KBSD: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    """Query times keys, [K, B, G Q, S], the prefix's keys first."""
    if prefix is None:
        return query_KBQD @ key_KBSD.transpose(2, 3)
    before_KPSD, length = prefix[0], prefix[0].shape[2]
    scores = query_KBQD.new_empty(*query_KBQD.shape[:3], length + key_KBSD.shape[2])
    scores[..., length:] = query_KBQD @ key_KBSD.transpose(2, 3)
    if before_KPSD.shape[1] == query_KBQD.shape[1]:
        scores[..., :length] = query_KBQD @ before_KPSD.transpose(2, 3)
    else:  # one prefix for all rows, as in Hydragen (arXiv 2402.05099): one matrix product instead of one a row
        before_KDS = before_KPSD[:, 0].transpose(1, 2)
        torch.bmm(query_KBQD.flatten(1, 2), before_KDS, out=scores.flatten(1, 2)[..., :length])
    return scores


def _mix(pattern_KBQS: Tensor, value_KBSD: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    """Values weighed by the pattern, [K, B, G Q, Dv]."""
    if prefix is None:
        return pattern_KBQS @ value_KBSD
    before_KPSD, length = prefix[1], prefix[1].shape[2]
    after_KBQS, before_KBQS = pattern_KBQS[..., length:], pattern_KBQS[..., :length]
    if before_KPSD.shape[1] == pattern_KBQS.shape[1]:
        out = before_KBQS @ before_KPSD
    else:
        out = torch.bmm(before_KBQS.flatten(1, 2), before_KPSD[:, 0]).unflatten(1, pattern_KBQS.shape[1:3])
    if value_KBSD.shape[2] == 1:  # the usual case: a product of one row and one column takes as long as the prefix's
        return out.addcmul_(after_KBQS, value_KBSD)
    return out.add_(after_KBQS @ value_KBSD)


def _by_key_head(per_head: Tensor, n_key_heads: int) -> Tensor:
    """[B or 1, H or 1, Q, S] -> what broadcasts against [K, B, G, Q, S]."""
    if per_head.shape[1] == 1:
        return per_head[None]
    return per_head.unflatten(1, (n_key_heads, -1)).transpose(0, 1)


def _forbid(scores_KBGQS: Tensor, mask: Tensor | None, causal: bool, tap: Tap) -> None:
    """Write -inf where the model's own mask forbids a key: it must stay forbidden in a line that loses all others."""
    n_queries, n_keys = scores_KBGQS.shape[3:]
    if mask is None:
        if causal and n_queries > 1:
            allowed = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores_KBGQS.device)
            scores_KBGQS.masked_fill_(~allowed.tril(n_keys - n_queries), -torch.inf)
        return
    mask = _by_key_head(mask, scores_KBGQS.shape[0])
    if mask.dtype == torch.bool:
        if tap.forbids(mask):
            scores_KBGQS.masked_fill_(~mask, -torch.inf)
    else:
        scores_KBGQS += mask
        scores_KBGQS.masked_fill_(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)


def _pattern(tap: Tap, layer: int, scores_KBGQS: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Softmax over the keys, in float32, with the tap's edges cut; a line without keys attends to nothing."""
    cut, group, dead_N = tap.cuts.get(layer), scores_KBGQS.shape[2], None
    if cut is not None:
        cut = cut.to(scores_KBGQS.device)
        head_E, head_N = cut.head_E, cut.line_3N[1]
        edges = (head_E // group, cut.row_E, head_E % group, cut.query_E, cut.key_E)
        closed_E = scores_KBGQS[edges].isneginf()
        scores_KBGQS[edges] = -torch.inf
        lines = (head_N // group, cut.line_3N[0], head_N % group, cut.line_3N[2])
        dead_N = scores_KBGQS[lines].isneginf().all(-1)
        tap.count(cut, closed_E, dead_N)
    tap.capture(layer, "attn_scores", scores_KBGQS, by_key_head=True)
    if sinks_H is not None:
        sink = sinks_H.view(scores_KBGQS.shape[0], 1, group, 1, 1).to(scores_KBGQS.dtype)
        with_sink = torch.cat([scores_KBGQS, sink.expand(*scores_KBGQS.shape[:4], 1)], -1)
        return torch.softmax(with_sink, -1, dtype=torch.float32)[..., :-1]
    in_place = scores_KBGQS.device.type == "cpu" and scores_KBGQS.dtype in (torch.float32, torch.float64)
    if in_place and (layer, "attn_scores") not in tap.captures:
        # In place: at a thousand tokens the scores are the largest tensor there is, and memory the bottleneck.
        pattern_KBGQS = torch.softmax(scores_KBGQS, -1, out=scores_KBGQS)
    else:
        pattern_KBGQS = torch.softmax(scores_KBGQS, -1, dtype=torch.float32)
    if cut is not None and dead_N is not None and bool(dead_N.any()):
        row, head, query = cut.line_3N[:, dead_N]
        pattern_KBGQS[head // group, row, head % group, query] = 0.0
    return pattern_KBGQS


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

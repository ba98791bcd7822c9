"""How far back each layer of a model looks, as its config tells. No torch.

The config class of a family works out what its files leave open, but importing one imports torch. So what these classes
do is written here a second time, and the tests hold it to them, and to what the models' masks really close.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from raymi import snapshot

Stated = Mapping[str, Any]
"""A text config, over the defaults of its family."""
SLIDING, CHUNKED, FULL = "sliding_attention", "chunked_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Reach:
    """What one layer's own mask leaves open."""

    n_tokens: int
    chunked: bool = False
    """Whether a query sees just its own chunk of so many tokens, and not the last so many."""

    def closes(self, query: int, key: int) -> bool:
        """Whether it keeps a query from a key at or before it."""
        if self.chunked:
            return query // self.n_tokens != key // self.n_tokens
        return query - key >= self.n_tokens


def reaches(config: Mapping[str, Any], n_layers: int) -> list[Reach | None]:
    """Of every layer; None: without end, or the config does not tell. What it does not tell, nobody is warned of."""
    text = snapshot.text_config(config)
    kind = snapshot.model_type(text) or snapshot.model_type(config) or ""
    stated = {**snapshot.config_defaults(snapshot.model_type(config), snapshot.model_type(text)), **text}
    window, chunk = _window(kind, stated), _positive(stated.get("attention_chunk_size"))
    found: list[Reach | None] = []
    for at, layer in enumerate(_kinds(kind, stated, n_layers)):
        own = _of_its_own(stated, at)
        if layer == CHUNKED:
            here = _positive(own["attention_chunk_size"]) if "attention_chunk_size" in own else chunk
        elif layer in (SLIDING, *_WITH_A_WINDOW):
            here = _positive(own["sliding_window"]) if "sliding_window" in own else window
        else:
            here = None
        found.append(Reach(here, chunked=layer == CHUNKED) if here else None)
    return found


def _positive(number: object) -> int | None:
    return number if type(number) is int and number > 0 else None


_WITH_A_WINDOW = ("hybrid_sliding", "compressed_sparse_attention", "heavily_compressed_attention")
"""Kinds of layers by other names. Those that compress what is far away have a window over single tokens, too."""


def _of_its_own(stated: Stated, layer: int) -> Mapping[str, Any]:
    """The config of a single layer, where it has one."""
    apart = stated.get("per_layer_config")
    if not isinstance(apart, dict):
        return {}
    named = cast(dict[object, Any], apart)
    own = named.get(str(layer), named.get(layer))
    return cast(dict[str, Any], own) if isinstance(own, dict) else {}


# -- how many tokens ---------------------------------------------------------------------------------------------------


def _window(kind: str, stated: Stated) -> int | None:
    match kind:
        case "qwen2" | "qwen2_moe" | "qwen3" | "qwen3_moe" if not stated.get("use_sliding_window"):
            return None
        case "inkling_text":
            return _positive(stated.get("sliding_window_size"))
        case "mimo_v2_flash" if (before := _positive(stated.get("sliding_window_size"))) is not None:
            return before + 1
        case "recurrent_gemma":
            return _positive(stated.get("attention_window_size"))
        case "gpt_neo":
            return _positive(stated.get("window_size"))
        case "modernbert-decoder":
            both_sides = _positive(stated.get("local_attention"))
            return both_sides and _positive(both_sides // 2)
        case _:
            return _positive(stated.get("sliding_window"))


# -- which layers ------------------------------------------------------------------------------------------------------


def _kinds(kind: str, stated: Stated, n_layers: int) -> Sequence[str]:
    """Of each layer, the kind."""
    if kind in _EVERY_LAYER:
        return [SLIDING] * n_layers
    if kind in _LISTED_ELSEWHERE:
        return _LISTED_ELSEWHERE[kind](stated, n_layers)
    match stated.get("layer_types"):
        case [*kinds] if len(kinds) == n_layers:
            found = [str(each) for each in kinds]
        case None if kind in _DERIVED:
            rule = _DERIVED[kind]
            found = [rule(stated, at) for at in range(n_layers)]
        case _:
            found = [FULL] * n_layers
    return [*found[:-1], FULL] if kind in _LAST_IS_FULL else found


_EVERY_LAYER = ("mistral", "mixtral", "phi3", "starcoder2", "ministral3", "phimoe", "qwen3_moe")
"""Families that have a window in every layer, whatever `layer_types` says, where their config states one."""
_LAST_IS_FULL = ("gemma4_text", "gemma4_unified_text")


def _blocks(stated: Stated, n_layers: int) -> Sequence[str]:
    match stated.get("block_types"):
        case [_, *_] as blocks:
            return [SLIDING if blocks[at % len(blocks)] == "attention" else "recurrent" for at in range(n_layers)]
        case _:
            return [SLIDING if at % 3 == 2 else "recurrent" for at in range(n_layers)]


def _attention_types(stated: Stated, n_layers: int) -> Sequence[str]:
    found: list[str] = []
    match stated.get("attention_types"):
        case [*groups]:
            for group in groups:
                match group:
                    case [[*kinds], int(times)] if 0 < times <= n_layers:
                        found += [str(each) for each in kinds] * times
                    case _:
                        return [FULL] * n_layers
        case _:
            found = ["global", "local"] * 12
    return [SLIDING if each == "local" else FULL for each in found] if len(found) == n_layers else [FULL] * n_layers


_LISTED_ELSEWHERE: dict[str, Callable[[Stated, int], Sequence[str]]] = {
    "recurrent_gemma": _blocks,
    "gpt_neo": _attention_types,
}

Rule = Callable[[Stated, int], str]
"""Config, layer -> its kind."""


def _every(period: int, field: str | None = None) -> Rule:
    """One layer in so many looks back without end, the last of them."""

    def rule(stated: Stated, at: int) -> str:
        every = period if field is None else _positive(stated.get(field, period))
        return FULL if every is None or (at + 1) % every == 0 else SLIDING

    return rule


def _first_of(period: int, field: str | None = None) -> Rule:
    """One layer in so many looks back without end, the first of them."""

    def rule(stated: Stated, at: int) -> str:
        every = period if field is None else _positive(stated.get(field, period))
        return FULL if every is None or at % every == 0 else SLIDING

    return rule


def _from_a_layer_on(stated: Stated, at: int) -> str:
    first = stated.get("max_window_layers")
    return SLIDING if type(first) is int and at >= first else FULL


def _below_a_layer(stated: Stated, at: int) -> str:
    end = stated.get("max_window_layers")
    return SLIDING if type(end) is int and at % 2 == 0 and at < end else FULL


def _has_rope(stated: Stated, at: int) -> bool:
    match stated.get("no_rope_layers"):  # which is 0 for a layer that has none
        case [_, *_] as listed:
            return at < len(listed) and bool(listed[at])
        case _:
            every = _positive(stated.get("no_rope_layer_interval")) or 4
            return (at + 1) % every != 0


def _with_rope(stated: Stated, at: int) -> str:
    return CHUNKED if _has_rope(stated, at) else FULL


def _without_rope(stated: Stated, at: int) -> str:
    return SLIDING if stated.get("use_sliding_window") and not _has_rope(stated, at) else FULL


def _behind_dense_layers(stated: Stated, at: int) -> str:
    dense = _positive(stated.get("first_k_dense_replace")) or 0
    rule = _every(1, "prefix_dense_sliding_window_pattern") if at < dense else _every(4, "sliding_window_pattern")
    return rule(stated, at if at < dense else at - dense)


def _local_layers(stated: Stated, at: int) -> str:
    match stated.get("local_layer_ids"):
        case [*indices]:
            return SLIDING if at in indices else FULL
        case _:
            return _every(6)(stated, at)


def _compressed(stated: Stated, at: int) -> str:
    """All of them have the window."""
    return SLIDING


def _of_mimo(stated: Stated, at: int) -> str:
    return FULL if at == 0 else _every(6)(stated, at)


def _of_flint(stated: Stated, at: int) -> str:
    return FULL if at < 2 or at % 4 == 1 or at == stated.get("num_hidden_layers", 0) - 1 else SLIDING


def _of_beam(stated: Stated, at: int) -> str:
    return FULL if at == stated.get("num_hidden_layers", 0) - 1 else _every(6)(stated, at)


def _of_lfm3(_: Stated, at: int) -> str:
    return SLIDING if at % 4 == 0 and at > 0 else FULL


_DERIVED: dict[str, Rule] = {
    **dict.fromkeys(("gemma2", "vaultgemma", "gpt_oss"), _every(2)),
    **dict.fromkeys(("gemma3", "gemma3_text"), _every(6, "sliding_window_pattern")),
    **dict.fromkeys(("cohere2", "exaone4", "exaone_moe"), _every(4, "sliding_window_pattern")),
    **dict.fromkeys(("gemma3n", "gemma3n_text", "kolibri1"), _every(5)),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _every(6)),
    "olmo3": _every(4),
    "afmoe": _every(4, "global_attn_every_n_layers"),
    **dict.fromkeys(("cwm", "granite_swa", "granitemoe_swa"), _first_of(4)),
    "modernbert-decoder": _first_of(3, "global_attn_every_n_layers"),
    **dict.fromkeys(("qwen2", "qwen3", "dots1"), _from_a_layer_on),
    "qwen2_moe": _below_a_layer,
    "ministral": lambda *_: SLIDING,
    **dict.fromkeys(("llama4", "llama4_text"), _with_rope),
    "smollm3": _without_rope,
    "cohere2_moe": _behind_dense_layers,
    "inkling_text": _local_layers,
    "deepseek_v4": _compressed,
    "mimo_v2_flash": _of_mimo,
    "flint": _of_flint,
    "beam": _of_beam,
    "lfm3": _of_lfm3,
}
"""What families make of a config that does not list `layer_types`."""

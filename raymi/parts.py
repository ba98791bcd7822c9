"""Parts of a checkpoint beside the language model, told by the names of their tensors. No torch: models are listed
without it.

Towers that see or hear, further prediction heads and the heads of other tasks may stand in a checkpoint of which a
causal language model makes no use. What is computed does not depend on them.
"""

import re
from collections.abc import Collection, Iterable

_MEDIA = (
    "vision|visual|image|video|audio|speech|sound|tower|projector|projection_layer|connector|multi_?modal|mm_|merger|"
    "resampler|perceiver|aligner|talker|code2wav|token2wav|vocoder"
)
_HEADS = (
    r"(^|_)(mtp|nextn|medusa|eagle)|predict_layers?$|^(v_head|value_head|reward_head|score|classifier|pooler|"
    r"qa_outputs|seq_relationship|classification_head)$"
)
_JOINING = {"eh_proj", "enorm", "hnorm"}
"""What a prediction head among the layers has and no decoder layer: it joins the stream with the next embedding."""
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


def is_media(component: str) -> bool:
    """Whether one component of a tensor's name stands for what sees, hears or speaks, or leads from there to text."""
    return re.search(_MEDIA, component.lower()) is not None


def is_part(component: str) -> bool:
    """Whether one component of a tensor's name, outside of the decoder layers, stands for a part beside the language
    model: a tower, a prediction head, a head of another task.
    """
    return is_media(component) or re.search(_HEADS, component.lower()) is not None


def joins_next_token(names: Iterable[str]) -> bool:
    """Whether tensors of one layer are a prediction head's (DeepSeek V3's, GLM 4.5's: stored as one layer more)."""
    return any(not _JOINING.isdisjoint(name.split(".")) for name in names)


def beside(names: Collection[str], n_layers: int | None, *, media_built: bool) -> tuple[str, ...]:
    """The parts of a checkpoint that are not built when it is loaded as a causal language model, sorted.

    Args:
        names: of its tensors.
        n_layers: decoder layers of the language model.
        media_built: whether the class that is loaded has towers.
    """
    outside = set[str]()
    further: dict[str, list[str]] = {}
    for name in names:
        numbered = _NUMBERED.match(name)
        outside.add(numbered[1] if numbered else name)
        if numbered and n_layers is not None and int(numbered[2]) >= n_layers:
            further.setdefault(f"{numbered[1]}.{numbered[2]}", []).append(name)
    found = {prefix: _named(prefix, media_built) for prefix in outside}
    heads = {
        layer
        for layer, tensors in further.items()
        if found[layer.rpartition(".")[0]] is None and joins_next_token(tensors)
    }
    return tuple(sorted(heads.union(part for part in found.values() if part)))


def _named(prefix: str, media_built: bool) -> str | None:
    """`model.visual` of `model.visual.blocks`, which is what its tensors' names have before the first number."""
    components = prefix.split(".")
    for depth, component in enumerate(components):
        if is_part(component):
            return None if media_built and is_media(component) else ".".join(components[: depth + 1])
    return None

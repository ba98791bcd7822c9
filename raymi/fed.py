"""Texts that are fed to a model otherwise than its tokenizer has it: under names of their own, beside the others."""

from typing import Literal

Fed = Literal["always", "never"]
_NAMES: dict[Fed, str] = {"always": " [with BOS]", "never": " [without BOS]"}


def fed_id(text_id: str, bos: Fed | None) -> str:
    """What a text is called that begins with exactly one BOS, or with none; None: as the tokenizer has it."""
    return text_id if bos is None else text_id + _NAMES[bos]


def plain_id(text_id: str) -> tuple[str, Fed | None]:
    """What a text is called in a job, and how it begins."""
    for bos, name in _NAMES.items():
        if text_id.endswith(name):
            return text_id.removesuffix(name), bos
    return text_id, None

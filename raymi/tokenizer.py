"""A cached model's tokenizer, and the texts of its tokens."""

from collections.abc import Iterable
from typing import Any

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.prompts import display


def load_tokenizer(model: CachedModel, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's snapshot; nothing is downloaded.

    Raises:
        UserError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # it reads many formats, whose readers raise anything
        raise UserError(f"{model.id}: its tokenizer cannot be read: {error}") from error


_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that stand around texts, and not those of chat templates: as SAELens has it."""
    return frozenset(token for name in _SPECIAL if (token := getattr(tokenizer, name, None)) is not None)


def token_texts(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """The readable text of every id (`prompts.display`), the lowest first."""
    wanted = sorted(set(token_ids))
    return dict(zip(wanted, display(tokenizer, wanted), strict=True))

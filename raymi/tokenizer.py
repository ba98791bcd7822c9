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


def token_texts(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """The readable text of every id. A head may be wider than the vocabulary: such an id is named by its number."""
    wanted = set(token_ids)
    known = sorted(token for token in wanted if token < len(tokenizer))
    texts = {token: f"<{token}>" for token in sorted(wanted)}
    return {**texts, **dict(zip(known, display(tokenizer, known), strict=True))}

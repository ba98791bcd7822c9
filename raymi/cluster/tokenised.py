"""Tokenised prompts as rows of table `prompts` and back: what a model's tokenizer said once need not be asked again."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from raymi.catalog import CachedModel
from raymi.prompts import Prompt, TokenizedPrompt
from raymi.store import schemas
from raymi.tokenizer import token_texts

if TYPE_CHECKING:
    import pyarrow as pa


def to_rows(model: CachedModel, prompts: Sequence[TokenizedPrompt], tokenizer: Any) -> "pa.Table":
    """One row a prompt; the tokenizer names the answers' tokens."""
    targets = {token for p in prompts for token in (p.answer_id, p.wrong_id) if token is not None}
    texts = token_texts(tokenizer, targets)
    return schemas.rows(
        "prompts",
        (
            {
                "model_id": model.id,
                "revision": model.revision,
                "prompt_id": p.prompt.id,
                "text": p.prompt.text,
                "answer": p.prompt.answer,
                "wrong": p.prompt.wrong,
                "subject": p.prompt.subject,
                "token_ids": p.token_ids,
                "tokens": p.tokens,
                "bos": p.bos,
                "answer_id": p.answer_id,
                "answer_token": None if p.answer_id is None else texts[p.answer_id],
                "wrong_id": p.wrong_id,
                "wrong_token": None if p.wrong_id is None else texts[p.wrong_id],
                "pieces": [{"piece": name, "positions": positions} for name, positions in p.pieces.items()],
            }
            for p in prompts
        ),
    )


def from_rows(records: Iterable[dict[str, Any]]) -> list[TokenizedPrompt]:
    """The prompts of such rows, in their order."""
    return [
        TokenizedPrompt(
            prompt=Prompt(row["prompt_id"], row["text"], row["answer"], row["wrong"], row["subject"]),
            token_ids=tuple(row["token_ids"]),
            tokens=tuple(row["tokens"]),
            bos=row["bos"],
            answer_id=row["answer_id"],
            wrong_id=row["wrong_id"],
            pieces={each["piece"]: tuple(each["positions"]) for each in row["pieces"]},
        )
        for row in records
    ]

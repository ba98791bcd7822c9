"""Whether a model has a row for every token that a prompt names: outside of its embedding there is nothing to look up.

On a CPU that would be an IndexError, on a GPU an assertion that takes the process with it.
"""

from collections.abc import Iterator
from typing import Any

from raymi.errors import UserError
from raymi.prompts import TokenizedPrompt


def check_ids(
    model_id: str, text: TokenizedPrompt, n_embedded: int | None, n_logits: int | None, *, answers: bool = True
) -> None:
    """Whether a model can be given a prompt, and can be asked for its answers.

    Args:
        model_id: what errors call the model.
        text: as the model's tokenizer reads it.
        n_embedded: rows of the embedding; None: not known.
        n_logits: tokens that the model can say; None: not known.
        answers: whether the answers are asked for.

    Raises:
        UserError: naming prompt, token and the vocabulary's size.
    """
    for what in _beyond(text, n_embedded, n_logits if answers else None):
        raise UserError(f"{model_id}: prompt {text.prompt.id!r}: {what}")


def check_loaded(model_id: str, text: TokenizedPrompt, model: Any, *, answers: bool = True) -> None:
    """The same for a loaded model (`HookedModel`), whose weights say what its config may say otherwise."""
    n_embedded = model.model.get_input_embeddings().weight.shape[0]
    check_ids(model_id, text, n_embedded, model.vocab_size, answers=answers)


def _beyond(text: TokenizedPrompt, n_embedded: int | None, n_logits: int | None) -> Iterator[str]:
    for position, (token, name) in enumerate(zip(text.token_ids, text.tokens, strict=True)):
        if n_embedded is not None and not 0 <= token < n_embedded:
            yield (
                f"the token {name!r} at position {position} has the id {token}, which the model has no embedding for: "
                f"its vocabulary has {n_embedded:,} tokens"
            )
    for kind, said, token in (
        ("answer", text.prompt.answer, text.answer_id),
        ("wrong answer", text.prompt.wrong, text.wrong_id),
    ):
        if n_logits is not None and token is not None and not 0 <= token < n_logits:
            yield (
                f"the {kind} {said!r} begins with the id {token}, which the model cannot say: "
                f"its vocabulary has {n_logits:,} tokens"
            )

"""Which prompts a model can never measure, and why: it is these that fail, and not the model."""

from collections.abc import Iterable, Sequence

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.autoencoders.refs import SaeRef, fed_as
from raymi.experiments.kind import Spec
from raymi.job import Job
from raymi.prompts import TokenizedPrompt
from raymi.vocabulary import check_ids


def check_length(prompt: TokenizedPrompt, model: CachedModel) -> None:
    """Raises UserError when a prompt, or a chunk of a corpus, is longer than the model's context."""
    if model.context is not None and len(prompt.token_ids) > model.context:
        raise UserError(
            f"{model.id}: prompt {prompt.prompt.id!r} has {len(prompt.token_ids)} tokens, "
            f"more than the model's context of {model.context}"
        )


def check_known(spec: Spec, prompt: TokenizedPrompt, model: CachedModel) -> None:
    """Raises UserError when the model has no row for a token that an experiment needs of a text."""
    size = model.vocab_size
    check_ids(model.id, prompt, size, size, answers=spec.asks_for_answers)


def why_unfit(spec: Spec, prompt: TokenizedPrompt, model: CachedModel) -> UserError | None:
    """Why an experiment can never measure a prompt that it chooses; None when it can."""
    try:
        check_known(spec, prompt, model)
        check_length(prompt, model)
        spec.check_prompt(prompt)
    except UserError as error:
        named = error.what.startswith(f"{model.id}: ")
        return error if named else UserError(f"{model.id}: {error.what}", hint=error.hint)
    return None


def fit(
    job: Job, spec: Spec, model: CachedModel, prompts: Iterable[TokenizedPrompt], saes: Sequence[SaeRef]
) -> list[TokenizedPrompt]:
    """The texts that an experiment chooses and can measure; `saes` are the autoencoders that it uses on the model."""
    chosen = [each for each in prompts if job.chooses(spec, each.prompt.id, fed_as(saes))]
    return [each for each in chosen if not why_unfit(spec, each, model)]

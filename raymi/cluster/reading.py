"""A job's texts as one model reads them: what the run has stored is what is measured, whatever a tokenizer says today.

Chat templates ask for the time, and files of a snapshot can be edited: tokens that are made anew may be others.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from raymi.errors import UserError
from raymi.fed import plain_id
from raymi.job import Job
from raymi.prompts import Prompt, PromptFault, TokenizedPrompt, fingerprint, tokenize_each

Texts = Mapping[str, TokenizedPrompt]
"""By id of the prompt, or of a corpus's chunk."""


def read(
    job: Job, former: Sequence[Prompt], known: Iterable[TokenizedPrompt], tokenizer: Any, *, model_id: str
) -> tuple[dict[str, TokenizedPrompt], dict[str, PromptFault]]:
    """Prompts and chunks of corpora, by id; and why those prompts of the job cannot be read that are not there.

    Args:
        job: the job.
        former: prompts that the run once had; what of them cannot be read is left out.
        known: what the run has of this model already. It is taken as it is.
        tokenizer: of the model, for what the run does not have.
        model_id: what errors call the model.

    Raises:
        UserError: nothing can be read; or more must be known of a stored text, and it is read otherwise today.
    """
    stored = {each.prompt.id: each for each in known}
    faults: dict[str, PromptFault] = {}

    def anew(prompts: Sequence[Prompt]) -> dict[str, TokenizedPrompt]:
        options: dict[str, Any] = {"bos": job.bos, "chat_template": job.chat_template, "pieces": job.pieces}
        found, bad = tokenize_each(prompts, tokenizer, **options, model_id=model_id)
        faults.update(bad)
        return {each.prompt.id: each for each in found}

    def again(prompt: Prompt) -> dict[str, TokenizedPrompt]:
        before = replace(stored[prompt.id], prompt=prompt)
        if not lacking(job, before):
            return {prompt.id: before}
        found = anew([prompt])
        for prompt_id, now in found.items():
            if fingerprint([now]) != fingerprint([before]):
                raise reads_otherwise(model_id, [before], [now])
            found[prompt_id] = replace(before, pieces={**now.pieces, **before.pieces})
        return found

    new = anew([prompt for prompt in job.prompts if prompt.id not in stored])
    texts: dict[str, TokenizedPrompt] = {}
    for prompt in job.prompts:
        if prompt.id in stored:
            texts |= again(prompt)
        elif prompt.id in new:
            texts[prompt.id] = new[prompt.id]
    for prompt in former:
        with contextlib.suppress(UserError):
            texts |= again(prompt) if prompt.id in stored else anew([prompt])
    for corpus in job.corpora:
        # A corpus's chunks come into the store all at once.
        its = [text_id for text_id in stored if plain_id(text_id) == (text_id, None) and corpus.holds(text_id)]
        chunks = [stored[text_id] for text_id in sorted(its, key=_number)]
        chunks = chunks or corpus.read(tokenizer, bos=job.bos, model_id=model_id)
        texts |= {each.prompt.id: each for each in chunks}
    wanted = {prompt.id for prompt in job.prompts}
    return texts, {prompt_id: fault for prompt_id, fault in faults.items() if prompt_id in wanted}


def _number(chunk: str) -> int:
    return int(chunk.rpartition("/")[2])


def lacking(job: Job, text: TokenizedPrompt) -> set[str]:
    """The pieces that a job's experiments name, and a prompt has, of which it is not known where they stand."""
    return {piece for piece in job.pieces - text.pieces.keys() if text.prompt.piece(piece) is not None}


def check_tokens(model_id: str, texts: Texts, prompt_ids: Sequence[str], planned: str) -> None:
    """Whether a unit's texts are those that it was planned for.

    Args:
        model_id: what errors call the model.
        texts: as they are about to be measured.
        prompt_ids: of the unit.
        planned: their `fingerprint` when the unit was planned; empty: it is not known.

    Raises:
        UserError: they are others.
    """
    found = [texts[each] for each in prompt_ids if each in texts]
    if planned and (len(found) < len(prompt_ids) or fingerprint(found) != planned):
        raise reads_otherwise(model_id, [], found)


def reads_otherwise(model_id: str, before: Sequence[TokenizedPrompt], now: Sequence[TokenizedPrompt]) -> UserError:
    """What is said of tokens that were made anew and are others."""
    which = ", ".join(repr(each.prompt.id) for each in (now or before)[:3]) + (", ..." if len(now) > 3 else "")
    were = f": it was {len(before[0].token_ids)} tokens, hash {fingerprint(before)}," if before else ": it is now"
    are = f" {len(now[0].token_ids)} tokens, hash {fingerprint(now)}" if now else " nothing"
    return UserError(
        f"{model_id}: its tokenizer does not read {which} as it did when the run planned what to measure"
        f"{were}{' and is now' if before else ''}{are}",
        hint="Its chat template may ask for the time, or its files were changed. Another run (--new) reads all anew.",
    )

"""What people write in a notebook, as what is meant by it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

from raymi.errors import UserError, quoted
from raymi.job import Job, make_job
from raymi.prompts import Prompt

Prompts = list[str] | list[Prompt] | list[str | Prompt] | tuple[str | Prompt, ...]


def prompts(given: object) -> list[Prompt] | None:
    """Several prompts, called by their places where they have no ids; None where it is one alone.

    Raises:
        UserError: there are none, or something else is among them.
    """
    if isinstance(given, str | Prompt):
        return None
    if not isinstance(given, Iterable) or isinstance(given, Mapping | bytes):
        raise UserError(f"a prompt is a text or a Prompt; found {quoted(given)}")
    found: list[Prompt] = []
    for index, each in enumerate(cast(Iterable[object], given)):
        if not isinstance(each, str | Prompt):
            raise UserError(f"prompt {index}: a prompt is a text or a Prompt; found {quoted(each)}")
        found.append(Prompt(str(index), each) if isinstance(each, str) else each)
    if not found:
        raise UserError("there are no prompts")
    return found


def one_prompt(given: object, method: str) -> str | Prompt:
    """The prompt of a method that takes just one.

    Raises:
        UserError: it is something else, such as a list of them.
    """
    if isinstance(given, str | Prompt):
        return given
    found = prompts(given)
    raise UserError(
        f"{method} takes one prompt, and was given {len(found or ())} together",
        hint=f"Call it for each of them: [model.{method}(prompt, ...) for prompt in prompts].",
    )


def sites(capture: object) -> list[str]:
    """Names of sites; one may stand alone.

    Raises:
        UserError: it is something else.
    """
    given = [capture] if isinstance(capture, str) else capture
    names = list(cast(Iterable[object], given)) if isinstance(given, Iterable) else [given]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"capture: a site is a name, such as 'blocks.0.hook_resid_pre'; found {quoted(wrong[0])}")
    return cast(list[str], names)


def written(prompt: str | Prompt, **given: str | None) -> dict[str, str]:
    """A prompt as a job writes it."""
    said = {key: value for key, value in given.items() if value is not None}
    if isinstance(prompt, str):
        return {"text": prompt, **said}
    prompt = replace(prompt, **said)
    fields = {key: getattr(prompt, key) for key in ("id", "text", "answer", "wrong", "subject")}
    return {key: value for key, value in fields.items() if value is not None}


def job(model_id: str, dtype: str, prompt: Mapping[str, str], axes: Mapping[str, object], **options: object) -> Job:
    """One prompt and one experiment as a job, which checks all that they may be."""
    experiment = {"kind": "knockout", **axes}
    data = {"models": model_id, "dtype": dtype, "prompts": [prompt], "experiments": [experiment], **options}
    try:
        return make_job({"name": "notebook", **data})
    except UserError as error:
        # In a notebook there is one prompt and one experiment.
        plain = re.sub(r"^(prompts|experiments)\.0\.(<\w+>\.)?", "", error.what, flags=re.MULTILINE)
        raise UserError(plain, hint=error.hint) from None

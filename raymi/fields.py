"""What everything in a job file is made of: models that know their fields, and errors that say what would be right."""

import re
from collections.abc import Callable, Iterable, Sized
from difflib import get_close_matches
from itertools import zip_longest
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from raymi.errors import HALF, MOST_QUOTED, quoted

_MOST_LINES = 20
"""Of what is wrong at one time, so much is said."""


class Fields(BaseModel):
    """A part of a job: frozen, and unknown fields are errors that suggest the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, data: object) -> object:
        fields = list(cls.model_fields)
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise problem(f"{found(data)}; allowed: a mapping of {', '.join(fields)}", found=data)
        unknown: list[object] = [key for key in data if key not in fields]  # pyright: ignore[reportUnknownVariableType]
        if unknown:
            likely = [near(key, fields) for key in unknown[:_MOST_LINES]]
            raise problems(
                (f"unknown field; allowed: {', '.join(fields)}{meant}", (key,))
                for key, meant in zip_longest(unknown, likely, fillvalue="")
            )
        broken = [key for key, value in data.items() if isinstance(value, str) and HALF.search(value)]  # pyright: ignore[reportUnknownVariableType]
        if broken:
            raise problems(("found half of a surrogate pair; allowed: text", (key,)) for key in broken)
        return data  # pyright: ignore[reportUnknownVariableType]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)]
"""Names or shell patterns; one may stand alone."""


NOTHING = "found nothing; allowed: at least one"


def _some(value: Sized) -> Sized:
    if not value:
        raise problem(NOTHING)
    return value


NotEmpty = AfterValidator(_some)
"""As pydantic's `min_length=1`, which also speaks up when an item is wrong."""


def problem(message: str, *loc: str | int, found: object = None) -> ValidationError:
    """An error of a validator that is about a place within what it validates: `loc`, field names and indices."""
    return problems([(message, loc)], found=found)


def problems(each: Iterable[tuple[str, tuple[object, ...]]], *, found: object = None) -> ValidationError:
    """The same for several (message, place) at once."""
    details = [
        InitErrorDetails(
            # The message travels as a value: pydantic would read braces in it as places to fill in.
            type=PydanticCustomError("raymi", "{message}", {"message": message}),
            loc=tuple(part if isinstance(part, int) else str(part) for part in loc),
            input=found,
        )
        for message, loc in each
    ]
    return ValidationError.from_exception_data("job", details)


def missing(field: str, *, found: object = None) -> ValidationError:
    """The error for a field that is not there, as pydantic would give it."""
    return ValidationError.from_exception_data("job", [InitErrorDetails(type="missing", loc=(field,), input=found)])


def found(value: object) -> str:
    """How a message begins that is about a value."""
    return "found nothing" if value is None else f"found {quoted(value)}"


def near(found: object, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when `found` is nearly one of `allowed`, else nothing."""
    said = found if isinstance(found, str) else quoted(found)
    matches = get_close_matches(said[:MOST_QUOTED], list(allowed), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


_ALLOWED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "string_type": "text (in quotes, where YAML would read a number or a date)",
    "string_too_short": "at least one character",
    "string_too_long": "at most {max_length} characters",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "path_type": "the path of a file",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
}
"""By pydantic's type of error."""


def say(error: ErrorDetails) -> str:
    """One error of pydantic in raymi's words: what was found and what is allowed, but not where."""
    value, message = error["input"], error["msg"]
    match error["type"]:
        case "missing":
            return "is missing"
        case "raymi":
            return message
        case "literal_error":
            allowed: list[str] = re.findall(r"'([^']*)'", error.get("ctx", {})["expected"])
            return f"{found(value)}; allowed: {', '.join(allowed)}{near(value, allowed)}"
        case "tuple_type" if value is None:
            return NOTHING
        case kind if kind in _ALLOWED:
            return f"{found(value)}; allowed: {_ALLOWED[kind].format(**error.get('ctx', {}))}"
        case _:
            return f"{found(value)}; {message[:1].lower()}{message[1:]}"


def all_said(errors: ValidationError, one: Callable[[ErrorDetails], str]) -> str:
    """What pydantic found wrong, a line each: the first of it, where there is much.

    Args:
        errors: what was found.
        one: a line that says what and where.
    """
    each = errors.errors(include_url=False)
    more = [f"... and {len(each) - _MOST_LINES:,} more"] if len(each) > _MOST_LINES else []
    return "\n".join([*map(one, each[:_MOST_LINES]), *more])

"""The axes along which experiments vary: layers, heads and positions, each by itself or together. No torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from raymi.errors import UserError
from raymi.fields import Fields, found, near, problem
from raymi.prompts import TokenizedPrompt


class Window(Fields):
    """For every layer, the `window` layers around it that exist, as in Geva et al. (2023).

    Layers are those that can be cut: with attention.
    """

    window: int = Field(strict=True, ge=1)


class Text(Fields):
    """The positions of the tokens that overlap the first occurrence of `text` in the prompt."""

    text: str = Field(min_length=1)

    @property
    def piece(self) -> str:
        """Its name in `TokenizedPrompt.pieces`."""
        return f"text:{self.text}"


LAYERS = "all, middle, an index, a negative index, a fraction of depth from 0.0 to 1.0, {window: k}"
HEADS = "all, an index, a negative index"
POSITIONS = "first, last, all, subject, {text: ...}, an index, a negative index"


def _element(value: object, words: Sequence[str], allowed: str, nested: type[Fields] | None = None) -> Any:
    """One element of an axis: an index, one of `words`, or a mapping that `nested` reads."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value in words:
        return value
    fields = list(nested.model_fields) if nested else []
    if nested and (isinstance(value, nested) or (isinstance(value, Mapping) and not value.keys().isdisjoint(fields))):
        return nested.model_validate(value)
    keys = ["each", "together", *fields]
    hint = "".join(near(key, keys) for key in value) if isinstance(value, Mapping) else near(value, words)
    raise problem(f"{found(value)}; allowed: {allowed}{hint}", found=value)


def _layer(value: object) -> Any:
    if isinstance(value, float):
        if 0 <= value <= 1:
            return value
        raise problem(f"{found(value)}; allowed: {LAYERS}", found=value)
    return _element(value, ("all", "middle"), LAYERS, Window)


def _head(value: object) -> Any:
    return _element(value, ("all",), HEADS)


def _position(value: object) -> Any:
    return _element(value, ("all", "first", "last", "subject"), POSITIONS, Text)


# Read by functions, since the error of a union says what is wrong once for each of its members.
Layer = Annotated[int | float | Literal["all", "middle"] | Window, BeforeValidator(_layer)]
Head = Annotated[int | Literal["all"], BeforeValidator(_head)]
Position = Annotated[int | Literal["all", "first", "last", "subject"] | Text, BeforeValidator(_position)]

T = TypeVar("T")


class Axis(Fields, Generic[T]):
    """What varies along one axis: `each` of its elements is a measurement of its own, or all are cut `together`.

    Exactly one of the two is given. In a job file a bare value or list means `each`.
    """

    each: tuple[T, ...] | None = None
    together: tuple[T, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, data: object) -> object:
        if isinstance(data, Axis):
            return cast(object, data)
        if isinstance(data, Mapping) and ("each" in data or "together" in data):
            return {key: _listed(value) for key, value in cast(Mapping[str, object], data).items()}
        return {"each": _listed(data)}

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Axis[T]":
        if (self.each is None) == (self.together is None):
            raise problem("allowed: one of each and together, with something in it")
        if not self.elements:
            raise problem("found an empty list, which cuts nothing", self.how)
        if "all" in self.elements and len(self.elements) > 1:
            raise problem("found all among others; allowed: all alone, or others", self.how)
        if self.together and any(isinstance(element, Window) for element in self.together):
            raise problem("found a window; windows are taken each", "together")
        return self

    @model_serializer(mode="wrap")
    def _drop_the_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def how(self) -> Literal["each", "together"]:
        return "together" if self.each is None else "each"

    @property
    def elements(self) -> tuple[T, ...]:
        return self.each if self.each is not None else self.together or ()

    def groups(self, resolve: Callable[[T], Iterable[int]]) -> list[tuple[int, ...]]:
        """The indices of every measurement along this axis, ascending, none twice."""
        indices = sorted({index for element in self.elements for index in resolve(element)})
        return [tuple(indices)] if self.each is None else [(index,) for index in indices]


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def pieces_of(axis: Axis[Position]) -> Iterator[str]:
    """The pieces of text that an axis of positions names."""
    for element in axis.elements:
        if element == "subject":
            yield "subject"
        elif isinstance(element, Text):
            yield element.piece


def positions(experiment: str, axis: Axis[Position], prompt: TokenizedPrompt) -> list[tuple[int, ...]]:
    """The positions of every measurement along an axis, in one prompt.

    Raises UserError, naming the experiment and the prompt, for a position or a piece that the prompt has not.
    """
    size = len(prompt.token_ids)

    def resolve(position: Position) -> Iterable[int]:
        match position:
            case "all":
                return range(size)
            case "first":
                return (0,)
            case "last":
                return (size - 1,)
            case int() if -size <= position < size:
                return (position % size,)
            case int():
                raise UserError(
                    f"experiment {experiment!r}: prompt {prompt.prompt.id!r}: position {position} is out of range: "
                    f"the prompt has {size} tokens",
                    hint=f"They are {list(prompt.tokens)}.",
                )
            case "subject" | Text():
                piece = position if isinstance(position, str) else position.piece
                if piece not in prompt.pieces:
                    raise UserError(f"experiment {experiment!r}: prompt {prompt.prompt.id!r} has no piece {piece!r}")
                return prompt.pieces[piece]

    return axis.groups(resolve)

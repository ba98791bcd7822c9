"""What `raymi knockout` asks of every model, as its options say it, and as a job."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymi.errors import UserError

if TYPE_CHECKING:
    from raymi.job import Job

_POSITION = r"""("[^"]+"|'[^']+'|[^:"']+)"""
_EDGE = re.compile(f"{_POSITION}:{_POSITION}")


@dataclass(frozen=True, slots=True)
class Question:
    """The options, as written."""

    prompt: str
    answer: str | None
    wrong: str | None
    layers: str
    heads: str
    edges: tuple[str, ...]
    """Each `query:key`; a piece of the prompt stands in quotes."""
    dtype: str
    device: str
    bos: str

    def job(self, models: Sequence[str]) -> "Job":
        """The same as a job on these models: one experiment an edge, since edges need not be queries times keys.

        Raises:
            UserError: naming the option, what was found and what is allowed.
        """
        from raymi.job import make_job

        prompt = {"id": "given", "text": self.prompt, "answer": self.answer, "wrong": self.wrong}
        cut = {"layers": {"together": _listed(self.layers)}, "heads": {"together": _listed(self.heads)}}
        edges = dict.fromkeys(self.edges)
        data: dict[str, object] = {
            "name": "knockout",
            "models": list(models),
            "prompts": [{key: value for key, value in prompt.items() if value is not None}],
            "experiments": [{"kind": "knockout", "name": edge, **cut, **_positions(edge)} for edge in edges],
            **{option: getattr(self, option) for option in ("dtype", "device", "bos")},
        }
        try:
            return make_job(data)
        except UserError as error:
            raise UserError("\n".join(dict.fromkeys(map(_as_option, error.what.splitlines())))) from None


def plain(message: str) -> str:
    """A message of the planning without the names that its experiments and its prompt have here only."""
    return re.sub(r"experiment '.*?': |prompt 'given': ", "", message).replace("prompt 'given'", "the prompt")


def _listed(option: str) -> list[int | float | str]:
    return [_element(part.strip()) for part in option.split(",")]


def _element(text: str) -> int | float | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _positions(edge: str) -> dict[str, Any]:
    """Both ends of an edge, as a knockout's queries and keys."""
    ends = _EDGE.fullmatch(edge)
    if ends is None:
        raise UserError(
            f"--edge: found {edge!r}; allowed: QUERY:KEY, such as last:first",
            hint="A piece of the prompt stands in quotes: --edge 'last:\"France\"'.",
        )
    query, key = ({"text": end[1:-1]} if end[0] in "\"'" else _element(end.strip()) for end in ends.groups())
    return {"queries": {"together": [query]}, "keys": {"together": [key]}}


_POSITIONS = "first, last, all, an index, a negative index, a piece of the prompt in quotes"
_FIELDS = (
    (r"^prompts\.0\.(<\w+>\.)?text\b", "--prompt"),
    (r"^prompts\.0\.(<\w+>\.)?(\w+)", r"--\2"),
    (r"^experiments\.\d+\.(layers|heads)[\w.]*", r"--\1"),
    (r"^experiments\.\d+\.(queries|keys)[\w.]*", "--edge"),
    (r"^(dtype|device|bos)\b", r"--\1"),
    (r", \{window: k\}", ""),
    (r"allowed: .*\{text: \.\.\.\}.*", f"allowed: {_POSITIONS}"),
    (r"'text:(.*?)', which prompt 'given' has not", r"'\1', which is not in the prompt"),
    (r"'subject', which prompt 'given' has not.*", f"'subject'; allowed: {_POSITIONS}"),
)
"""A job's fields and what they may hold, and how that is said on the command line."""


def _as_option(error: str) -> str:
    for pattern, replacement in _FIELDS:
        error = re.sub(pattern, replacement, error)
    return error

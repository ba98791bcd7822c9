"""What is allowed of single models by name: a name that does nothing is a mistake, and is said."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from raymi import catalog
from raymi.errors import UserError


def ids(references: Sequence[str]) -> frozenset[str]:
    """Of `id` or `id@revision`: what is allowed of a model is so at each revision."""
    return frozenset(reference.partition("@")[0] for reference in references)


def check(
    given: Mapping[str, Sequence[str]], wanted: Sequence[str], cache_dir: Path | None, *, download: bool = False
) -> None:
    """Whether each model that an option names is one that the command is about.

    Args:
        given: by option, the models that it names.
        wanted: ids or patterns of the models that the command is about.
        cache_dir: the cache.
        download: whether a model that is not there is fetched.

    Raises:
        UserError: one is not.
    """
    if not any(given.values()):
        return
    there = [model.id for model in catalog.scan(cache_dir)]
    for option, references in given.items():
        for id in sorted(ids(references)):
            if not any(fnmatchcase(id, pattern.partition("@")[0]) for pattern in wanted):
                raise UserError(
                    f"{option} {id}: this model is not among those that are asked for ({', '.join(wanted)})",
                    hint="An id is written out, without a pattern." if set("*?[") & set(id) else None,
                )
            if id not in there and not download:
                from raymi.fields import near  # which takes a while

                hint = near(id, there).strip() or "`raymi models` lists what is there."
                raise UserError(f"{option} {id}: there is no such model in the cache", hint=hint)

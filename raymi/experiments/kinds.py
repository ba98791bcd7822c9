"""The kinds of experiment that there are: the folders of this room, and what other packages bring.

A package adds a kind by an entry point of the group `raymi.experiments` that names a `Kind`.
"""

import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import NamedTuple

import raymi.experiments
from raymi.errors import UserError
from raymi.experiments.kind import Kind, Spec, Table

GROUP = "raymi.experiments"
"""Of entry points."""


class Unusable(NamedTuple):
    """A kind that is installed and cannot be had."""

    name: str
    package: str
    why: str


class _Found(NamedTuple):
    kinds: Mapping[str, Kind]
    unusable: tuple[Unusable, ...]
    packages: Mapping[str, str]


def kinds() -> Mapping[str, Kind]:
    """All that can be used, by name: raymi's own first."""
    return _found().kinds


def unusable() -> tuple[Unusable, ...]:
    """Those that other packages bring and that cannot be used, with the reason."""
    return _found().unusable


def package(name: str) -> str:
    """Who brings a kind: `raymi`, or the name of another package."""
    return _found().packages[name]


def kind_of(spec: Spec) -> Kind:
    """The kind that an experiment is of."""
    return kinds()[spec.kind]


def tables() -> Mapping[str, Table]:
    """The tables of all kinds, by name."""
    return {name: table for kind in kinds().values() for name, table in kind.tables.items()}


@cache
def _found() -> _Found:
    kinds = {kind.name: kind for kind in _own()}
    packages = dict.fromkeys(kinds, "raymi")
    taken = {table: kind.name for kind in kinds.values() for table in kind.tables}
    unusable: list[Unusable] = []
    by_name: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, _package(point))):
        by_name.setdefault(point.name, []).append(point)
    for name, points in by_name.items():
        whose = " and ".join(["raymi"] * (name in packages) + [_package(point) for point in points])
        if name in packages or len(points) > 1:
            unusable.append(Unusable(name, whose, f"{whose} both bring a kind of that name: uninstall one of them"))
            continue
        try:
            kind = _loaded(points[0])
            if clash := sorted(kind.tables.keys() & taken.keys()):
                raise UserError(f"its table {clash[0]!r} is one of the kind {taken[clash[0]]!r}")
        except Exception as error:  # another's code may fail in any way: no reason to go without the rest
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            unusable.append(Unusable(name, whose, why))
            continue
        kinds[name], packages[name] = kind, whose
        taken |= dict.fromkeys(kind.tables, name)
    return _Found(kinds, tuple(unusable), packages)


def _own() -> Iterator[Kind]:
    for module in pkgutil.iter_modules(raymi.experiments.__path__, "raymi.experiments."):
        if module.ispkg and find_spec(f"{module.name}.spec"):
            yield import_module(f"{module.name}.spec").KIND


def _loaded(point: EntryPoint) -> Kind:
    found = point.load()
    if not isinstance(found, Kind):
        raise UserError(f"{point.value} is no raymi.experiments.kind.Kind")
    if found.name != point.name:
        raise UserError(f"{point.value} calls itself {found.name!r}, and its entry point {point.name!r}")
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]

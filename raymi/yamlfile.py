"""A YAML file that remembers where everything in it stands."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from raymi.errors import UserError

_MAP = "tag:yaml.org,2002:map"
_STR = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"


class YamlFile:
    """The tree of a YAML file, in which values can be set from elsewhere; every node knows where it comes from."""

    def __init__(self, path: Path) -> None:
        """Reads a file that holds a mapping; UserError with file and line otherwise."""
        try:
            root = _compose(str(path), path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"there is no file {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}:1: found no mapping of fields to values")
        self._root = root

    def set(self, assignment: str) -> None:
        """Sets one value: `key=value`, where the key is dotted (`experiments.0.layers`) and the value is YAML."""
        origin = f"--set {assignment}"
        key, equals, text = assignment.partition("=")
        *parents, last = key.strip().split(".")
        if not equals or not all([*parents, last]):
            raise UserError(f"{origin}: allowed: key=value, such as experiments.0.layers=all")
        mark = yaml.Mark(origin, 0, 0, 0, None, 0)
        value = _compose(origin, text) or yaml.ScalarNode(_NULL, "", mark, mark)
        node: yaml.Node = self._root
        for part in parents:
            child = _child(node, part)
            if child is None:
                child = (node, yaml.MappingNode(_MAP, [], mark, mark))
                _put(node, part, child[1], origin)
            node = child[1]
        _put(node, last, value, origin)

    def data(self) -> dict[str, Any]:
        """All of it as plain values."""
        try:
            return _Constructor().construct_document(self._root)
        except yaml.YAMLError as error:
            raise _no_yaml(self._root.start_mark.name, error) from None

    def place(self, path: Sequence[str | int]) -> str:
        """`file:line: field` of what stands at a path, or of the deepest part of the path that the file has.

        Parts of the path that are not in the file are passed over, but for the first: validation adds names of its own.
        """
        node: yaml.Node = self._root
        seen, field = node, str(path[0]) if path else ""
        for depth, part in enumerate(path):
            child = _child(node, part)
            if child is not None:
                seen, node = child
                field = f"{field}.{part}" if depth else field
        if node.start_mark.name.startswith("--set "):
            return f"{node.start_mark.name}: {field}"
        where = _where(seen.start_mark)
        return f"{where}: {field}" if field else where


class _Constructor(SafeConstructor):
    """Makes plain values, and says of each that cannot be made where it stands: it may come from `--set`."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # pyright: ignore[reportUnknownMemberType]
        except yaml.constructor.ConstructorError as error:
            if error.problem and "determine a constructor" in error.problem:
                what = f"found the tag {_tag(node)!r}; allowed: none (a text that begins with ! stands in quotes)"
                raise UserError(f"{_where(node.start_mark)}: {what}") from None
            raise
        except (ValueError, AttributeError, TypeError):  # such as a date that is none
            raise UserError(f"{_where(node.start_mark)}: {node.value!r} is no {_tag(node)}") from None


def _tag(node: yaml.Node) -> str:
    return str(node.tag).replace("tag:yaml.org,2002:", "!!")


def _where(mark: yaml.Mark) -> str:
    """`file:line`; what comes from the command line has no lines."""
    return mark.name if mark.name.startswith("--set ") else f"{mark.name}:{mark.line + 1}"


def _compose(name: str, text: str) -> yaml.Node | None:
    try:
        loader = yaml.SafeLoader(text)
        loader.name = name  # what the marks of all nodes will say
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise _no_yaml(name, error) from None
    for mapping in _mappings(root):
        keys: set[str] = set()
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{_where(key.start_mark)}: found a list or a mapping for a key; allowed: a word")
            if key.value in keys:
                raise UserError(f"{_where(key.start_mark)}: {key.value}: stands here a second time")
            keys.add(key.value)
    return root


def _mappings(root: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    queue, seen = [root], set[int]()
    while queue:
        node = queue.pop()
        if id(node) in seen:  # an alias may lead back
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            queue += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            queue += node.value


def _no_yaml(name: str, error: yaml.YAMLError) -> UserError:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return UserError(f"{_where(error.problem_mark)}: is no valid YAML: {error.problem}")
    return UserError(f"{name}: is no valid YAML: {error}")


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """(Where it is named, what it is) of an entry of a mapping or a list."""
    if isinstance(node, yaml.MappingNode):
        # The last one: merged keys (`<<`) stand before a mapping's own.
        return next(((key, value) for key, value in reversed(node.value) if key.value == str(part)), None)
    if isinstance(node, yaml.SequenceNode) and str(part).isdecimal() and int(part) < len(node.value):
        return (node.value[int(part)],) * 2
    return None


def _put(node: yaml.Node, part: str, value: yaml.Node, origin: str) -> None:
    if isinstance(node, yaml.MappingNode):
        key = yaml.ScalarNode(_STR, part, value.start_mark, value.end_mark)
        node.value = [(k, v) for k, v in node.value if k.value != part] + [(key, value)]
    elif isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
        node.value[int(part)] = value
    elif isinstance(node, yaml.SequenceNode):
        raise UserError(f"{origin}: found {part}; allowed: an index below {len(node.value)}")
    else:
        raise UserError(f"{origin}: {part} cannot be set in a value that has no fields")

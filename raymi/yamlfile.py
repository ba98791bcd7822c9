"""A YAML file that remembers where everything in it stands."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from raymi.errors import HALF, MOST_QUOTED, UserError, quoted, shortened

_MAP = "tag:yaml.org,2002:map"
_STR = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"
_DEEPEST = 100
"""Lists and mappings within each other."""
_MOST_REPEATED = 1_000_000
"""Characters by which aliases (`*name`) may make a file more than it is: a few lines can stand for many gigabytes."""
_LARGEST = 2**63


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
        origin = f"--set {shortened(assignment, MOST_QUOTED)}"
        key, equals, text = assignment.partition("=")
        *parents, last = key.strip().split(".")
        if not equals or not all([*parents, last]):
            raise UserError(f"{origin}: allowed: key=value, such as experiments.0.layers=all")
        if len(parents) > _DEEPEST:
            raise UserError(f"{origin}: found {len(parents) + 1} fields within each other; allowed: {_DEEPEST}")
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
            value: Any = super().construct_object(node, deep)  # pyright: ignore[reportUnknownMemberType]
        except yaml.constructor.ConstructorError as error:
            if error.problem and "determine a constructor" in error.problem:
                what = f"found the tag {_tag(node)!r}; allowed: none (a text that begins with ! stands in quotes)"
                raise UserError(f"{_where(node.start_mark)}: {what}") from None
            raise
        except (ValueError, AttributeError, TypeError, LookupError, ArithmeticError):  # such as a date that is none
            raise UserError(f"{_where(node.start_mark)}: {quoted(node.value)} is no {_tag(node)}") from None
        if type(value) is int and not -_LARGEST <= value < _LARGEST:
            raise UserError(f"{_where(node.start_mark)}: {quoted(node.value)} is too large a number")
        return value


class _Loader(yaml.SafeLoader):
    """Reads a document whose values, each alias put in its place, are not too deep nor too many, and no text is broken.

    What stands in the tree knows its size and height as soon as it is read, since aliases only lead to what is before.
    """

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name  # what the marks of all nodes will say
        self._inside = 0
        self._written = 0
        self._known: dict[int, tuple[int, int]] = {}
        """Of each node that is complete: characters, and nodes within each other."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        mark: yaml.Mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)  # pyright: ignore[reportArgumentType]
            if node is not None and id(node) not in self._known:
                raise UserError(f"{_where(mark)}: found an alias of what it stands in itself")
            return node
        self._inside += 1
        _check_depth(self._inside, mark)
        node = super().compose_node(parent, index)  # pyright: ignore[reportArgumentType]
        self._inside -= 1
        if node is not None:
            self._known[id(node)] = self._measured(node)
        return node

    def _measured(self, node: yaml.Node) -> tuple[int, int]:
        match node:
            case yaml.ScalarNode(value=str(text)):
                if HALF.search(text):
                    raise UserError(f"{_where(node.start_mark)}: found half of a surrogate pair; allowed: text")
                size, height, below = 1 + len(text), 0, 0
            case _:
                parts: list[Any] = node.value
                parts = [each for pair in parts for each in pair] if isinstance(node, yaml.MappingNode) else parts
                found = [self._known[id(part)] for part in parts]
                size, height = 1, max((high for _, high in found), default=0)
                below = sum(large for large, _ in found)
        self._written += size
        _check_depth(height + 1, node.start_mark)
        if size + below > self._written + _MOST_REPEATED:
            raise UserError(
                f"{_where(node.start_mark)}: its aliases repeat so much that it comes to {size + below:,} characters; "
                f"allowed: {_MOST_REPEATED:,} more than the file has"
            )
        return size + below, height + 1


def _check_depth(depth: int, mark: yaml.Mark) -> None:
    if depth > _DEEPEST:
        raise UserError(f"{_where(mark)}: found more than {_DEEPEST} lists or mappings within each other")


def _tag(node: yaml.Node) -> str:
    return str(node.tag).replace("tag:yaml.org,2002:", "!!")


def _where(mark: yaml.Mark) -> str:
    """`file:line`; what comes from the command line has no lines."""
    return mark.name if mark.name.startswith("--set ") else f"{mark.name}:{mark.line + 1}"


def _compose(name: str, text: str) -> yaml.Node | None:
    try:
        root = _Loader(text, name).get_single_node()
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

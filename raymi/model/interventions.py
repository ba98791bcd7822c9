"""What can be done to a model while it runs, and the first place that it touches.

Nothing below the first layer touched and nothing before the first position touched can change: that is an
intervention's causal cone.

Negative positions count from a prompt's end, and so mean something only on a prompt: `meant.on_prompt` has them counted
from its beginning, as all that computes wants them.

Legend: D hidden size, H heads, T positions, W head width.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, cast

from torch import Tensor

EDITABLE = (
    "hook_resid_pre",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_out",
    "mlp.hook_out",
    "attn.hook_z",
)
"""Sites, after `blocks.{layer}.`, that can be changed. In place of `hook_resid_mid`, change what is added there."""
BY_HEAD = "attn.hook_z"
"""The one of them whose heads can be changed by themselves."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Attention edges of one layer are cut: their scores become -inf in the place of the causal mask.

    Acts at `blocks.{layer}.attn.hook_attn_scores`, after a softcap. A query left without any key attends to nothing:
    its head's output is zero.
    """

    site: ClassVar[str] = "attn.hook_attn_scores"
    layer: int
    heads: tuple[int, ...] | None
    """Query heads; None: all of them."""
    edges: tuple[tuple[int, int], ...]
    """(query position, key position), key not after query."""

    def __post_init__(self) -> None:
        """Raises ValueError for what would cut nothing, or something else than it says; TypeError for other types."""
        for what, found, right in (
            ("a layer is an int", self.layer, _counts(self.layer)),
            ("heads are a tuple of ints, such as (4,)", self.heads, self.heads is None or _all_count(self.heads)),
            ("edges are pairs (query, key) of ints, such as ((4, 0),)", self.edges, _are_edges(self.edges)),
        ):
            if not right:
                raise TypeError(f"{self}: {what}; found {found!r}")
        if nothing := _empty(edges=self.edges, heads=self.heads):
            raise ValueError(f"{self} cuts nothing: it names no {nothing}")
        if self.layer < 0 or min(self.heads or (0,)) < 0:
            raise ValueError(f"{self}: layers and heads count from 0")
        for query, key in self.edges:
            # Which of two comes first, counted from either end, only a prompt tells.
            if key > query and (key < 0) == (query < 0):
                raise ValueError(f"{self}: no causal model has an edge from query {query} to key {key}")

    @property
    def first_query(self) -> int:
        """Of a mask whose positions count from 0."""
        return min(query for query, _ in self.edges)


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """The activation x at some positions of a site becomes `factor` * x + `shift`.

    Made by `zero`, `mean`, `replace`, `add` and `scale`.
    """

    layer: int
    site: str
    """One of `EDITABLE`."""
    positions: tuple[int, ...]
    heads: tuple[int, ...] | None
    """At `attn.hook_z`, None meaning all; None at other sites."""
    factor: float
    shift: Tensor | None = field(repr=False)
    """[D] at all positions alike, or [positions, D]; at `attn.hook_z` [W], [heads, W] or [positions, heads, W].

    Or what was captured, [1, T, D] or [1, T, H, W] of a prompt as long as the one that is changed: of that, what stood
    at the positions (and heads)."""

    def __post_init__(self) -> None:
        """Raises ValueError for what would change nothing, or something else than it says; TypeError for other types.

        What only a model can tell, such as whether there is the site, is found out when it is run.
        """
        heads = () if self.heads is None else self.heads
        for what, found, right in (
            ("a layer is an int", self.layer, _is_index(self.layer)),
            ("positions are a tuple of ints, such as (4,)", self.positions, _are_indices(self.positions)),
            ("heads are a tuple of ints, such as (4,)", heads, _are_indices(heads)),
            ("a factor is a number", self.factor, _is_number(self.factor)),
            ("a value is a tensor", self.shift, self.shift is None or _is_tensor(self.shift)),
        ):
            if not right:
                raise TypeError(f"{self}: {what}; found {found!r}")
        if nothing := _empty(positions=self.positions, heads=self.heads):
            raise ValueError(f"{self} changes nothing: it names no {nothing}")
        if self.heads is not None and self.site in EDITABLE and self.site != BY_HEAD:
            raise ValueError(f"{self}: {self.site} is of all heads together; only {BY_HEAD} is of each by itself")
        if min((self.layer, *(self.heads or ()))) < 0:
            raise ValueError(f"{self}: layers and heads count from 0")
        for what, indices in (("position", self.positions), ("head", self.heads or ())):
            # It would act once, and be counted twice.
            if len(set(indices)) < len(indices):
                again = next(index for index in indices if indices.count(index) > 1)
                raise ValueError(f"{self} names {what} {again} more than once")

    @property
    def first_query(self) -> int:
        """Of an edit whose positions count from 0."""
        return min(self.positions)

    @property
    def captured(self) -> bool:
        """Whether its value is a capture of a whole prompt."""
        return self.shift is not None and self.shift.dim() == (4 if self.site == BY_HEAD else 3)


Intervention = Mask | Edit

Heads = tuple[int, ...] | None


def zero(layer: int, site: str, positions: tuple[int, ...], heads: Heads = None) -> Edit:
    """Zero ablation."""
    return Edit(layer, site, positions, heads, 0.0, None)


def mean(layer: int, site: str, positions: tuple[int, ...], value: Tensor, heads: Heads = None) -> Edit:
    """Mean ablation; `value` is the mean of the site over a reference set (see `HookedModel.mean`)."""
    made = Edit(layer, site, positions, heads, 0.0, value)
    if made.captured:
        raise ValueError(
            f"{made}: a value of shape {list(value.shape)} is what was captured at each position; its mean is "
            "value.mean((0, 1)), and `replace` puts it in as it is"
        )
    return made


def replace(layer: int, site: str, positions: tuple[int, ...], value: Tensor, heads: Heads = None) -> Edit:
    """Activation patching: `value` comes from another run, and may be what was captured there, as it is."""
    return Edit(layer, site, positions, heads, 0.0, value)


def add(layer: int, site: str, positions: tuple[int, ...], value: Tensor, heads: Heads = None) -> Edit:
    """Steering: `value` is added."""
    return Edit(layer, site, positions, heads, 1.0, value)


def scale(layer: int, site: str, positions: tuple[int, ...], factor: float, heads: Heads = None) -> Edit:
    """The activation times `factor`."""
    return Edit(layer, site, positions, heads, factor, None)


def _is_index(index: object) -> bool:
    return isinstance(index, int) and not isinstance(index, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _counts(index: object) -> bool:
    """Whether it can be an index, as NumPy's integers can, too."""
    return hasattr(index, "__index__") and not isinstance(index, bool)


def _all_count(indices: object) -> bool:
    return isinstance(indices, tuple | list) and all(map(_counts, cast(Sequence[object], indices)))


def _are_edges(edges: object) -> bool:
    if not isinstance(edges, tuple | list):
        return False
    pairs = cast(Sequence[Any], edges)
    # There can be a million of them, in every layer: so it goes by their types first.
    if set(map(type, pairs)) <= {tuple} and set(map(type, chain.from_iterable(pairs))) <= {int}:
        return set(map(len, pairs)) <= {2}
    return all(_all_count(pair) and len(pair) == 2 for pair in pairs)


def _are_indices(indices: object) -> bool:
    return isinstance(indices, tuple) and all(map(_is_index, cast(tuple[object, ...], indices)))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _empty(**named: Collection[object] | None) -> str | None:
    """The first of these that has nothing in it; None for heads means all of them."""
    return next((what for what, indices in named.items() if indices is not None and not indices), None)

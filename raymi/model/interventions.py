"""What can be done to a model while it runs, and the first place that it touches.

Nothing below the first layer touched and nothing before the first position touched can change: that is an
intervention's causal cone.

Legend: D hidden size, W head width.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar, cast

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
    """(query position, key position), key <= query."""

    def __post_init__(self) -> None:
        """Raises ValueError for what would cut nothing, or something else than it says."""
        if nothing := _empty(edges=self.edges, heads=self.heads):
            raise ValueError(f"{self} cuts nothing: it names no {nothing}")
        if self.layer < 0 or min(self.heads or (0,)) < 0:
            raise ValueError(f"{self}: layers and heads count from 0")
        for query, key in self.edges:
            if not 0 <= key <= query:
                raise ValueError(f"{self}: no causal model has an edge from query {query} to key {key}")

    @property
    def first_query(self) -> int:
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
    """[D] at all positions alike, or [positions, D]; at `attn.hook_z` [W], [heads, W] or [positions, heads, W]."""

    def __post_init__(self) -> None:
        """Raises ValueError for what would change nothing, or something else than it says; TypeError for other types.

        What only a model can tell, such as whether there is the site, is found out when it is run.
        """
        heads = () if self.heads is None else self.heads
        for what, found, right in (
            ("a layer is an int", self.layer, _is_index(self.layer)),
            ("positions are a tuple of ints, such as (4,)", self.positions, _are_indices(self.positions)),
            ("heads are a tuple of ints, such as (4,)", heads, _are_indices(heads)),
            ("a value is a tensor", self.shift, self.shift is None or _is_tensor(self.shift)),
        ):
            if not right:
                raise TypeError(f"{self}: {what}; found {found!r}")
        if nothing := _empty(positions=self.positions, heads=self.heads):
            raise ValueError(f"{self} changes nothing: it names no {nothing}")
        if self.heads is not None and self.site in EDITABLE and self.site != BY_HEAD:
            raise ValueError(f"{self}: {self.site} is of all heads together; only {BY_HEAD} is of each by itself")
        if min(self.layer, *self.positions, *(self.heads or ())) < 0:
            raise ValueError(f"{self}: layers, heads and positions count from 0")
        for what, indices in (("position", self.positions), ("head", self.heads or ())):
            # It would act once, and be counted twice.
            if len(set(indices)) < len(indices):
                again = next(index for index in indices if indices.count(index) > 1)
                raise ValueError(f"{self} names {what} {again} more than once")

    @property
    def first_query(self) -> int:
        return min(self.positions)


Intervention = Mask | Edit

Heads = tuple[int, ...] | None


def zero(layer: int, site: str, positions: tuple[int, ...], heads: Heads = None) -> Edit:
    """Zero ablation."""
    return Edit(layer, site, positions, heads, 0.0, None)


def mean(layer: int, site: str, positions: tuple[int, ...], value: Tensor, heads: Heads = None) -> Edit:
    """Mean ablation; `value` is the mean of the site over a reference set (see `HookedModel.mean`)."""
    return Edit(layer, site, positions, heads, 0.0, value)


def replace(layer: int, site: str, positions: tuple[int, ...], value: Tensor, heads: Heads = None) -> Edit:
    """Activation patching: `value` comes from another run."""
    return Edit(layer, site, positions, heads, 0.0, value)


def add(layer: int, site: str, positions: tuple[int, ...], value: Tensor, heads: Heads = None) -> Edit:
    """Steering: `value` is added."""
    return Edit(layer, site, positions, heads, 1.0, value)


def scale(layer: int, site: str, positions: tuple[int, ...], factor: float, heads: Heads = None) -> Edit:
    """The activation times `factor`."""
    return Edit(layer, site, positions, heads, factor, None)


def _is_index(index: object) -> bool:
    return isinstance(index, int) and not isinstance(index, bool)


def _are_indices(indices: object) -> bool:
    return isinstance(indices, tuple) and all(map(_is_index, cast(tuple[object, ...], indices)))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _empty(**named: Collection[object] | None) -> str | None:
    """The first of these that has nothing in it; None for heads means all of them."""
    return next((what for what, indices in named.items() if indices is not None and not indices), None)

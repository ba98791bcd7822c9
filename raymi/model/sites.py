"""Hook-point names and the places in a model that they stand for.

The names and shapes are TransformerLens's. Where a block's own modules add something to the residual stream is
measured with one short forward, never guessed from a class name: `hook_attn_out` is whatever makes
resid_post = resid_pre + attn_out + mlp_out come out, so it is taken after a post-norm where the family has one.

Legend: B rows, T positions, D hidden size, H heads, W head width.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from raymi.model.normalised import Norm

Hook = Callable[..., object]

IN_ATTENTION = ("rot_q", "rot_k", "v", "attn_scores", "pattern")
NAMES = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_out",
    "mlp.hook_out",
    "mlp.hook_in",
    "ln2.hook_normalized",
    "attn.hook_z",
    *(f"attn.hook_{name}" for name in IN_ATTENTION),
)
"""What follows `blocks.{layer}.`; the embedding is `hook_embed`, and has no layer.

`hook_attn_out` and `hook_mlp_out` are what is added to the residual stream; `attn.hook_out` and `mlp.hook_out` are what
the modules give by themselves, before any post-norm or multiplier. `mlp.hook_in` is what the MLP is fed, whatever norm
it comes from, and the norm's weights are in it; in `ln2.hook_normalized` they are not, folded or not (TransformerLens
before version 3 had those of a LayerNorm in it).
"""


class UnknownSite(ValueError):
    """A name that is no hook point of this model."""


class NoSuchPlace(RuntimeError):
    """A model is built in a way in which raymi does not find its way about."""


@dataclass(frozen=True, slots=True)
class Site:
    layer: int | None
    """None for the embedding."""
    name: str
    """As in `NAMES`, or `hook_embed`."""

    def __str__(self) -> str:
        return self.name if self.layer is None else f"blocks.{self.layer}.{self.name}"


def parse(text: str, n_layers: int) -> Site:
    """A site from its TransformerLens name.

    Raises:
        UnknownSite: with the nearest names that do exist.
    """
    if text == "hook_embed":
        return Site(None, text)
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", text)
    if match and match[2] in NAMES:
        if int(match[1]) >= n_layers:
            raise UnknownSite(f"{text}: this model has layers 0 to {n_layers - 1}")
        return Site(int(match[1]), match[2])
    layer = match[1] if match else "0"
    known = ["hook_embed", *(f"blocks.{layer}.{name}" for name in NAMES)]
    near = difflib.get_close_matches(text, known, n=1, cutoff=0.0)
    raise UnknownSite(f"{text!r} is no hook point; did you mean {near[0]!r}? There are: {', '.join(known)}")


def first_tensor(output: object) -> Tensor:
    """A module's output, or the first tensor of the tuple that it returns."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output:  # pyright: ignore[reportUnknownArgumentType]
        return first_tensor(output[0])  # pyright: ignore[reportUnknownArgumentType]
    raise NoSuchPlace(f"a module returned {type(output).__name__} where a tensor was expected")


def hidden_input(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """The hidden states that a module was called with."""
    value = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    if not isinstance(value, Tensor):
        raise NoSuchPlace("a module was called without hidden states as its first argument")
    return value


@dataclass(slots=True)
class Block:
    """One decoder layer and the places in it that were found; what was not found is None, with the reason in `why`."""

    module: nn.Module
    attention: nn.Module | None = None
    resid: nn.Module | None = None
    """The layer itself, where what it is given and gives is one tensor of [rows, positions, width]."""
    z: nn.Module | None = None
    """The attention's output projection: its input is z."""
    z_by_module: bool = False
    """Whether that goes for z although raymi's attention function gives it, too: for second opinions."""
    attn_out: nn.Module | None = None
    """Its output is what attention adds to the residual stream."""
    mlp_out: nn.Module | None = None
    attn_module: nn.Module | None = None
    """Its output is the attention's own, before a post-norm."""
    mlp_module: nn.Module | None = None
    resid_mid: nn.Module | None = None
    """The module whose input is the residual stream between attention and MLP."""
    mlp_in: nn.Module | None = None
    """The MLP's first matrix: its input is what the MLP is fed."""
    norm: Norm | None = None
    """The norm that gives this."""
    why: str = ""
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    """Name of a site -> why this one is not here, where that is not `why`."""


def decoder_layers(model: nn.Module, n_layers: int, run: Callable[[], object]) -> list[nn.Module]:
    """The decoder's layers: the one list of modules that a forward calls once each, in order, and that is in no other.

    Args:
        model: any causal language model.
        n_layers: as its config says.
        run: runs a short forward.

    Raises:
        NoSuchPlace: there is none, or more than one.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    calls: dict[int, list[int]] = {id(candidate): [] for candidate in lists}

    def note(candidate: nn.ModuleList, index: int) -> Hook:
        return lambda *_: calls[id(candidate)].append(index)

    handles = [
        layer.register_forward_pre_hook(note(candidate, index))  # pyright: ignore[reportArgumentType]
        for candidate in lists
        for index, layer in enumerate(candidate)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    in_order = [candidate for candidate in lists if calls[id(candidate)] == list(range(n_layers))]
    inside = {part for each in in_order for part in each.modules() if part is not each}
    found = [candidate for candidate in in_order if candidate not in inside]
    if len(found) > 1:
        names = {id(module): name for name, module in model.named_modules()}
        listed = ", ".join(names[id(candidate)] for candidate in found)
        raise NoSuchPlace(f"{len(found)} lists of {n_layers} modules could be its decoder layers: {listed}")
    if not found:
        raise NoSuchPlace(f"no list of {n_layers} decoder layers that are called in order was found")
    return list(found[0])


def backbone(model: nn.Module, layers: list[nn.Module], run: Callable[[], object]) -> nn.Module:
    """What a causal language model calls to get the hidden states that it unembeds.

    Args:
        model: the model with its head.
        layers: its decoder layers.
        run: runs a short forward.
    """
    called: list[nn.Module] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(getattr(output, "last_hidden_state", None), Tensor):
            called.append(module)

    around = [m for m in model.modules() if m is not model and layers[0] in set(m.modules()) and m is not layers[0]]
    handles = [module.register_forward_hook(note) for module in around]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise NoSuchPlace(f"{type(model).__name__} has no part that returns the last hidden states")
    return called[-1]  # the outermost returns last

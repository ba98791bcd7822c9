"""Hook-point names and the places in a model that they stand for.

The names and shapes are TransformerLens's. Where a block's own modules add something to the residual stream is
measured with one short forward, never guessed from a class name: `hook_attn_out` is whatever makes
resid_post = resid_pre + attn_out + mlp_out come out, so it is taken after a post-norm where the family has one.

Legend: B rows, T positions, D hidden size, H heads, W head width.
"""

import difflib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

Hook = Callable[..., object]

IN_ATTENTION = ("rot_q", "rot_k", "v", "attn_scores", "pattern")
NAMES = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "ln2.hook_normalized",
    "attn.hook_z",
    *(f"attn.hook_{name}" for name in IN_ATTENTION),
)
"""What follows `blocks.{layer}.`; the embedding is `hook_embed`, and has no layer.

`ln2.hook_normalized` is what the MLP is fed, whatever norm it comes from, and the norm's weights are in it.
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
    attn_out: nn.Module | None = None
    mlp_out: nn.Module | None = None
    resid_mid: nn.Module | None = None
    """The module whose input is the residual stream between attention and MLP."""
    mlp_in: nn.Module | None = None
    """The MLP's first matrix: its input is what the MLP is fed."""
    why: str = ""


def decoder_layers(model: nn.Module, n_layers: int, run: Callable[[], object]) -> list[nn.Module]:
    """The decoder's layers: the list of modules that a forward calls once each, in order.

    Args:
        model: any causal language model.
        n_layers: as its config says.
        run: runs a short forward.
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
    for candidate in lists:
        if calls[id(candidate)] == list(range(n_layers)):
            return list(candidate)
    raise NoSuchPlace(f"no list of {n_layers} decoder layers that are called in order was found")


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


@dataclass(slots=True)
class _Call:
    module: nn.Module
    given: Tensor
    gave: Tensor


@dataclass(slots=True)
class _Trace:
    """What one layer's children were given and gave, in order."""

    given: Tensor | None = None
    gave: Tensor | None = None
    children: list[_Call] = field(default_factory=list[_Call])
    leaves: list[_Call] = field(default_factory=list[_Call])
    """Modules with a weight and no parts: projections and norms, wherever in the layer they are."""


def blocks(
    layers: list[nn.Module], attention: Callable[[int], nn.Module | None], run: Callable[[], object]
) -> list[Block]:
    """The places in every layer, found by watching one short forward.

    Args:
        layers: the decoder layers.
        attention: layer -> its attention module, None where it has none.
        run: runs a short forward.
    """
    traces = [_Trace() for _ in layers]
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def watch(module: nn.Module, calls: list[_Call]) -> None:
        def hook(called: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            # What is called without hidden states, such as a rotary embedding, is no place of the residual stream.
            with suppress(NoSuchPlace):
                # Copies: some families go on to add to an output in place.
                calls.append(_Call(called, hidden_input(args, kwargs).clone(), first_tensor(output).clone()))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    whole: list[list[_Call]] = [[] for _ in layers]
    for index, layer in enumerate(layers):
        watch(layer, whole[index])
        for child in layer.children():
            watch(child, traces[index].children)
        for leaf in layer.modules():
            if next(leaf.children(), None) is None and getattr(leaf, "weight", None) is not None:
                watch(leaf, traces[index].leaves)
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for trace, calls in zip(traces, whole, strict=True):
        if calls:
            trace.given, trace.gave = calls[0].given, calls[0].gave
    return [_block(layer, attention(index), traces[index]) for index, layer in enumerate(layers)]


def _block(layer: nn.Module, attention: nn.Module | None, trace: _Trace) -> Block:
    block = Block(layer, attention)
    if trace.given is None or trace.gave is None:
        raise NoSuchPlace("a decoder layer was not called with hidden states as its first argument")
    if trace.given.dim() == 3 and trace.gave.shape == trace.given.shape:
        block.resid = layer
    if attention is None:
        block.why = "this layer has no attention"
        return block
    parts = set(attention.modules())
    of_attention = [call for call in trace.leaves if call.module in parts]
    # The last matrix: a norm may follow it inside the attention (BERT's), and is no place of heads.
    projections = [call for call in of_attention if cast(Tensor, call.module.weight).dim() == 2]
    inside = [i for i, call in enumerate(trace.children) if attention in set(call.module.modules())]
    if not projections or not inside:
        block.why = "its attention is not a part of its own in the layer"
        return block
    if projections[-1].given.shape[:-1] == trace.given.shape[-3:-1]:  # experts may be handed tokens in another order
        block.z = projections[-1].module
    start = inside[0] + 1
    after_z = trace.leaves[trace.leaves.index(of_attention[-1]) + 1 :]
    # The outermost place that fits: a whole attention (or its post-norm) before the projection inside of it, which is
    # what remains where a family adds the residual stream inside its attention.
    attns = [*_and_what_follows(trace.children, start - 1), of_attention[-1], projections[-1]]
    # A dropout that serves attention and MLP alike is no place of either.
    mlps = [call for call in (*reversed(trace.children[start:]), *reversed(after_z)) if _called_once(call, trace)]
    for attn in attns:
        for mlp in mlps:
            if mlp.module is not attn.module and _close(_sum(trace.given, attn.gave, mlp.gave), trace.gave):
                block.attn_out, block.mlp_out = attn.module, mlp.module
                middle = _sum(trace.given, attn.gave)
                found = [c.module for c in trace.children[start:] if _close(c.given, middle)]
                block.resid_mid = found[0] if found else None
                block.mlp_in = _first_matrix(after_z, trace.given)
                return block
    block.why = "what its attention and its MLP add to the residual stream does not sum to its output"
    return block


def _first_matrix(leaves: list[_Call], given: Tensor) -> nn.Module | None:
    """A gate, a router or whatever else is first to multiply all that a layer's MLP is fed."""
    found = (c.module for c in leaves if cast(Tensor, c.module.weight).dim() == 2 and c.given.numel() == given.numel())
    return next(found, None)


def _called_once(call: _Call, trace: _Trace) -> bool:
    return sum(other.module is call.module for other in trace.children) <= 1


def _sum(first: Tensor, *others: Tensor) -> Tensor | None:
    """The sum in the shape of the first (some families flatten rows and positions), None where that cannot be."""
    if any(other.numel() != first.numel() for other in others):
        return None
    return first + sum(other.view_as(first) for other in others)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.numel() != b.numel():
        return False
    tolerance = 1e-4 if a.dtype == torch.float32 else 3e-2
    a, b = a.float().flatten(), b.float().flatten()
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def _and_what_follows(children: list[_Call], start: int) -> list[_Call]:
    """The attention's call, then that of the post-norm which is fed with its output, if any."""
    attn = children[start]
    fed = [c for c in children[start + 1 :] if c.given.shape == attn.gave.shape and torch.equal(c.given, attn.gave)]
    return [attn, *fed[:1]]

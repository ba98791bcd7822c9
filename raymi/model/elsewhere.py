"""Places of a layer, found a second time and in another way, for second opinions on what is changed there.

`raymi.model.finding` adds up what modules give. Here a layer is called by itself with their outputs replaced: without
what attention and MLP add, it gives what it is given, bit for bit; with its own input in the place of either, twice
that; with its negative, nothing. Doubling and cancelling are exact in every dtype. No other module behaves like that.

Legend: T positions, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from raymi.model.heads_elsewhere import z_module
from raymi.model.hooked import HookedModel
from raymi.model.normalised import norm_among
from raymi.model.sites import Block, NoSuchPlace, first_tensor, hidden_input

ENOUGH = 12
"""Tokens of the prompt that places are looked for on."""


@contextmanager
def elsewhere(model: HookedModel, ids_1T: Tensor, layers: Sequence[int], *, by_head: bool = False) -> Iterator[None]:
    """While inside, the places of some layers are those that are found here: `NoSuchPlace` says where there is none.

    With `by_head` that goes for `attn.hook_z`, too. Where gates, norms or sinks leave no second place, it stays.
    """
    blocks = model.blocks
    model.blocks = [
        _look(model, ids_1T[:, :ENOUGH], layer) if layer in layers and block.attention is not None else block
        for layer, block in enumerate(blocks)
    ]
    try:
        for layer in {layer for layer in layers if by_head and model.blocks[layer].attention is not None}:
            if (module := z_module(model, ids_1T[:, :ENOUGH], layer)) is not None:
                model.blocks[layer].z, model.blocks[layer].z_by_module = module, True
        yield
    finally:
        model.blocks = blocks


def _look(model: HookedModel, ids_1T: Tensor, layer: int) -> Block:
    known, found = model.blocks[layer], list[Block]()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not found:  # the calls from within do not look again
            found.append(Block(module, known.attention, z=known.z))
            _Search(found[0], args, kwargs, output).search()

    handle = known.module.register_forward_hook(hook, with_kwargs=True)
    try:
        model.forward(ids_1T, own_attention=True)
    finally:
        handle.remove()
    return found[0]


class _Search:
    """One layer, as it was called."""

    def __init__(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.block, self.args, self.kwargs = block, args, kwargs
        self.x = hidden_input(args, kwargs).clone()
        self.one_stream = self.x.dim() == 3 and first_tensor(output).shape == self.x.shape
        self.given: dict[nn.Module, Tensor] = {}
        self.gave: dict[nn.Module, Tensor] = {}
        """In the order in which they ended, without those that were called more than once."""

    def search(self) -> None:
        block = self.block
        block.why = "a second search, in another way, does not find it"
        if not self.one_stream:
            return
        block.resid = block.module
        self.given, self.gave = self._watched({})
        candidates = self._candidates()
        pairs = [
            (a, m, self._times(a, m))
            for i, a in enumerate(candidates)
            for m in candidates[i + 1 :]
            if torch.equal(self._call({a: self._nothing, m: self._nothing}), self.x)
        ]
        fitting = [(a, m, times) for a, m, times in pairs if times is not None]
        if len(fitting) != 1:
            return
        first, second, times = fitting[0]
        attn, mlp = (first, second) if self._is_attention(first, second) else (second, first)
        if times == 1.0:
            block.attn_out, block.mlp_out = attn, mlp
            block.resid_mid = self._middle(attn)
        children = list(block.module.children())
        around = [child for child in children if block.attention in set(child.modules())]
        of_attention = [*around, *([block.attention] if block.attention is not None else [])]
        block.attn_module = self._itself(attn, of_attention)
        block.mlp_module = self._itself(mlp, [child for child in children if child not in around])
        fed = [m for m in self.gave if m in children and m not in (*around, attn) and _has_matrices(m)]
        block.mlp_in = next((m for m in fed if m in self.given and self.given[m].numel() == self.x.numel()), None)
        if block.mlp_in is not None:
            given = self.given[block.mlp_in].flatten()
            block.norm = norm_among((m for m, gave in self.gave.items() if torch.equal(gave.flatten(), given)), self.x)

    # -- calls -------------------------------------------------------------------------------------------------------

    def _call(self, instead: Mapping[nn.Module, Tensor], x: Tensor | None = None) -> Tensor:
        """What the layer gives when some modules give something else."""
        args, kwargs = self.args, self.kwargs
        put = (self.x if x is None else x).clone()
        if args:
            args = (put, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states" if "hidden_states" in kwargs else "x": put}
        with ExitStack() as stack:
            for module, value in instead.items():
                stack.callback(module.register_forward_hook(_giving(value)).remove)
            return first_tensor(self.block.module(*args, **kwargs))

    def _watched(
        self, instead: Mapping[nn.Module, Tensor], x: Tensor | None = None
    ) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
        """What modules are given and give then."""
        given, gave, again = dict[nn.Module, Tensor](), dict[nn.Module, Tensor](), set[nn.Module]()

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module in gave:
                again.add(module)
            with suppress(NoSuchPlace):
                gave[module] = first_tensor(output).clone()
                given[module] = hidden_input(args, kwargs).clone()

        with ExitStack() as stack:
            for module in self.block.module.modules():
                if module is not self.block.module and module not in instead:
                    stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
            self._call(instead, x)
        for module in again:
            del gave[module]
        return given, gave

    @property
    def _nothing(self) -> Tensor:
        return torch.zeros_like(self.x)

    def _candidates(self) -> list[nn.Module]:
        """Of modules that give the same, the one that ends last."""
        found: list[nn.Module] = []
        for module, gave in reversed(self.gave.items()):
            alike = any(torch.equal(self.gave[other].flatten(), gave.flatten()) for other in found)
            if gave.numel() == self.x.numel() and gave.is_floating_point() and not alike:
                found.append(module)
        return found

    # -- what is found -----------------------------------------------------------------------------------------------

    def _times(self, a: nn.Module, m: nn.Module) -> float | None:
        """By how much what either gives is multiplied before it is added: 1 where that is exact; None where not."""
        x, nothing = self.x, self._nothing
        if all(
            torch.equal(self._call({one: sign * x, other: nothing}), x + sign * x)
            for one, other in ((a, m), (m, a))
            for sign in (1, -1)
        ):
            return 1.0
        of_both = [self._multiple(self._call({one: x, other: nothing})) for one, other in ((a, m), (m, a))]
        return of_both[0] if None not in of_both else None

    def _multiple(self, gave: Tensor) -> float | None:
        x, more = self.x.flatten().float(), (gave - self.x).flatten().float()
        largest = x.abs().argmax()
        times = float(more[largest] / x[largest])
        room = 8 * torch.finfo(self.x.dtype).eps * (1 + abs(times)) * x.abs()
        return times if times != 0 and bool(((more - times * x).abs() <= room).all()) else None

    def _is_attention(self, one: nn.Module, other: nn.Module) -> bool:
        """Whether the other's output depends on this one's; side by side, whether this one looks at other positions."""
        for first, second, verdict in ((one, other, True), (other, one, False)):
            if not torch.equal(self._watched({first: self.x})[1][second], self.gave[second]):
                return verdict
        x = self.x.clone()
        x[:, 0] = x[:, 0].flip(-1)
        return not torch.equal(self._watched({}, x)[1][one][:, -1], self.gave[one][:, -1])

    def _middle(self, attn: nn.Module) -> nn.Module | None:
        without, twice = self._watched({attn: self._nothing})[0], self._watched({attn: self.x})[0]

        def fed(module: nn.Module, of: Mapping[nn.Module, Tensor], value: Tensor) -> bool:
            return module in of and torch.equal(of[module].flatten(), value.flatten())

        return next((m for m in without if fed(m, without, self.x) and fed(m, twice, 2 * self.x)), None)

    def _itself(self, adds: nn.Module, among: Sequence[nn.Module]) -> nn.Module | None:
        """The first module with matrices that alone decides what is added: held as it is, nothing else changes that."""
        other_x = self.x.roll(1, -1)
        for module in self.gave:
            if module in among and _has_matrices(module) and self.gave[module].numel() == self.x.numel():
                if module is adds:
                    return module
                held = self._watched({module: self.gave[module]}, other_x)[1]
                if adds in held and torch.equal(held[adds], self.gave[adds]):
                    return module
        return None


def _giving(value: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        first = first_tensor(output)
        changed = value.to(first).reshape(first.shape).clone()  # Falcon goes on to add to it
        if hasattr(output, "_replace"):  # a tuple with names
            return type(output)(changed, *output[1:])
        return changed if isinstance(output, Tensor) else type(output)([changed, *output[1:]])

    return hook


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())

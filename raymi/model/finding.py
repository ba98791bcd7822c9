"""Finds the places of a decoder layer, and accepts each by proof.

Everything in a layer is watched in short forwards: as it comes, on a residual stream so small that nothing which is
added to it can hide in its rounding, and again with noise put in at the places that were found. A pair of places is
what attention and MLP add when their sum with the stream is, bit for bit and every time, what the layer gives. Equal
numbers need no tolerance, and so the places are the same in every dtype and however large a stream grows. Modules that
give the same numbers are one place; where places with different numbers fit, none is taken.

Legend: B rows, T positions, D hidden size.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raymi.model.normalised import norm_among
from raymi.model.sites import Block, NoSuchPlace, first_tensor, hidden_input

SMALL = 2.0**-8
"""Standard deviation of a residual stream in which nothing hides."""

BESIDE = "the family computes attention and MLP side by side"
NO_SUM = "what its attention and its MLP add to the residual stream does not sum to its output"


class _Call(NamedTuple):
    module: nn.Module
    given: Tensor | None
    """The hidden states; None where it was called without."""
    gave: Tensor


@dataclass(slots=True)
class _Trace:
    """One forward through one layer."""

    given: Tensor | None = None
    gave: Tensor | None = None
    calls: dict[nn.Module, list[_Call]] = field(default_factory=dict[nn.Module, list[_Call]])
    """In the order in which they ended."""

    def once(self, module: nn.Module) -> _Call | None:
        calls = self.calls.get(module, ())
        return calls[0] if len(calls) == 1 else None


def blocks(
    layers: list[nn.Module], attention: Callable[[int], nn.Module | None], run: Callable[[], object]
) -> list[Block]:
    """The places in every layer, found by watching a few short forwards.

    Args:
        layers: the decoder layers.
        attention: layer -> its attention module, None where it has none.
        run: runs a short forward of one row.
    """
    plain, small = _watch(layers, run), _watch(layers, run, small=True)
    found = [_Layer(layer, attention(i), plain[i], small[i]) for i, layer in enumerate(layers)]
    with_noise = _watch(layers, run, small=True, noise=[module for each in found for module in each.to_change()])
    for each, trace in zip(found, with_noise, strict=True):
        each.confirm(trace)
    turned = _watch(layers, run, small=True, turned=[each.fed() for each in found])
    return [each.block_with(trace) for each, trace in zip(found, turned, strict=True)]


# -- watching ----------------------------------------------------------------------------------------------------------


def _watch(
    layers: list[nn.Module],
    run: Callable[[], object],
    *,
    small: bool = False,
    noise: Sequence[nn.Module] = (),
    turned: Sequence[Tensor | None] = (),
) -> list[_Trace]:
    """One forward.

    Args:
        layers: the decoder layers.
        run: runs it.
        small: give each layer a small random residual stream instead of its own.
        noise: modules to whose outputs noise is added.
        turned: for each layer, a value; modules that are fed it get that of another position.
    """
    traces, handles = [_Trace() for _ in layers], list[torch.utils.hooks.RemovableHandle]()
    generator = torch.Generator().manual_seed(0)

    def random_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)

    def shrink(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _with_hidden(random_like(hidden_input(args, kwargs)) * SMALL, args, kwargs)

    def shake(_: nn.Module, __: Any, output: Any) -> Any:
        changed = first_tensor(output) + random_like(first_tensor(output))
        if hasattr(output, "_replace"):  # a tuple with names
            return type(output)(changed, *output[1:])
        return changed if isinstance(output, Tensor) else type(output)([changed, *output[1:]])

    def turn(value: Tensor) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with suppress(NoSuchPlace):
                if _same(hidden_input(args, kwargs), value):
                    return _with_hidden(hidden_input(args, kwargs).roll(1, -2), args, kwargs)
            return None

        return hook

    def watch(trace: _Trace) -> Callable[..., None]:
        def hook(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # What gives no tensor is no place of the residual stream.
            with suppress(NoSuchPlace):
                given: Tensor | None = None
                with suppress(NoSuchPlace):
                    given = hidden_input(args, kwargs).clone()
                # Copies: some families go on to add to an output in place.
                call = _Call(called, given, first_tensor(output).clone())
                trace.calls.setdefault(called, []).append(call)

        return hook

    def watch_layer(trace: _Trace) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            trace.given, trace.gave = hidden_input(args, kwargs).clone(), first_tensor(output).clone()

        return hook

    try:
        for index, (layer, trace) in enumerate(zip(layers, traces, strict=True)):
            if small:
                handles.append(layer.register_forward_pre_hook(shrink, with_kwargs=True))
            for module in layer.modules():
                if module is layer:
                    continue
                if turned and (value := turned[index]) is not None:
                    handles.append(module.register_forward_pre_hook(turn(value), with_kwargs=True))
                if module in noise:
                    handles.append(module.register_forward_hook(shake))
                handles.append(module.register_forward_hook(watch(trace), with_kwargs=True))
            handles.append(layer.register_forward_hook(watch_layer(trace), with_kwargs=True))
        run()
    finally:
        for handle in handles:
            handle.remove()
    return traces


def _with_hidden(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states" if "hidden_states" in kwargs else "x": x}


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal number for number, whatever their shapes: some families flatten rows and positions."""
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1).to(a.device))


# -- one layer ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Place:
    """Modules that give the same numbers."""

    modules: list[nn.Module]
    """In the order in which they ended: the last is the outermost."""
    order: int
    """Of the first of them."""

    @property
    def module(self) -> nn.Module:
        return self.modules[-1]


class _Layer:
    """What is found in one layer, step by step."""

    def __init__(self, layer: nn.Module, attention: nn.Module | None, plain: _Trace, small: _Trace) -> None:
        self.block = Block(layer, attention)
        self.plain, self.small = plain, small
        self.parts: set[nn.Module] = set(attention.modules()) if attention is not None else set()
        self.around = [child for child in layer.children() if attention in set(child.modules())]
        self.first: nn.Module | None = None
        self.multiplied: tuple[_Place, _Place] | None = None
        self.attn: _Place | None = None
        self.mlp: _Place | None = None
        self.attn_module: _Place | None = None
        self.mlp_module: _Place | None = None
        self.factors: tuple[float, float] | None = None
        """What the modules' outputs are multiplied by before they are added, where that is not 1."""
        if plain.given is None or plain.gave is None:
            raise NoSuchPlace("a decoder layer was not called with hidden states as its first argument")
        if attention is not None:
            self._find_z()
        if plain.given.dim() != 3 or plain.gave.shape != plain.given.shape:
            return
        self.block.resid = layer
        if attention is None:
            self.block.why = "this layer has no attention"
            return
        self._find_sums()
        if self.attn is None or self.mlp is None:
            self._find_multiples()

    def _find_z(self) -> None:
        last = [
            call
            for module in self.plain.calls
            if module in self.parts and next(module.children(), None) is None
            if getattr(module, "weight", None) is not None and module.weight.dim() == 2  # pyright: ignore
            if (call := self.plain.once(module)) is not None and call.given is not None
            if call.given.shape[:-1] == self._given(self.plain).shape[-3:-1]
        ]
        self.block.z = last[-1].module if last else None

    # -- what is added -----------------------------------------------------------------------------------------------

    def _find_sums(self) -> None:
        found = [
            (attn, mlp)
            for attn in self._places()
            if self._of_attention(attn)
            for mlp in self._places()
            if mlp is not attn and not self.parts & set(mlp.modules)
            # What attention adds is there before what the MLP does, unless it is plainly the attention's.
            if attn.order < mlp.order or self._inside(attn)
            if self._sums(self.plain, attn, mlp) and self._sums(self.small, attn, mlp)
        ]
        if len(found) > 1:
            self.block.why = "more than one place in it could be what its attention or its MLP adds"
        elif not found:
            self.block.why = NO_SUM
        else:
            [(self.attn, self.mlp)] = found
            self.attn_module = self._itself(self.attn, [*self.around, *filter(None, [self.block.attention])])
            self.mlp_module = self._itself(self.mlp, [c for c in self.block.module.children() if c not in self.around])

    def _places(self) -> list[_Place]:
        """All modules that give as much as the layer is given, those of equal numbers together."""
        places: list[_Place] = []
        for order, module in enumerate(self.small.calls):
            plain, small = self.plain.once(module), self.small.once(module)
            if plain is None or small is None or small.gave.numel() != self._given(self.small).numel():
                continue
            if not small.gave.is_floating_point():
                continue
            for place in places:
                of_place = self._gave(self.small, place), self._gave(self.plain, place)
                if _same(of_place[0], small.gave) and _same(of_place[1], plain.gave):
                    place.modules.append(module)
                    break
            else:
                places.append(_Place([module], order))
        return places

    def _of_attention(self, place: _Place) -> bool:
        """Whether it is computed when the attention has at least begun to be."""
        first = next(i for i, module in enumerate(self.small.calls) if module in self.parts)
        return place.order >= first

    def _inside(self, place: _Place) -> bool:
        return bool((self.parts | set(self.around)) & set(place.modules))

    def _sums(self, trace: _Trace, attn: _Place, mlp: _Place) -> bool:
        """Whether stream and both places, added in any order, are what the layer gives, bit for bit."""
        given, gave = self._given(trace).flatten(), self._gave_of(trace).flatten()
        a, m = (self._gave(trace, place).flatten() for place in (attn, mlp))
        return any(bool(fits(given[:64], a[:64], m[:64], gave[:64])) and fits(given, a, m, gave) for fits in _ORDERS)

    @staticmethod
    def _given(trace: _Trace) -> Tensor:
        assert trace.given is not None
        return trace.given

    @staticmethod
    def _gave_of(trace: _Trace) -> Tensor:
        assert trace.gave is not None
        return trace.gave

    @staticmethod
    def _gave(trace: _Trace, place: _Place) -> Tensor:
        call = trace.once(place.module)
        assert call is not None
        return call.gave

    # -- the modules themselves --------------------------------------------------------------------------------------

    def _itself(self, place: _Place, whole: Sequence[nn.Module]) -> _Place | None:
        """The attention's or the MLP's own output, where a norm or the like makes of it what is added."""
        places = self._places()
        while not any(_multiplies(module) for module in place.modules):
            of_plain, of_small = self.plain.once(place.modules[0]), self.small.once(place.modules[0])
            if of_plain is None or of_small is None or of_plain.given is None or of_small.given is None:
                return None
            before = [
                each
                for each in places
                if _same(self._gave(self.small, each), of_small.given)
                and _same(self._gave(self.plain, each), of_plain.given)
            ]
            if not before or before[0].order >= place.order:
                return None
            place = before[0]
        while (earlier := self._fed_by_another(place, places)) is not None:
            place = earlier
        return place if set(whole) & set(place.modules) else None

    def _fed_by_another(self, place: _Place, places: Sequence[_Place]) -> _Place | None:
        """A part of the layer with matrices, whose output is all that another is fed: that is a filter behind it."""
        children = set(self.block.module.children())
        for child in children & set(place.modules):
            plain, small = self.plain.once(child), self.small.once(child)
            if plain is None or small is None or plain.given is None or small.given is None:
                continue
            for each in places:
                parts = [module for module in each.modules if module in children and _multiplies(module)]
                same = _same(self._gave(self.small, each), small.given) and _same(
                    self._gave(self.plain, each), plain.given
                )
                if parts and each.order < place.order and same:
                    return each
        return None

    def _find_multiples(self) -> None:
        """Both, where the layer adds them multiplied by some constant."""
        children = set(self.block.module.children())
        places = [place for place in self._places() if children & set(place.modules)]
        found = [
            (attn, mlp, factors)
            for attn in places
            if self._of_attention(attn)
            for mlp in places
            if mlp.order > attn.order and not self.parts & set(mlp.modules)
            if (factors := self._multiples(self.small, attn, mlp)) is not None
            if self._multiples(self.plain, attn, mlp, factors) is not None
        ]
        if len(found) != 1:
            return
        attn, mlp, self.factors = found[0]
        self.attn_module = self._itself(attn, [*self.around, *filter(None, [self.block.attention])])
        self.mlp_module = self._itself(mlp, list(children))
        times = " and ".join(dict.fromkeys(f"{factor:.4g}" for factor in self.factors))
        self.block.why = (
            f"its attention and its MLP are multiplied by {times} before they are added; what they give by themselves "
            "is attn.hook_out and mlp.hook_out"
        )
        self.multiplied = attn, mlp

    def _multiples(
        self, trace: _Trace, attn: _Place, mlp: _Place, factors: tuple[float, float] | None = None
    ) -> tuple[float, float] | None:
        """The two factors with which both places and the stream sum to what the layer gives, but for rounding of each
        number by itself.
        """
        given, gave, a, m = (
            x.flatten().cpu().double()
            for x in (self._given(trace), self._gave_of(trace), self._gave(trace, attn), self._gave(trace, mlp))
        )
        looking = factors is None
        if factors is None:
            if not all(bool(x.isfinite().all()) for x in (given, gave, a, m)):
                return None
            both = torch.linalg.lstsq(torch.stack([a, m], 1), (gave - given)[:, None]).solution[:, 0].tolist()
            factors = both[0], both[1]
        parts = factors[0] * a, factors[1] * m
        last_digit = torch.finfo(self._gave_of(trace).dtype).eps
        room = 4 * last_digit * sum(part.abs() for part in (given, gave, *parts))
        if looking and not all(bool((part.abs() > room).any()) for part in parts):
            return None  # what adds nothing could be anything
        return factors if bool(((given + parts[0] + parts[1] - gave).abs() <= room).all()) else None

    # -- proof -------------------------------------------------------------------------------------------------------

    def to_change(self) -> list[nn.Module]:
        """The modules at whose outputs something is to be put in."""
        places = (self.attn, self.mlp, self.attn_module, self.mlp_module)
        return list({place.module: None for place in places if place is not None})

    def confirm(self, noisy: _Trace) -> None:
        """Takes the places at which what is put in arrives where it should, and nowhere else."""
        block = self.block
        if self.attn is not None and self.mlp is not None:
            if self._sums(noisy, self.attn, self.mlp):
                block.attn_out, block.mlp_out = self.attn.module, self.mlp.module
                block.resid_mid = self._middle(noisy)
                block.reasons["hook_resid_mid"] = BESIDE
            else:
                self.attn = self.mlp = self.attn_module = self.mlp_module = None
                block.why = "what is changed where its attention and its MLP seem to add is not what arrives"
        elif self.factors and self.multiplied and self._multiples(noisy, *self.multiplied, self.factors) is None:
            self.attn_module = self.mlp_module = None
            block.why = NO_SUM
        for site, place, added in (
            ("attn.hook_out", self.attn_module, self.attn),
            ("mlp.hook_out", self.mlp_module, self.mlp),
        ):
            if place is None and added is not None:
                part = "attention" if site.startswith("attn") else "MLP"
                block.reasons[site] = f"its {part} gives something else than what is added, inside of it"
        if self.attn_module is not None:
            block.attn_module = self.attn_module.module
        if self.mlp_module is not None:
            block.mlp_module = self.mlp_module.module

    def _middle(self, noisy: _Trace) -> nn.Module | None:
        """The first module that is fed with the stream and what attention adds, also where that is changed."""
        assert self.attn is not None

        def fed_with_it(trace: _Trace, module: nn.Module) -> bool:
            call = trace.once(module)
            assert self.attn is not None
            if call is None or call.given is None or call.given.numel() != self._given(trace).numel():
                return False
            return _same(call.given, self._given(trace).flatten() + self._gave(trace, self.attn).flatten())

        traces = (self.plain, self.small, noisy)
        return next((module for module in self.small.calls if all(fed_with_it(t, module) for t in traces)), None)

    # -- what the MLP is fed -----------------------------------------------------------------------------------------

    def fed(self) -> Tensor | None:
        """In the small stream, what the first matrix outside the attention is fed: the MLP's input, if it is."""
        end = self.mlp_module or self.mlp
        if end is None:
            return None
        size = self._given(self.small).numel()
        of_attention = [*self.around, *(self.attn.modules if self.attn else ())]
        inside = {part for module in of_attention for part in module.modules()} | self.parts
        for module in self.small.calls:
            call = self.small.once(module)
            if call is None or call.given is None or call.given.numel() != size or not _multiplies(module):
                continue
            if module in inside:
                continue
            self.first = module
            return call.given
        return None

    def block_with(self, turned: _Trace) -> Block:
        """The block, with the MLP's input in it where the MLP is a function of that alone.

        At each position it then gives what it gave at the one before, when it is fed with what was there.
        """
        end = self.mlp_module or self.mlp
        if self.first is None or end is None:
            return self.block
        before, after = self._gave(self.small, end), self._gave(turned, end)
        moved = before.roll(1, -2).double() if before.device.type != "mps" else before.roll(1, -2).float()
        room = 4 * torch.finfo(before.dtype).eps * float(moved.abs().max())
        if float((after.to(moved) - moved).abs().max()) <= room < float((before.to(moved) - moved).abs().max()):
            self.block.mlp_in = self.first
        else:
            self.block.reasons["mlp.hook_in"] = "its MLP is fed more than one thing"
        self.block.norm = norm_among(self._feeding(self.first), before)
        self.block.reasons["ln2.hook_normalized"] = "no norm stands right before its MLP"
        return self.block

    def _feeding(self, module: nn.Module) -> list[nn.Module]:
        """The modules that give what it is fed, the innermost first."""
        fed = [trace.once(module) for trace in (self.plain, self.small)]
        given = [call.given for call in fed if call is not None and call.given is not None]
        places = self._places() if len(given) == 2 else []
        same = [
            p
            for p in places
            if _same(self._gave(self.plain, p), given[0]) and _same(self._gave(self.small, p), given[1])
        ]
        return [each for place in same for each in place.modules]


def _multiplies(module: nn.Module) -> bool:
    """Whether it has a matrix: an attention, an MLP, a projection, and no norm."""
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _in_turn(given: Tensor, a: Tensor, m: Tensor, gave: Tensor) -> bool:
    return _same(((given + a) + m).to(gave.dtype), gave)


def _together(given: Tensor, a: Tensor, m: Tensor, gave: Tensor) -> bool:
    return _same((given + (a + m)).to(gave.dtype), gave)


def _the_other_first(given: Tensor, a: Tensor, m: Tensor, gave: Tensor) -> bool:
    return _same(((given + m) + a).to(gave.dtype), gave)


def _rounded_once(given: Tensor, a: Tensor, m: Tensor, gave: Tensor) -> bool:
    return _same((given.float() + a.float() + m.float()).to(gave.dtype), gave)


_ORDERS = (_in_turn, _together, _the_other_first, _rounded_once)
"""The ways in which a family may add up three things; each rounds otherwise."""

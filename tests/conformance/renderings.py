"""What changes to a model do, computed by transformers alone: its eager attention with an edited softmax, and hooks.

Nothing of raymi is imported. Legend: B rows, T positions, H heads of a layer, W head width, D hidden size.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from tests.conformance.places import Places
from tests.oracles import Knockout


@dataclass(frozen=True)
class Rewrite:
    """At some positions of a site of a layer, x becomes factor * x + shift; at `attn.hook_z` of some heads."""

    layer: int
    site: str
    positions: tuple[int, ...]
    heads: tuple[int, ...] | None = None
    factor: float = 0.0
    shift: Tensor | None = None
    """[D], or [W] at `attn.hook_z`."""

    def apply(self, x_TX: Tensor) -> None:
        """In place; [T, D] or [T, H, W]."""
        for position in self.positions:
            for at in [()] if self.heads is None else [(head,) for head in self.heads]:
                changed = x_TX[(position, *at)] * self.factor
                x_TX[(position, *at)] = changed if self.shift is None else changed + self.shift


Change = Knockout | Rewrite


@dataclass
class Rendered:
    logits_BV: Tensor
    empty_B: list[int]
    """Lines of a cut head that are left with no key."""
    cut_B: list[int]
    """Edges cut that the model's own mask had left open."""
    seen: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """(layer, site) -> what was there, of all rows."""


class NoPlace(LookupError):
    """The hand-written places say nothing of a site: it cannot be compared."""


class Untouched:
    """A model as transformers gives it."""

    def __init__(self, model: PreTrainedModel, places: Places) -> None:
        self.model, self.places = model, places
        found = model.get_submodule(places.layers)
        assert isinstance(found, nn.ModuleList)
        self.layers = list(found)
        self.lse: Tensor | None = None
        """What the running layer's softmax divides by, as a logarithm, where the family asks for it; [B, H, T]."""
        self.heads: dict[int, int] = {}
        """Layer -> query heads, as its softmax has them; only layers with attention."""
        self.dispatches = False
        self._running: int | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def module(self, layer: int, path: str | None) -> nn.Module:
        if path is None:
            raise NoPlace
        try:
            return self.layers[layer].get_submodule(path)
        except AttributeError:
            raise NoPlace from None

    @torch.no_grad()
    def run(self, ids_BT: Tensor, changes: Sequence[Sequence[Change]] | None = None) -> Rendered:
        """Logits of the last position under changes, one list of them a row, and what was at every site."""
        changes = changes or [()] * len(ids_BT)
        cuts = [(row, one) for row, of in enumerate(changes) for one in of if isinstance(one, Knockout)]
        edits = [(row, one) for row, of in enumerate(changes) for one in of if isinstance(one, Rewrite)]
        out = Rendered(torch.empty(0), [0] * len(ids_BT), [0] * len(ids_BT))
        with ExitStack() as stack:
            for layer in range(len(self)):
                stack.enter_context(self._inside(layer))
            stack.enter_context(_patched(self._watched(out, edits)))
            for layer, site in {(one.layer, one.site) for _, one in edits} - {(at, "attn.hook_z") for at in self.heads}:
                self.where(layer, site)  # NoPlace before anything runs
            for layer in range(len(self)):
                self._hooks(layer, ids_BT.shape, out, edits, stack)
            stack.enter_context(_Softmax(self, ids_BT.shape[1], cuts, out))
            out.logits_BV = self.model(ids_BT, use_cache=False).logits[:, -1].float()
        return out

    # -- places ------------------------------------------------------------------------------------------------------

    def where(self, layer: int, site: str) -> tuple[nn.Module, bool, float]:
        """The module whose input (True) or output a site is, and what it is multiplied by where it is added."""
        p, times = self.places, 1.0
        if p.attn_times is not None:
            times = float(getattr(self.layers[layer], p.attn_times))
        match site:
            case "hook_resid_pre":
                return self.layers[layer], True, 1.0
            case "hook_resid_post":
                return self.layers[layer], False, 1.0
            case "hook_attn_out":
                return self.module(layer, p.attn_out), False, times
            case "hook_mlp_out":
                return self.module(layer, p.mlp_out), False, times
            case "attn.hook_out":
                return self.module(layer, p.attention), False, 1.0
            case "mlp.hook_out":
                return self.module(layer, p.mlp), False, 1.0
            case "mlp.hook_in":
                return self.module(layer, p.mlp), True, 1.0
            case "attn.hook_z" if not self.dispatches:
                return self.module(layer, p.z), True, 1.0
            case _:
                raise NoPlace(site)

    def _hooks(
        self, layer: int, shape: torch.Size, out: Rendered, edits: Sequence[tuple[int, Rewrite]], stack: ExitStack
    ) -> None:
        names = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_out", "mlp.hook_out",
                 "mlp.hook_in", "attn.hook_z")  # fmt: skip
        for site in names:
            try:
                module, is_input, times = self.where(layer, site)
            except NoPlace:
                continue
            of_site = [(row, one) for row, one in edits if (one.layer, one.site) == (layer, site)]

            def changed(
                x: Tensor, site: str = site, of_site: list[tuple[int, Rewrite]] = of_site, times: float = times
            ) -> Tensor:
                value = x.reshape(*shape, -1).clone() * times
                if site == "attn.hook_z":
                    value = value.unflatten(-1, (self.heads.get(layer, 1), -1))
                for row, one in of_site:
                    one.apply(value[row])
                out.seen[layer, site] = value.clone()
                return (value / times).reshape(x.shape) if of_site else x

            stack.callback(_hook(module, is_input, changed).remove)

    @contextmanager
    def _inside(self, layer: int) -> Iterator[None]:
        def enter(*_: object) -> None:
            self._running = layer

        def leave(*_: object) -> None:
            self._running = None

        handles = [
            self.layers[layer].register_forward_pre_hook(enter),
            self.layers[layer].register_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watched(self, out: Rendered, edits: Sequence[tuple[int, Rewrite]]) -> Callable[[Callable[..., Any]], Any]:
        """Makes a family's eager attention function one that hands out, and changes, what it is given and gives."""

        def wrap(eager: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(eager)
            def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
                self.lse = None
                z, *others = eager(module, query, key, value, *args, **kwargs)
                layer = self._running
                if layer is not None and (layer, "attn.hook_pattern") in out.seen:
                    self.dispatches = True
                    if self.lse is not None:
                        # Granite's sinks: one more exponential in the denominator, written as a factor behind it.
                        share = (self.lse - module.sinks.view(1, -1, 1)).sigmoid()
                        out.seen[layer, "attn.hook_pattern"] *= share[..., None]
                    z = z.clone()
                    for row, one in edits:
                        if (one.layer, one.site) == (layer, "attn.hook_z"):
                            one.apply(z[row])
                    out.seen[layer, "attn.hook_z"] = z.clone()
                    for name, x in (("rot_q", query), ("rot_k", key), ("v", value)):
                        out.seen[layer, f"attn.hook_{name}"] = x.transpose(1, 2).clone()
                return z, *others

            return attention

        return wrap


def _hook(module: nn.Module, is_input: bool, changed: Callable[[Tensor], Tensor]) -> Any:
    def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: changed(kwargs[name])}

    def gave(_: nn.Module, __: object, output: Any) -> Any:
        return changed(output) if isinstance(output, Tensor) else (changed(output[0]), *output[1:])

    if is_input:
        return module.register_forward_pre_hook(given, with_kwargs=True)
    return module.register_forward_hook(gave)


@contextmanager
def _patched(wrap: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """While inside, every family's own eager attention function is wrapped."""
    before = {
        module: module.eager_attention_forward
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and "modeling" in name and hasattr(module, "eager_attention_forward")
    }
    for module, eager in before.items():
        module.eager_attention_forward = wrap(eager)
    try:
        yield
    finally:
        for module, eager in before.items():
            module.eager_attention_forward = eager


class _Softmax(TorchFunctionMode):
    """A layer's attention softmax is watched; lines that lose a key are done in float64 over the keys that are left."""

    def __init__(self, of: Untouched, n_tokens: int, cuts: Sequence[tuple[int, Knockout]], out: Rendered) -> None:
        super().__init__()
        self.of, self.n_tokens, self.cuts, self.out = of, n_tokens, cuts, out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, layer = dict(kwargs or {}), self.of._running
        given, name = args[0] if args else None, getattr(func, "__name__", "")
        if name not in ("softmax", "logsumexp") or layer is None or not self._is_attention(given):
            return func(*args, **kwargs)
        if name == "logsumexp":
            self.of.lse = torch.stack([self._lse(layer, row, given[row]) for row in range(len(given))])
            return self.of.lse
        pattern, n, n_heads = func(*args, **kwargs), self.n_tokens, given.shape[1]
        self.of.heads[layer] = n_heads
        forbidden = given <= torch.finfo(given.dtype).min / 4
        for row, knockout in self.cuts:
            if layer not in knockout.layers:
                continue
            cut = torch.zeros_like(forbidden[row])
            cut[..., :n] = knockout.cut(layer, (n_heads, n, n))[0]
            lost = forbidden[row] | cut
            scores = given[row].double().masked_fill(lost, -torch.inf)
            lines = cut.any(-1)  # others are left as they are
            pattern[row] = torch.where(lines[..., None], scores.softmax(-1).nan_to_num(0.0).to(pattern), pattern[row])
            self.out.empty_B[row] += int((lines & ~(~lost)[..., :n].any(-1)).sum())
            self.out.cut_B[row] += int((cut & ~forbidden[row]).sum())
        self.out.seen[layer, "attn.hook_pattern"] = pattern[..., :n].clone()
        if given.shape[-1] == n:
            self.out.seen[layer, "attn.hook_attn_scores"] = given.masked_fill(forbidden, -torch.inf)
        return pattern

    def _lse(self, layer: int, row: int, scores_HTT: Tensor) -> Tensor:
        for at, knockout in self.cuts:
            if at == row:
                scores_HTT = scores_HTT.masked_fill(knockout.cut(layer, scores_HTT.shape)[0], -torch.inf)
        return scores_HTT.logsumexp(-1)

    def _is_attention(self, given: Any) -> bool:
        n = self.n_tokens
        return isinstance(given, Tensor) and given.dim() == 4 and given.shape[-2] == n and given.shape[-1] - n in (0, 1)

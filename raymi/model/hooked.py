"""A causal language model whose forward can be watched and changed.

Legend: B rows, P prompts, T positions, V vocabulary, A ablations, D hidden size.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raymi.heads import Heads
from raymi.model.attention import NAME, Cut, Edges, HeadShape, Prefix, Tap, attach
from raymi.model.described import heads_by_layer, largest, shows_its_masks, usual_heads
from raymi.model.edited_mask import edited_masks, seen_through
from raymi.model.editing import SiteEdits, place
from raymi.model.finding import blocks
from raymi.model.interventions import BY_HEAD, EDITABLE, Edit, Intervention, Mask
from raymi.model.linear import linear_layers
from raymi.model.side_by_side import let_go_of_z
from raymi.model.sites import (
    IN_ATTENTION,
    Block,
    NoSuchPlace,
    Site,
    backbone,
    decoder_layers,
    first_tensor,
    hidden_input,
    parse,
)
from raymi.model.sizes import Shape


class NotFinite(RuntimeError):
    """A forward gave NaN or infinity. Never a number in a result."""


class NotFired(RuntimeError):
    """An intervention did not act where it should have, or as often as it should have."""


class Output(NamedTuple):
    """What one forward gave."""

    logits_BV: Tensor
    """Of the last position, float32."""
    cache: dict[str, Tensor]
    """Site name -> what was there, after interventions at that site. Shapes are TransformerLens's."""
    fired_B: Tensor
    """Edges cut that were open, and activations changed, a row, counted where it happened."""
    empty_B: Tensor
    """Attention lines (layer, head, query) left without any key, a row."""
    closed_B: Tensor | None
    """Edges to cut that the model's own mask had closed, a row; None where that cannot be known: all count as fired."""


class Tally(NamedTuple):
    """What happened to each row of a forward, [B] each, as in `Output`."""

    fired_B: Tensor
    empty_B: Tensor
    closed_B: Tensor | None


Check = Callable[[], Tally]
"""After a forward: how often each row's interventions fired. Raises NotFired."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One ablation to measure: interventions applied together to one prompt."""

    prompt: int
    """Which of the prompts."""
    interventions: tuple[Intervention, ...]
    first_layer: int = field(init=False)
    """Nothing below this layer changes."""
    first_query: int = field(init=False)
    """Nothing at a position before this one changes."""

    def __post_init__(self) -> None:
        # Once: they are looked at for every grouping and sorting of cells.
        object.__setattr__(self, "first_layer", min(i.layer for i in self.interventions))
        object.__setattr__(self, "first_query", min(i.first_query for i in self.interventions))


class HookedModel:
    """One model with its places found. Made by `raymi.model.loading.load`, which also checks it."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model.eval(), name
        text = model.config.get_text_config()
        self.n_layers: int = text.num_hidden_layers
        self.n_heads: int = usual_heads(text, name)
        """Query heads, as its config says for the whole of it: layers may have others, see `heads`."""
        self.hidden_size: int = text.hidden_size
        self.vocab_size: int = cast(Any, model.get_output_embeddings()).weight.shape[0]
        self.device: torch.device = _device(model)
        """Where prompts go, and logits come out. Layers may be elsewhere, where accelerate has put them."""
        self.dtype: torch.dtype = model.dtype
        self.weight_bytes: int = sum(p.numel() * p.element_size() for p in model.parameters())
        self.tap = Tap()
        self.linears = linear_layers(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last = torch.tensor([-1], device=self.device)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                attach(module, self.tap)
        self.dispatches: bool = self._dispatch()
        """Whether the family calls raymi's attention function; if not, its masks are edited."""
        self._calls_raymi = self.dispatches  # which does not change while the family's own attention computes
        self.head_shapes: dict[int, HeadShape] = dict(self.tap.shapes)
        """Layer -> the heads that its attention really has; empty where the family computes its attention itself."""
        self.heads_by_layer: tuple[int, ...] | None = heads_by_layer(
            text, self.n_layers, self.n_heads, self.head_shapes
        )
        """Query heads of each layer, where not all have `n_heads`."""
        self.shape: Shape = largest(
            text,
            Heads(self.n_heads, self.heads_by_layer),
            self.head_shapes,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            itemsize=self.dtype.itemsize,
            n_layers=self.n_layers,
        )
        layers = decoder_layers(model, self.n_layers, self._probe)
        self.backbone: nn.Module = backbone(model, layers, self._probe)
        """What the model calls to get the hidden states that it unembeds."""
        self.blocks: list[Block] = blocks(layers, self._attention_of(layers).__getitem__, self._probe)
        attention = [block.attention for block in self.blocks if block.attention is not None]
        self.tells_closed: bool = self.dispatches or shows_its_masks(text, self.n_layers, attention)
        """Whether edges that the model's own mask has closed can be told from others."""
        if not self._calls_raymi:
            let_go_of_z(self)

    # -- finding one's way -------------------------------------------------------------------------------------------

    def probe_ids(self, n_tokens: int = 6, n_prompts: int = 1) -> Tensor:
        """[P, T] token ids that no special meaning is likely to hang on, another set for every prompt."""
        at = torch.arange(1, n_prompts * n_tokens + 1, device=self.device).view(n_prompts, n_tokens)
        return at * 7919 % self.vocab_size

    def _probe(self) -> Tensor:
        return self.run(self.probe_ids())

    def _dispatch(self) -> bool:
        try:
            self.model.set_attn_implementation(NAME)
        except (ValueError, KeyError):
            self.model.set_attn_implementation("eager")
            return False
        self._probe()
        if not self.tap.called:
            self.model.set_attn_implementation("eager")
        return bool(self.tap.called)

    def _attention_of(self, layers: Sequence[nn.Module]) -> list[nn.Module | None]:
        if self.dispatches:
            asked = set(self.tap.called.values())
            found = [next((m for m in layer.modules() if m in asked), None) for layer in layers]
        else:
            found = [_takes_a_mask(layer) for layer in layers]
        if not any(found):
            raise NoSuchPlace(f"{type(self.model).__name__} has no attention that raymi can reach")
        return found

    def heads(self, layer: int) -> int:
        """Query heads of a layer; of one without attention, what its config says."""
        return self.n_heads if self.heads_by_layer is None else self.heads_by_layer[layer]

    @property
    def all_heads(self) -> Heads:
        """Query heads of all layers."""
        return Heads(self.n_heads, self.heads_by_layer)

    @property
    def attention_layers(self) -> list[int]:
        """The layers that have attention, ascending; others are recurrent, convolutional or linear."""
        return [layer for layer, block in enumerate(self.blocks) if block.attention is not None]

    # -- forwards ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, ids_BT: Tensor, n_rows: int | None = None, **given: object) -> Tensor:
        """The model's own forward under whatever is armed: logits of the last position, [B, V] float32."""
        # An index, for Gemma 4 takes a number as leave to drop all other positions from its upper layers.
        keep = {"logits_to_keep": self._last} if self._keeps_logits else {}
        self.tap.begin(n_rows or len(ids_BT), self.device)
        return self.model(ids_BT, **{"use_cache": False, **given}, **keep).logits[:, -1].float()

    def forward(
        self,
        ids_BT: Tensor,
        interventions: Sequence[Sequence[Intervention]] | None = None,
        capture: Sequence[str] = (),
        *,
        own_attention: bool = False,
    ) -> Output:
        """One forward over rows of equal length.

        Args:
            ids_BT: token ids, one row an ablation (or a prompt).
            interventions: for each row, what is done to it.
            capture: names of the sites to keep.
            own_attention: let the family's eager attention compute it, with an edited mask, not raymi's function.

        Raises:
            UnknownSite: for a name that is no hook point.
            NoSuchPlace: for a hook point that this model does not have.
            NotFinite: when a logit is NaN or infinite; names the first layer where it appears.
            NotFired: when an intervention did not act.
        """
        ids_BT = ids_BT.to(self.device)
        of_rows = interventions if interventions is not None else [()] * len(ids_BT)
        sites = [parse(name, self.n_layers) for name in capture]
        with self._attention("eager" if own_attention else None), self.armed(of_rows, ids_BT.shape[1]) as check:
            with ExitStack() as stack:
                cache = self.watch(sites, ids_BT.shape, stack)
                logits_BV = self.run(ids_BT)
                if not bool(logits_BV.sum(-1).isfinite().all()):
                    raise NotFinite(self._blame(ids_BT))
            for (layer, name), value in self.tap.captures.items():
                if value is not None:
                    cache[f"blocks.{layer}.attn.hook_{name}"] = value
            tally = check()
        return Output(logits_BV, {name: cache[name] for name in capture}, *tally)

    def predictions(
        self, ids_BT: Tensor, interventions: Sequence[Sequence[Intervention]], *, own_attention: bool = False
    ) -> Tensor:
        """Logits of every position, [B, T, V] float32, else as `forward`: for short texts, they are large."""
        ids_BT = ids_BT.to(self.device)
        with (
            self._attention("eager" if own_attention else None),
            self.armed(interventions, ids_BT.shape[1]) as check,
            torch.no_grad(),
        ):
            self.tap.begin(len(ids_BT), self.device)
            logits_BTV = self.model(ids_BT, use_cache=False).logits.float()
            if not bool(logits_BTV.sum(-1).isfinite().all()):
                raise NotFinite(self._blame(ids_BT))
            check()
        return logits_BTV

    def mean(self, site: str, ids_PT: Tensor) -> Tensor:
        """Mean of a site over all prompts and positions, [D] ([heads, W] at `attn.hook_z`): for mean ablations."""
        return self.forward(ids_PT, capture=[site]).cache[site].mean((0, 1))

    @contextmanager
    def _attention(self, implementation: str | None) -> Iterator[None]:
        """While inside, a dispatching family computes its attention by another implementation."""
        if implementation is None or not self.dispatches:
            yield
            return
        self.model.set_attn_implementation(implementation)
        self.dispatches = False
        try:
            with seen_through():
                yield
        finally:
            self.model.set_attn_implementation(NAME)
            self.dispatches = True

    # -- arming ------------------------------------------------------------------------------------------------------

    @contextmanager
    def armed(
        self,
        interventions: Sequence[Sequence[Intervention]],
        n_positions: int,
        *,
        start: int = 0,
        prefix: Prefix | None = None,
    ) -> Iterator[Check]:
        """While inside, a forward is changed by interventions.

        Args:
            interventions: for each row of the batch, what is done to it; positions count from the prompt's beginning.
            n_positions: how many positions the forward computes.
            start: the first of them.
            prefix: clean keys and values of the positions before.

        Yields:
            What tells, after the forward, how often each row's interventions fired, and lines left empty.
        """
        cuts, edits, expected_B = self._sorted_out(interventions, start, n_positions)
        self.tap.prefix = prefix
        self.tap.cuts.update(cuts)
        try:
            with ExitStack() as stack:
                for (layer, site), of_site in edits.items():
                    self._hook(layer, site, of_site, stack)
                stack.enter_context(nullcontext() if self.dispatches else self._edited_masks())
                yield lambda: self._tally(expected_B)
        finally:
            self.tap.clear()

    def _sorted_out(
        self, interventions: Sequence[Sequence[Intervention]], start: int, n_positions: int
    ) -> tuple[dict[int, Cut], dict[tuple[int, str], SiteEdits], Tensor]:
        """By layer and site: edges to cut, edits; and how often each row must fire, [B]."""
        edges = Edges()
        masks: dict[tuple[int, int], list[Mask]] = {}
        edits: dict[tuple[int, str], SiteEdits] = {}
        expected = [0] * len(interventions)
        for row, of_row in enumerate(interventions):
            for one in of_row:
                self._refuse_missing(one, start + n_positions)
                if isinstance(one, Mask):
                    heads = range(self.heads(one.layer)) if one.heads is None else one.heads
                    edges.add(one.layer, row, heads, one.edges, start)
                    masks.setdefault((row, one.layer), []).append(one)
                    continue
                at = one.layer, one.site
                if at not in edits:
                    by_head = one.site == "attn.hook_z"
                    edits[at] = SiteEdits(self.tap, self.heads(one.layer), by_head, start, n_positions)
                expected[row] += edits[at].append(row, one)
        # Counted from what was asked for, not from the tensors that will do it: they are what is checked.
        for (row, _), of_row in masks.items():
            expected[row] += self._n_edges(of_row)
        return edges.cuts(len(interventions), self.device), edits, torch.tensor(expected)

    def _n_edges(self, masks: Sequence[Mask]) -> int:
        """Edges, each of one head, that the masks of one row and layer name together."""
        heads = [range(self.heads(mask.layer)) if mask.heads is None else mask.heads for mask in masks]
        if len(masks) == 1:
            return len(set(heads[0])) * len(set(masks[0].edges))
        return len(
            {(head, edge) for its, mask in zip(heads, masks, strict=True) for head in its for edge in mask.edges}
        )

    def refuse_missing(self, interventions: Sequence[Intervention], n_tokens: int) -> None:
        """Raises NoSuchPlace for what an intervention names and the model, or a prompt of so many tokens, has not."""
        for one in interventions:
            self._refuse_missing(one, n_tokens)
            if isinstance(one, Edit) and not self._has_z(one.layer, one.site):
                self._place(one.layer, one.site)

    def _refuse_missing(self, one: Intervention, n_tokens: int) -> None:
        if not 0 <= one.layer < self.n_layers:
            raise NoSuchPlace(f"{self.name}: layer {one.layer} of a model with layers 0 to {self.n_layers - 1}")
        if isinstance(one, Edit) and one.site not in EDITABLE:
            raise NoSuchPlace(f"{self.name}: {one.site!r} cannot be changed; what can: {', '.join(EDITABLE)}")
        if isinstance(one, Mask) and self.blocks[one.layer].attention is None:
            raise NoSuchPlace(f"{self.name}: layer {one.layer} has no attention to cut; {self.attention_layers} have")
        # Indices beyond either end would be an error of a tensor's, or count from the other end.
        positions = [at for edge in one.edges for at in edge] if isinstance(one, Mask) else one.positions
        n_heads = self.heads(one.layer)
        for what, indices, size in (("head", one.heads or (), n_heads), ("position", positions, n_tokens)):
            if outside := [index for index in indices if not 0 <= index < size]:
                at = f" of layer {one.layer}" if what == "head" and self.heads_by_layer is not None else ""
                raise NoSuchPlace(f"{self.name}: {what} {outside[0]}{at}, where there are 0 to {size - 1}")

    def _hook(self, layer: int, site: str, edits: SiteEdits, stack: ExitStack) -> None:
        if self._has_z(layer, site):
            self.tap.at_z.setdefault(layer, []).append(edits.on_heads)
            return
        module, is_input = self._place(layer, site)
        if is_input:
            stack.callback(module.register_forward_pre_hook(edits.on_input, with_kwargs=True).remove)
        else:
            stack.callback(module.register_forward_hook(edits.on_output).remove)

    def _has_z(self, layer: int, site: str) -> bool:
        """Whether a site is what raymi's attention function gives, whether a gate, a norm or experts come next."""
        block = self.blocks[layer]
        return site == BY_HEAD and self._calls_raymi and block.attention is not None and not block.z_by_module

    def _place(self, layer: int, site: str) -> tuple[nn.Module, bool]:
        try:
            return place(self.blocks[layer], site)
        except NoSuchPlace as error:
            raise NoSuchPlace(f"{self.name} has at layer {layer} {error}") from None

    def _tally(self, expected_B: Tensor) -> Tally:
        fired_B, empty_B, closed_B = self.tap.fired_B, self.tap.empty_B, self.tap.closed_B
        assert fired_B is not None
        assert empty_B is not None
        assert closed_B is not None
        if not torch.equal(fired_B.cpu(), expected_B):
            row = int((fired_B.cpu() != expected_B).nonzero()[0])
            raise NotFired(
                f"{self.name}: the interventions of row {row} should have fired {int(expected_B[row])} times, "
                f"and fired {int(fired_B[row])} times"
            )
        return Tally(fired_B - closed_B, empty_B, closed_B) if self.tells_closed else Tally(fired_B, empty_B, None)

    def _edited_masks(self) -> ExitStack:
        attention = {i: b.attention for i, b in enumerate(self.blocks) if b.attention is not None}
        z = None if self._calls_raymi else {i: b.z for i, b in enumerate(self.blocks) if b.z is not None}
        stack = ExitStack()
        stack.enter_context(edited_masks(self.tap, attention, z, self.heads))
        return stack

    # -- watching ----------------------------------------------------------------------------------------------------

    def watch(
        self, sites: Sequence[Site], shape: torch.Size, stack: ExitStack, then: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """Register what keeps sites in the forward that comes.

        Args:
            sites: what to keep.
            shape: [B, T], since some families flatten rows and positions inside a block.
            stack: takes the hooks away again.
            then: called whenever a site has been reached (those inside the attention apart).

        Returns:
            The dictionary in which they will be, by name; what is inside the attention will be in `tap.captures`.

        Raises:
            NoSuchPlace: for a hook point that this model does not have.
        """
        cache: dict[str, Tensor] = {}
        for site in sites:
            inside = site.name.removeprefix("attn.hook_")
            if site.layer is None or inside not in IN_ATTENTION:
                self._keep(site, shape, cache, stack, then)
                continue
            if not self.dispatches or self.blocks[site.layer].attention is None:
                why = "no attention" if self.dispatches else "an attention function of its own"
                raise NoSuchPlace(f"{self.name} has no {site.name}: its layer {site.layer} has {why}")
            self.tap.captures[site.layer, inside] = None
        return cache

    def _keep(
        self, site: Site, shape: torch.Size, cache: dict[str, Tensor], stack: ExitStack, then: Callable[[], None]
    ) -> None:
        def given(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            value = hidden_input(args, kwargs).reshape(*shape, -1).clone()
            if site.layer is not None and site.name == "attn.hook_z":
                value = value.unflatten(-1, (self.heads(site.layer), -1))
            if site.layer is not None and site.name == "ln2.hook_normalized" and (norm := self.blocks[site.layer].norm):
                value = norm(value)
            cache[str(site)] = value
            then()

        def gave(_: nn.Module, __: tuple[object, ...], output: object) -> None:
            # A copy: Falcon goes on to add to its MLP's output in place.
            cache[str(site)] = first_tensor(output).reshape(*shape, -1).clone()
            then()

        def passes(z_BQHD: Tensor) -> Tensor:
            cache[str(site)] = z_BQHD.clone()
            then()
            return z_BQHD

        if site.layer is not None and self._has_z(site.layer, site.name):
            self.tap.at_z.setdefault(site.layer, []).append(passes)
            stack.callback(self.tap.at_z.pop, site.layer, None)
            return
        if site.layer is None:
            stack.callback(self.model.get_input_embeddings().register_forward_hook(gave).remove)
            return
        module, is_input = self._place(site.layer, site.name)
        if is_input:
            stack.callback(module.register_forward_pre_hook(given, with_kwargs=True).remove)
        else:
            stack.callback(module.register_forward_hook(gave).remove)

    def _blame(self, ids_BT: Tensor) -> str:
        """Run once more, watching every layer, to say where the numbers went wrong."""
        bad: list[int] = []

        def look(layer: int):
            def hook(_: nn.Module, __: object, output: object) -> None:
                if not bool(first_tensor(output).isfinite().all()):
                    bad.append(layer)

            return hook

        with ExitStack() as stack:
            for layer, block in enumerate(self.blocks):
                stack.callback(block.module.register_forward_hook(look(layer)).remove)
            logits_BV = self.run(ids_BT)
        where = f"layer {bad[0]} is the first to give it" if bad else "every layer is finite, the logits are not"
        n_rows = int((~logits_BV.isfinite().all(-1)).sum())
        return f"{self.name}: NaN or infinity in {n_rows} of {len(ids_BT)} rows; {where}"


def _device(model: PreTrainedModel) -> torch.device:
    embedding = model.get_input_embeddings()
    # Where accelerate moves the weights to that it keeps elsewhere between forwards.
    moved_to = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return cast(Any, embedding).weight.device if moved_to is None else torch.device(moved_to)


def _takes_a_mask(layer: nn.Module) -> nn.Module | None:
    """The outermost module in a layer that is called with an attention mask."""
    for name, module in layer.named_modules():
        if name and "attention_mask" in inspect.signature(module.forward).parameters:
            return module
    return None

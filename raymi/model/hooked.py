"""A causal language model whose forward can be watched and changed.

Legend: B rows, P prompts, T positions, V vocabulary, A ablations.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from raymi.model import memory
from raymi.model.attention import NAME, Cut, Prefix, Tap, attach
from raymi.model.edited_mask import edited_masks
from raymi.model.interventions import Intervention
from raymi.model.sites import IN_ATTENTION, Block, NoSuchPlace, Site, backbone, blocks, decoder_layers, first_tensor, hidden_input, parse
from raymi.model.sizes import Shape, rows_per_batch


class NotFinite(RuntimeError):
    """A forward gave NaN or infinity. Never a number in a result."""


class OutOfMemory(RuntimeError):
    """Not even one ablation at a time fits."""


class NotFired(RuntimeError):
    """An intervention did not act where it should have."""


class Output(NamedTuple):
    """What one forward gave."""

    logits_BV: Tensor
    """Of the last position, float32."""
    cache: dict[str, Tensor]
    """Site name -> what was there, after interventions at that site. Shapes are TransformerLens's."""
    fired_B: Tensor
    """Edges cut, a row, counted where they were cut."""
    empty_B: Tensor
    """Attention lines (layer, head, query) left without any key, a row."""


class Batch(NamedTuple):
    """Ablations that went through the model together with the clean prompts that they belong to."""

    cells: Sequence[int]
    """Which of the requested ablations these are."""
    clean_PV: Tensor
    """Logits of the clean prompts of this batch, float32."""
    ablated_AV: Tensor
    prompt_A: Tensor
    """Row of `clean_PV` that each ablation belongs to."""
    fired_A: Tensor
    empty_A: Tensor


@dataclass(frozen=True, slots=True)
class Cell:
    """One ablation to measure: interventions applied together to one prompt."""

    prompt: int
    """Which of the prompts."""
    interventions: tuple[Intervention, ...]

    @property
    def first_layer(self) -> int:
        """Nothing below this layer changes."""
        return min(i.layer for i in self.interventions)

    @property
    def first_query(self) -> int:
        """Nothing at a position before this one changes."""
        return min(i.first_query for i in self.interventions)


class HookedModel:
    """One model, loaded, with its places found and its attention checked. Made by `raymi.model.loading.load`."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model, name
        text = model.config.get_text_config()
        self.n_layers: int = text.num_hidden_layers
        self.n_heads: int = text.num_attention_heads
        self.hidden_size: int = text.hidden_size
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = model.dtype
        self.weight_bytes: int = sum(p.numel() * p.element_size() for p in model.parameters())
        self.shape = Shape(
            self.n_heads, self.hidden_size, _intermediate(text, self.hidden_size), self.vocab_size, self.dtype.itemsize
        )
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._rows: dict[int, int] = {}
        self.tap = Tap()
        self.tolerance = 1e-3
        """Logit difference that is still noise; measured at load."""
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                attach(module, self.tap)
        self.dispatches: bool = self._dispatch()
        """Whether the family calls raymi's attention function; if not, its masks are edited."""
        self.blocks: list[Block] = self._find_blocks()

    # -- finding one's way -------------------------------------------------------------------------------------------

    def probe_ids(self, n_tokens: int = 6) -> Tensor:
        """[1, T] token ids that no special meaning is likely to hang on."""
        return (torch.arange(n_tokens, device=self.device) * 7919 % self.vocab_size)[None]

    def _dispatch(self) -> bool:
        try:
            self.model.set_attn_implementation(NAME)
        except (ValueError, KeyError):
            self.model.set_attn_implementation("eager")
            return False
        self._forward(self.probe_ids())
        if not self.tap.called:
            self.model.set_attn_implementation("eager")
        return bool(self.tap.called)

    def _find_blocks(self) -> list[Block]:
        def run() -> object:
            return self._forward(self.probe_ids())

        layers = decoder_layers(self.model, self.n_layers, run)
        if self.dispatches:
            asked = set(self.tap.called.values())
            found = [next((m for m in layer.modules() if m in asked), None) for layer in layers]
        else:
            found = [_takes_a_mask(layer) for layer in layers]
        if not any(found):
            raise NoSuchPlace(f"{type(self.model).__name__} has no attention that raymi can reach")
        self.backbone = backbone(self.model, layers, run)
        return blocks(layers, found.__getitem__, run)

    # -- forwards ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(self, ids_BT: Tensor, n_rows: int | None = None, **given: object) -> Tensor:
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        self.tap.begin(n_rows or len(ids_BT), self.device)
        return self.model(ids_BT, **{"use_cache": False, **given}, **keep).logits[:, -1].float()

    def suffix(
        self, ids_1S: Tensor, interventions: Sequence[Sequence[Intervention]], prefix: Prefix, cache: Cache
    ) -> None:
        """A forward of the positions behind a clean prefix, for `cone`; positions of the interventions are the prompt's."""
        n_rows = len(interventions)
        expected_B = self._arm(interventions, n_rows, prefix.length)
        self.tap.prefix = prefix
        try:
            self._forward(ids_1S, n_rows, past_key_values=cache, use_cache=True)
            assert self.tap.fired_B is not None and self.tap.empty_B is not None
            self.tally = self.tap.fired_B, self.tap.empty_B
        finally:
            self.tap.clear()
        self._fired_as(expected_B, self.tally[0])

    def unembedded(self, ids_11: Tensor) -> Tensor:
        """Logits of whatever hidden states the base model is made to return, for `cone`; [A, V] float32."""
        logits_AV = self._forward(ids_11)
        if not bool(logits_AV.isfinite().all()):
            raise NotFinite(f"{self.name}: NaN or infinity in the logits of an ablation")
        return logits_AV

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
            own_attention: let the family's eager attention compute it, with an edited mask, instead of raymi's function.

        Raises:
            UnknownSite: for a name that is no hook point.
            NotFinite: when a logit is NaN or infinite; names the first layer where it appears.
            NotFired: when an intervention did not act.
        """
        ids_BT = ids_BT.to(self.device)
        expected_B = self._arm(interventions or [], len(ids_BT))
        edits = self.dispatches and own_attention
        if edits:
            self.model.set_attn_implementation("eager")
        try:
            with ExitStack() as stack:
                cache = self._watch([parse(name, self.n_layers) for name in capture], ids_BT.shape, stack)
                stack.enter_context(nullcontext() if self.dispatches and not edits else self._edited_masks())
                logits_BV = self._forward(ids_BT)
                if not bool(logits_BV.isfinite().all()):
                    raise NotFinite(self._blame(ids_BT))
            for (layer, name), value in self.tap.captures.items():
                if value is not None:
                    cache[f"blocks.{layer}.attn.hook_{name}"] = value
            fired_B, empty_B = self.tap.fired_B, self.tap.empty_B
            assert fired_B is not None and empty_B is not None
        finally:
            self.tap.clear()
            if edits:
                self.model.set_attn_implementation(NAME)
        self._fired_as(expected_B, fired_B)
        return Output(logits_BV, {name: cache[name] for name in capture}, fired_B, empty_B)

    def ablations(self, ids_PT: Tensor, cells: Sequence[Cell]) -> Iterator[Batch]:
        """Measure ablations, as many at a time as fit; each batch carries its own clean rows.

        Args:
            ids_PT: token ids of the prompts, all of one length.
            cells: what to do to which of them.

        Raises:
            OutOfMemory: when a single ablation does not fit.
            NotFinite, NotFired: as `forward`.
        """
        start = 0
        while start < len(cells):
            limit = self._rows_at_once(ids_PT.shape[1])
            batch = _fill(cells, start, limit)
            try:
                result = self._ablate(ids_PT, cells, batch)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                self._halve(ids_PT.shape[1], batch.stop - batch.start, error)
                continue
            yield result
            start = batch.stop

    def _ablate(self, ids_PT: Tensor, cells: Sequence[Cell], batch: slice) -> Batch:
        prompts = sorted({cell.prompt for cell in cells[batch]})
        place = {prompt: row for row, prompt in enumerate(prompts)}
        rows = [*prompts, *(cell.prompt for cell in cells[batch])]
        nothing: list[Sequence[Intervention]] = [()] * len(prompts)
        out = self.forward(ids_PT[rows], [*nothing, *(cell.interventions for cell in cells[batch])])
        prompt_A = torch.tensor([place[cell.prompt] for cell in cells[batch]], device=self.device)
        n = len(prompts)
        return Batch(range(batch.start, batch.stop), out.logits_BV[:n], out.logits_BV[n:], prompt_A, out.fired_B[n:], out.empty_B[n:])

    # -- memory ------------------------------------------------------------------------------------------------------

    def _rows_at_once(self, n_tokens: int) -> int:
        if n_tokens not in self._rows:
            free = memory.available(self.device)
            # A clean row always comes along.
            self._rows[n_tokens] = max(2, rows_per_batch(self.shape, n_tokens, self.device.type, free))
        return self._rows[n_tokens]

    def _halve(self, n_tokens: int, n_cells: int, error: Exception) -> None:
        if n_cells == 1:
            raise OutOfMemory(
                f"{self.name}: one ablation of a prompt of {n_tokens} tokens does not fit into memory ({error})"
            ) from error
        self._rows[n_tokens] = max(2, self._rows[n_tokens] // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _fired_as(self, expected_B: Tensor, fired_B: Tensor) -> None:
        if not torch.equal(fired_B.cpu(), expected_B):
            wrong = int((fired_B.cpu() != expected_B).nonzero()[0])
            raise NotFired(
                f"{self.name}: {int(expected_B[wrong])} edges were to be cut in row {wrong}, {int(fired_B[wrong])} were"
            )

    def _arm(self, interventions: Sequence[Sequence[Intervention]], n_rows: int, start: int = 0) -> Tensor:
        """Put the cuts on the tap; returns how many edges each row must lose, [B]. `start`: the first position computed."""
        edges: dict[int, set[tuple[int, int, int, int]]] = {}
        for row, of_row in enumerate(interventions):
            for mask in of_row:
                if not 0 <= mask.layer < self.n_layers or self.blocks[mask.layer].attention is None:
                    raise NotFired(f"{self.name}: layer {mask.layer} has no attention to cut")
                heads = range(self.n_heads) if mask.heads is None else mask.heads
                edges.setdefault(mask.layer, set()).update((row, h, q - start, k) for h in heads for q, k in mask.edges)
        expected_B = torch.zeros(n_rows, dtype=torch.long)
        for layer, quadruples in edges.items():
            self.tap.cuts[layer] = Cut.of(sorted(quadruples), n_rows, self.device)
            expected_B += self.tap.cuts[layer].per_row_B.cpu()
        return expected_B

    def _edited_masks(self) -> ExitStack:
        attention = {i: b.attention for i, b in enumerate(self.blocks) if b.attention is not None}
        z = {i: b.z for i, b in enumerate(self.blocks) if b.z is not None}
        stack = ExitStack()
        stack.enter_context(edited_masks(self.tap, attention, z, self.n_heads))
        return stack

    def _watch(self, sites: Sequence[Site], shape: torch.Size, stack: ExitStack) -> dict[str, Tensor]:
        """Register what keeps the captured sites; returns the dictionary that they will be in.

        Some families flatten rows and positions inside a block: `shape` ([B, T]) undoes that.
        """
        cache: dict[str, Tensor] = {}
        for site in sites:
            inside = site.name.removeprefix("attn.hook_")
            if site.layer is not None and inside in IN_ATTENTION:
                self._need(self.dispatches and self.blocks[site.layer].attention, site, "its attention is its own")
                self.tap.captures[site.layer, inside] = None
            else:
                stack.callback(self._keep(site, shape, cache).remove)
        return cache

    def _keep(self, site: Site, shape: torch.Size, cache: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
        name = site.name if site.layer is None else f"blocks.{site.layer}.{site.name}"

        def given(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            value = hidden_input(args, kwargs).view(*shape, -1)
            cache[name] = value.unflatten(-1, (self.n_heads, -1)) if site.name == "attn.hook_z" else value

        def gave(_: nn.Module, __: tuple[object, ...], output: object) -> None:
            cache[name] = first_tensor(output).view(*shape, -1)

        if site.layer is None:
            return self.model.get_input_embeddings().register_forward_hook(gave)
        block = self.blocks[site.layer]
        if site.name == "hook_resid_post":
            return block.module.register_forward_hook(gave)
        if site.name == "hook_resid_pre":
            return block.module.register_forward_pre_hook(given, with_kwargs=True)
        if site.name in ("attn.hook_z", "hook_resid_mid"):
            module = self._need(block.z if site.name == "attn.hook_z" else block.resid_mid, site, block.why)
            return module.register_forward_pre_hook(given, with_kwargs=True)
        module = self._need(block.attn_out if site.name == "hook_attn_out" else block.mlp_out, site, block.why)
        return module.register_forward_hook(gave)

    def _need(self, module: nn.Module | None | bool, site: Site, why: str) -> nn.Module:
        if not isinstance(module, nn.Module):
            reason = f": {why}" if why else ""
            raise NoSuchPlace(f"{self.name} has no blocks.{site.layer}.{site.name}{reason}")
        return module

    def _blame(self, ids_BT: Tensor) -> str:
        """Run once more, watching every layer, to say where the numbers went wrong."""
        bad: list[int] = []

        def look(layer: int):
            def hook(_: nn.Module, __: object, output: object) -> None:
                if not bool(first_tensor(output).isfinite().all()):
                    bad.append(layer)

            return hook

        handles = [b.module.register_forward_hook(look(i)) for i, b in enumerate(self.blocks)]
        try:
            logits_BV = self._forward(ids_BT)
        finally:
            for handle in handles:
                handle.remove()
        where = f"layer {bad[0]} is the first to give it" if bad else "every layer is finite, the logits are not"
        rows = (~logits_BV.isfinite().all(-1)).nonzero()[:, 0].tolist()
        return f"{self.name}: NaN or infinity in {len(rows)} of {len(ids_BT)} rows; {where}"


def _fill(cells: Sequence[Cell], start: int, limit: int) -> slice:
    """As many cells as fit `limit` rows, clean rows included; at least one."""
    prompts: set[int] = set()
    stop = start
    while stop < len(cells):
        with_it = prompts | {cells[stop].prompt}
        if stop > start and len(with_it) + stop + 1 - start > limit:
            break
        prompts, stop = with_it, stop + 1
    return slice(start, stop)


def _intermediate(text: object, hidden_size: int) -> int:
    for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return 4 * hidden_size


def _takes_a_mask(layer: nn.Module) -> nn.Module | None:
    """The outermost module in a layer that is called with an attention mask."""
    for name, module in layer.named_modules():
        if name and "attention_mask" in inspect.signature(module.forward).parameters:
            return module
    return None

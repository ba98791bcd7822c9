"""The causal cone: recompute only what an intervention can change.

In a causal model an intervention whose first touched place is (layer l, position q) changes nothing below layer l and
nothing before position q. One clean run keeps each layer's input and every key and value; an ablation then needs only
layers >= l and positions >= q, attending to the clean keys and values of the positions before.

Ablations with the same q go through the layers in one sweep, a staircase: each row joins the batch at its own layer,
with the clean input of that layer. The first rows are clean prompts themselves, and must come out as the clean run did;
the others start from theirs and are compared with them, so that rounding (and the routing of near-ties to experts),
which differ from one shape of a batch to another, are no effects.

The rest of a model's forward is its own: a stand-in for its cache tells it how many positions went before, so that it
builds its masks, positions and rotary embeddings itself. Where a layer keeps a state that such a prefix cannot stand in
for (recurrent, convolutional, linear attention), the positions all start over, and the layers below are still saved.

Legend: B rows, P prompts, T positions, S positions of the suffix, D hidden size, V vocabulary, A ablations.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from raymi.model.attention import Prefix
from raymi.model.full import Batch, Way
from raymi.model.hooked import Cell, HookedModel, NotFinite, Tally
from raymi.model.linear import quick_products
from raymi.model.passing import EnoughError, passing_on, returned_beside, standing_in, unembed, with_hidden
from raymi.model.proof import spread_of
from raymi.model.routing import routing
from raymi.model.sites import NoSuchPlace, hidden_input
from raymi.model.sizes import UNEMBEDDED


class NotClean(RuntimeError):
    """The clean row of a batch did not come out as the clean run did: the cone is not exact on this model."""


class Cone:
    """The clean run of some prompts of equal length, and sweeps of ablations on it."""

    def __init__(
        self,
        model: HookedModel,
        ids_PT: Tensor,
        first_query: int,
        *,
        prefix: bool = True,
        tolerance: float = torch.inf,
        routes: bool = False,
    ) -> None:
        """Runs the prompts clean.

        Args:
            model: the model.
            ids_PT: token ids.
            first_query: the smallest query position that will be asked for; layer inputs are kept from there on.
            prefix: whether the positions before a query may be left out (else only the layers below are).
            tolerance: largest difference in logits between a clean row and the clean run; in half precision, where the
                largest of many varies too much, the largest root of a row's mean square.
            routes: whether experts are chosen, and rounding may make a clean row jump to others: that is no mistake,
                for what starts from it is compared with it.
        """
        self.model, self.ids_PT, self.prefix, self.tolerance = model, ids_PT.to(model.device), prefix, tolerance
        self.first = first_query if prefix else 0
        self.inputs: list[Tensor] = []
        """Layer -> its clean input, [P, T - first, D]."""
        self.place = {tuple(ids): row for row, ids in enumerate(ids_PT.tolist())}
        """Token ids -> which prompt that is."""
        self.beside: list[int | None] = []
        """Layer -> how many things it returns beside its hidden states; None where it returns no tuple."""
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer -> clean keys and values, [P, K, T, W]."""
        with ExitStack() as stack:
            for block in model.blocks:
                stack.callback(block.module.register_forward_pre_hook(self._remember, with_kwargs=True).remove)
                stack.callback(block.module.register_forward_hook(self._note).remove)
            if prefix:
                model.tap.keep = self.states
            stack.enter_context(quick_products(model.linears))
            watched = stack.enter_context(routing(model)) if routes else None
            self.clean_PV = model.forward(self.ids_PT).logits_BV
        self.choices = None if watched is None else [watched.of_row(row) for row in range(len(ids_PT))]
        """Prompt -> its choices of experts; kept where these may jump."""
        self.jumps = 0
        """Sweeps whose clean rows were right only when they chose as the clean run."""

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy of the part that is needed lets the rest go.
        x_PTD = hidden_input(args, kwargs)
        if x_PTD.shape[:2] != self.ids_PT.shape:
            raise NoSuchPlace(f"{self.model.name}: what its layers hand on is not one residual stream")
        self.inputs.append(x_PTD[:, self.first :].clone() if self.first else x_PTD)

    @property
    def bytes(self) -> int:
        """Memory of what is kept. Keys and values may be views of more, which goes with them."""
        states = (each for pair in self.states.values() for each in pair)
        return sum(each.nbytes for each in (*self.inputs, *states, self.clean_PV))

    def places(self, ids_PT: Tensor, first_query: int, *, prefix: bool) -> list[int] | None:
        """Which prompts of this clean run these are, if it has them all and keeps what such a query needs."""
        if self.prefix != prefix or self.first > first_query or self.ids_PT.shape[1] != ids_PT.shape[1]:
            return None
        found = [self.place.get(tuple(ids)) for ids in ids_PT.tolist()]
        return None if None in found else [row for row in found if row is not None]

    def _note(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self.beside.append(returned_beside(output))

    def groups(self, cells: Sequence[Cell]) -> list[list[int]]:
        """What may share a sweep: cells of one first query position, ordered by first layer."""
        by_query: dict[int, list[int]] = {}
        for index in sorted(range(len(cells)), key=lambda i: cells[i].first_layer):
            by_query.setdefault(cells[index].first_query if self.prefix else 0, []).append(index)
        return [indices for _, indices in sorted(by_query.items())]

    def rows(self, cells: Sequence[Cell]) -> int:
        """Rows that a sweep of these cells has."""
        return len(cells) + len(self._clean_prompts(cells))

    @property
    def way(self) -> Way:
        """What this is called."""
        return "cone" if self.prefix else "layers"

    def _clean_prompts(self, cells: Sequence[Cell]) -> list[int]:
        """The prompts that have a clean row in a sweep, ascending.

        All of them, unless that would make it much longer: in float32 two shapes of a batch differ by so little that
        one is enough of a proof, and the clean run of any shape will do to compare with.
        """
        prompts = sorted({cell.prompt for cell in cells})
        few = len(prompts) == 1 or 4 * len(prompts) <= len(cells)
        return prompts if few or self.model.dtype.itemsize < 4 else [cells[0].prompt]

    def measure(self, cells: Sequence[Cell], indices: Sequence[int]) -> Iterator[Batch]:
        """One sweep over cells of one group.

        Yields:
            As many ablations as are unembedded at a time.

        Raises:
            NotClean: when a clean row is not the clean prompt's.
            NotFinite: when a logit is NaN or infinite.
        """
        rows = [cells[i] for i in indices]
        clean = self._clean_prompts(rows)
        hidden_BD, returned, tally = self._sweep(rows, clean)
        clean_CV = hidden_BD.new_empty(0)
        clean_error, n_clean = 0.0, len(clean)
        for begin, end in self._slices(len(hidden_BD)):
            logits_NV = self._unembed(hidden_BD[begin:end], returned)
            if begin < n_clean:
                some_NV = logits_NV[: n_clean - begin]
                clean_CV = torch.cat([clean_CV, some_NV]) if begin else some_NV
            if end <= n_clean:
                continue
            if begin <= n_clean:
                clean_error = self._prove(clean_CV, clean, rows)
            first = max(begin, n_clean)
            part = rows[first - n_clean : end - n_clean]
            logits_AV = logits_NV[first - begin :]
            self._refuse_not_finite(logits_AV, part)
            clean_PV, prompt_A = self._reference(part, clean, clean_CV)
            yield Batch(
                indices[first - n_clean : end - n_clean],
                clean_PV,
                logits_AV,
                prompt_A,
                tally.fired_B[first:end],
                tally.empty_B[first:end],
                None if tally.closed_B is None else tally.closed_B[first:end],
                clean_error,
                self.way,
            )

    def _slices(self, n_rows: int) -> Iterator[tuple[int, int]]:
        """Rows that are unembedded at a time; slices of equal length, for a short one is slow."""
        processor = "cpu" if self.model.device.type == "cpu" else "gpu"
        most = max(2, UNEMBEDDED[processor] // self.model.vocab_size)
        step = -(-n_rows // -(-n_rows // most))
        return ((begin, min(begin + step, n_rows)) for begin in range(0, n_rows, step))

    def _reference(self, part: Sequence[Cell], clean: Sequence[int], clean_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Clean logits that cells are compared with, [P, V], and which of them each is, [A]: rows of this very batch,
        where it has one of each prompt.
        """
        prompts = sorted({cell.prompt for cell in part})
        place = {prompt: row for row, prompt in enumerate(prompts)}
        prompt_A = torch.tensor([place[cell.prompt] for cell in part], device=self.model.device)
        if not set(prompts) <= set(clean):
            return self.clean_PV[prompts], prompt_A
        return (clean_CV if prompts == clean else clean_CV[[clean.index(each) for each in prompts]]), prompt_A

    def _prove(self, proof_CV: Tensor, clean: Sequence[int], rows: Sequence[Cell]) -> float:
        def from_clean_run(logits_CV: Tensor) -> tuple[float, float]:
            off_CV = logits_CV - self.clean_PV[list(clean)]
            largest = float(off_CV.abs().max())
            return (max(map(spread_of, off_CV)) if self.model.dtype.itemsize < 4 else largest), largest

        off, largest = from_clean_run(proof_CV)
        if not off <= self.tolerance and self.choices is not None:
            with routing(self.model, [self.choices[prompt] for prompt in clean]):
                hidden_BD, returned, *_ = self._sweep(rows, clean)
            off, _ = from_clean_run(self._unembed(hidden_BD[: len(clean)], returned))
            self.jumps += off <= self.tolerance
        if not off <= self.tolerance:
            raise NotClean(
                f"{self.model.name}: a clean row of a batch differs from the clean run by {off:.2e} in its logits, "
                f"where {self.tolerance:.1e} would be noise"
            )
        return largest

    def _sweep(self, rows: Sequence[Cell], clean: Sequence[int]) -> tuple[Tensor, Any, Tally]:
        """Last hidden states behind the last layer, [B, D], clean ones first; what the backbone returned; what was cut
        and changed.
        """
        model, start = self.model, rows[0].first_query if self.prefix else 0
        prompts = [*clean, *(cell.prompt for cell in rows)]
        prefix = self._prefix(start, prompts) if self.prefix else None
        seen = {"past_key_values": _Seen(start, model.n_layers), "use_cache": True} if self.prefix else {}
        interventions = [*[()] * len(clean), *(cell.interventions for cell in rows)]
        n_positions = self.ids_PT.shape[1] - start
        kept: list[Any] = []

        def keep(_: nn.Module, __: object, output: Any) -> None:
            kept.extend((output.last_hidden_state[:, -1].clone(), output))
            raise EnoughError  # what comes behind is done in slices, by _unembed

        with ExitStack() as stack:
            lowest = rows[0].first_layer
            for block, beside in zip(model.blocks[:lowest], self.beside, strict=False):
                stack.enter_context(standing_in(block.module, passing_on(beside)))
            # Rows join before anything is changed at the same layer: hooks run in the order of their registration.
            row_of = {prompt: row for row, prompt in enumerate(clean)}
            for layer, (begin, end) in _steps(rows, len(clean)).items():
                first, joining = layer == lowest, prompts[begin:end]
                places = None if first or not row_of.keys() >= set(joining) else [row_of[p] for p in joining]
                join = _Join(self.inputs[layer][:, start - self.first :], joining, places, first=first)
                handle = model.blocks[layer].module.register_forward_pre_hook(join, with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(model.backbone.register_forward_hook(keep).remove)
            check = stack.enter_context(model.armed(interventions, n_positions, start=start, prefix=prefix))
            with suppress(EnoughError), quick_products(model.linears):
                model.run(self.ids_PT[:1, start:], len(interventions), **seen)
            tally = check()
        hidden_BD, returned = kept
        return hidden_BD, returned, tally

    def _prefix(self, length: int, prompts: Sequence[int]) -> Prefix:
        if len(set(prompts)) > 1:
            return Prefix(length, self.states, torch.tensor(prompts, device=self.model.device))
        one = slice(prompts[0], prompts[0] + 1)
        return Prefix(length, {layer: (keys[one], values[one]) for layer, (keys, values) in self.states.items()}, None)

    def _unembed(self, hidden_AD: Tensor, returned: Any) -> Tensor:
        """Logits of hidden states, [A, V] float32, by whatever the model does behind its last layer."""
        return unembed(self.model, hidden_AD, self.ids_PT[:1, -1:], returned)

    def _refuse_not_finite(self, logits_AV: Tensor, cells: Sequence[Cell]) -> None:
        # A sum tells in a tenth of the time that looking at every logit takes.
        bad = (~logits_AV.sum(-1).isfinite()).nonzero()[:, 0].tolist()
        if bad:
            cell = cells[bad[0]]
            # A full forward of the same says in which layer it begins.
            self.model.forward(self.ids_PT[cell.prompt][None], [cell.interventions])
            raise NotFinite(f"{self.model.name}: NaN or infinity in {len(bad)} rows, though not in a full forward")


class _Seen(Cache):
    """Tells a model that `length` positions went before, and keeps nothing."""

    def __init__(self, length: int, n_layers: int) -> None:
        self.length = length
        self.layers = cast(list[Any], [self] * n_layers)

    is_compileable = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    is_initialized = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    @property
    def is_sliding(self) -> list[bool]:
        # A sliding layer of a real cache holds a window of the past; here every layer sees all of it.
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class _Join:
    """Lets rows join the batch in front of a layer, with that layer's clean input.

    Args:
        input_PSD: the clean run's input of the layer.
        prompts: of the rows that join.
        rows: of the batch, where those prompts stand clean: what is there is what joins; None to take the clean run's.
        first: whether these are the first rows of all.
    """

    def __init__(self, input_PSD: Tensor, prompts: list[int], rows: list[int] | None, *, first: bool) -> None:
        self.input_PSD, self.prompts, self.rows, self.first = input_PSD, prompts, rows, first

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x_BSD = hidden_input(args, kwargs)
        source, rows = (self.input_PSD, self.prompts) if self.rows is None else (x_BSD, self.rows)
        one = len(set(rows)) == 1
        new_NSD = source[rows[0] : rows[0] + 1].expand(len(rows), -1, -1) if one else source[rows]
        return with_hidden(new_NSD.clone() if self.first else torch.cat([x_BSD, new_NSD]), args, kwargs)


def _steps(rows: Sequence[Cell], n_clean: int) -> dict[int, tuple[int, int]]:
    """Layer -> the rows of the batch that join there, the clean ones at the lowest."""
    steps: dict[int, tuple[int, int]] = {rows[0].first_layer: (0, n_clean)}
    for row, cell in enumerate(rows, start=n_clean):
        begin, _ = steps.get(cell.first_layer, (row, row))
        steps[cell.first_layer] = begin, row + 1
    return steps

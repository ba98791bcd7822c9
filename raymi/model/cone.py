"""The causal cone: recompute only what an intervention can change.

In a causal model an intervention whose first touched place is (layer l, position q) changes nothing below layer l and
nothing before position q. One clean run keeps each layer's input and every key and value; an ablation then needs only
layers >= l and positions >= q, attending to the clean keys and values of the positions before.

Ablations with the same q go through the layers in one sweep, a staircase: each row joins the batch at its own layer,
with the clean input of that layer. Row 0 is a clean prompt itself, and must come out as the clean run did.

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
from raymi.model.full import Batch
from raymi.model.hooked import Cell, HookedModel, NotFinite
from raymi.model.linear import quick_products
from raymi.model.passing import EnoughError, passing_on, returned_beside, standing_in, unembed, with_hidden
from raymi.model.sites import NoSuchPlace, hidden_input
from raymi.model.sizes import UNEMBEDDED


class NotClean(RuntimeError):
    """The clean row of a batch did not come out as the clean run did: the cone is not exact on this model."""


class Cone:
    """The clean run of some prompts of equal length, and sweeps of ablations on it."""

    def __init__(
        self, model: HookedModel, ids_PT: Tensor, first_query: int, *, prefix: bool = True, tolerance: float = torch.inf
    ) -> None:
        """Runs the prompts clean.

        Args:
            model: the model.
            ids_PT: token ids.
            first_query: the smallest query position that will be asked for; layer inputs are kept from there on.
            prefix: whether the positions before a query may be left out (else only the layers below are).
            tolerance: largest difference in logits between a clean row and the clean run.
        """
        self.model, self.ids_PT, self.prefix, self.tolerance = model, ids_PT.to(model.device), prefix, tolerance
        self.first = first_query if prefix else 0
        self.inputs: list[Tensor] = []
        """Layer -> its clean input, [P, T - first, D]."""
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
            self.clean_PV = model.forward(self.ids_PT).logits_BV

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy of the part that is needed lets the rest go.
        x_PTD = hidden_input(args, kwargs)
        if x_PTD.shape[:2] != self.ids_PT.shape:
            raise NoSuchPlace(f"{self.model.name}: what its layers hand on is not one residual stream")
        self.inputs.append(x_PTD[:, self.first :].clone() if self.first else x_PTD)

    @property
    def bytes(self) -> int:
        """Memory of what is kept. Keys and values may be views of more, which goes with them."""
        return sum(each.nbytes for each in (*self.inputs, *(s for pair in self.states.values() for s in pair)))

    def serves(self, ids_PT: Tensor, first_query: int, *, prefix: bool) -> bool:
        """Whether this clean run is of these prompts and keeps what a query from `first_query` on needs."""
        same = self.prefix == prefix and self.ids_PT.shape == ids_PT.shape
        return same and self.first <= first_query and torch.equal(self.ids_PT, ids_PT.to(self.ids_PT.device))

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
        return len(cells) + 1

    def measure(self, cells: Sequence[Cell], indices: Sequence[int]) -> Iterator[Batch]:
        """One sweep over cells of one group.

        Yields:
            As many ablations as are unembedded at a time.

        Raises:
            NotClean: when row 0 is not the clean prompt's.
            NotFinite: when a logit is NaN or infinite.
        """
        rows = [cells[i] for i in indices]
        start = rows[0].first_query if self.prefix else 0
        hidden_BD, returned, fired_B, empty_B = self._sweep(rows, start)
        processor = "cpu" if self.model.device.type == "cpu" else "gpu"
        most = max(2, UNEMBEDDED[processor] // self.model.vocab_size)
        step = -(-len(hidden_BD) // -(-len(hidden_BD) // most))  # slices of equal length: a short one is slow
        clean_error, proof_1V = 0.0, self.clean_PV[:1]
        for begin in range(0, len(hidden_BD), step):
            logits_AV = self._unembed(hidden_BD[begin : begin + step], returned)
            if begin == 0:
                proof_1V, logits_AV, begin = logits_AV[:1], logits_AV[1:], 1
                clean_error = self._prove(proof_1V[0], rows[0].prompt)
            taken = slice(begin, begin + len(logits_AV))
            part = rows[begin - 1 : taken.stop - 1]
            self._refuse_not_finite(logits_AV, part)
            prompts = sorted({cell.prompt for cell in part})
            place = {prompt: row for row, prompt in enumerate(prompts)}
            yield Batch(
                indices[begin - 1 : taken.stop - 1],
                # Of one prompt, the clean row of this very batch: experts may route near-ties by a batch's shape.
                proof_1V if len(self.ids_PT) == 1 else self.clean_PV[prompts],
                logits_AV,
                torch.tensor([place[cell.prompt] for cell in part], device=self.model.device),
                fired_B[taken],
                empty_B[taken],
                clean_error,
            )

    def _prove(self, proof_V: Tensor, prompt: int) -> float:
        off = float((proof_V - self.clean_PV[prompt]).abs().max())
        if not off <= self.tolerance:
            raise NotClean(
                f"{self.model.name}: the clean row of a batch differs from the clean run by {off:.2e} in its logits, "
                f"where {self.tolerance:.1e} would be noise"
            )
        return off

    def _sweep(self, rows: Sequence[Cell], start: int) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Last hidden states behind the last layer, [B, D], row 0 clean; what the backbone returned; firings; empty."""
        model = self.model
        prompt_B = torch.tensor([rows[0].prompt, *(cell.prompt for cell in rows)], device=model.device)
        prefix = Prefix(start, self.states, None if len(self.ids_PT) == 1 else prompt_B) if self.prefix else None
        seen = {"past_key_values": _Seen(start, model.n_layers), "use_cache": True} if self.prefix else {}
        interventions = [(), *(cell.interventions for cell in rows)]
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
            for layer, (begin, end) in _steps(rows).items():
                join = _Join(self.inputs[layer][:, start - self.first :], prompt_B[begin:end], begin == 0)
                handle = model.blocks[layer].module.register_forward_pre_hook(join, with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(model.backbone.register_forward_hook(keep).remove)
            check = stack.enter_context(model.armed(interventions, n_positions, start=start, prefix=prefix))
            with suppress(EnoughError), quick_products(model.linears):
                model.run(self.ids_PT[:1, start:], len(interventions), **seen)
            fired_B, empty_B = check()
        hidden_BD, returned = kept
        return hidden_BD, returned, fired_B, empty_B

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
    """Lets rows join the batch in front of a layer, with that layer's clean input."""

    def __init__(self, input_PSD: Tensor, prompt_B: Tensor, first: bool) -> None:
        self.input_PSD, self.prompt_B, self.first = input_PSD, prompt_B, first

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        one = len(self.input_PSD) == 1
        prompt_B = self.prompt_B.to(self.input_PSD.device)
        new_BSD = self.input_PSD.expand(len(prompt_B), -1, -1) if one else self.input_PSD[prompt_B]
        x_BSD = new_BSD.clone() if self.first else torch.cat([hidden_input(args, kwargs), new_BSD])
        return with_hidden(x_BSD, args, kwargs)


def _steps(rows: Sequence[Cell]) -> dict[int, tuple[int, int]]:
    """Layer -> the rows of the batch that join there, row 0 (the clean one) at the lowest."""
    steps: dict[int, tuple[int, int]] = {rows[0].first_layer: (0, 1)}
    for row, cell in enumerate(rows, start=1):
        begin, _ = steps.get(cell.first_layer, (row, row))
        steps[cell.first_layer] = begin, row + 1
    return steps

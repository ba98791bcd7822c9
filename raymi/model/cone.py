"""The causal cone: recompute only what an intervention can change.

In a causal model an intervention whose first touched place is (layer l, position q) changes nothing below layer l and
nothing before position q. One clean run keeps each layer's input and every key and value; an ablation then needs only
layers >= l and positions >= q, attending to the clean keys and values of the positions before.

Ablations with the same q go through the layers in one sweep, a staircase: each row joins the batch at its own layer,
with the clean input of that layer. Row 0 is the clean prompt itself, and must come out as the clean run did.

The rest of a model's forward is its own: a stand-in for its cache tells it how many positions went before, so that it
builds its masks, positions and rotary embeddings itself.

Legend: B rows, P prompts, T positions, S positions of the suffix, D hidden size, V vocabulary, A ablations.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from raymi.model.attention import Prefix
from raymi.model.hooked import Batch, Cell, HookedModel
from raymi.model.sites import hidden_input

UNEMBEDDED = 1 << 24
"""Logits made at a time; metrics are computed on them before the next ones are."""


class NotClean(RuntimeError):
    """The clean row of a batch did not come out as the clean run did: the cone is not exact on this model."""


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

    def get_seq_length(self, *_: object) -> int:
        return self.length

    def get_query_offset(self, *_: object) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor, *_: object) -> tuple[int, int]:
        return self.length + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class Cone:
    """The clean run of some prompts of equal length, and sweeps of ablations on it."""

    def __init__(self, model: HookedModel, ids_PT: Tensor, first: int) -> None:
        """Runs the prompts clean.

        Args:
            model: the model.
            ids_PT: token ids.
            first: the smallest query position that will be asked for; layer inputs are kept from there on.
        """
        self.model, self.ids_PT, self.first = model, ids_PT.to(model.device), first
        self.inputs: list[Tensor] = []
        """Layer -> its clean input, [P, T - first, D]."""
        with ExitStack() as stack:
            for block in model.blocks:
                stack.callback(block.module.register_forward_pre_hook(self._remember, with_kwargs=True).remove)
            model.tap.keep = self.states = {}
            self.clean_PV = model.forward(self.ids_PT).logits_BV

    def _remember(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy of the part that is needed lets the rest go.
        x_PTD = hidden_input(args, kwargs)
        self.inputs.append(x_PTD[:, self.first :].clone() if self.first else x_PTD)

    def sweep(self, cells: Sequence[Cell], indices: Sequence[int]) -> Iterator[Batch]:
        """Measure ablations that share their first query position.

        Args:
            cells: all cells.
            indices: which of them, ordered by first layer.

        Yields:
            As many ablations as are unembedded at a time.

        Raises:
            NotClean: when row 0 is not the clean prompt's.
        """
        rows = [cells[i] for i in indices]
        start = rows[0].first_query
        hidden_BD, base_output = self._through(rows, start)
        proof_V = self._unembed(hidden_BD[:1], base_output)[0]
        fired_B, empty_B = self.model.tally
        self._prove(proof_V, rows[0].prompt)
        step = max(1, UNEMBEDDED // self.model.vocab_size)
        for at in range(0, len(rows), step):
            part = rows[at : at + step]
            ablated_AV = self._unembed(hidden_BD[1 + at : 1 + at + len(part)], base_output)
            prompts = sorted({cell.prompt for cell in part})
            place = {prompt: row for row, prompt in enumerate(prompts)}
            prompt_A = torch.tensor([place[cell.prompt] for cell in part], device=self.model.device)
            taken = slice(1 + at, 1 + at + len(part))
            yield Batch(
                indices[at : at + len(part)],
                proof_V[None] if len(self.ids_PT) == 1 else self.clean_PV[prompts],
                ablated_AV,
                prompt_A,
                fired_B[taken],
                empty_B[taken],
            )

    def _prove(self, proof_V: Tensor, prompt: int) -> None:
        off = float((proof_V - self.clean_PV[prompt]).abs().max())
        if off > self.model.tolerance:
            raise NotClean(
                f"{self.model.name}: the clean row of a batch differs from the clean run by {off:.2e} in its logits, "
                f"where {self.model.tolerance:.1e} would be noise"
            )

    def _through(self, rows: Sequence[Cell], start: int) -> tuple[Tensor, Any]:
        """The rows' last hidden states behind the last layer, [B, D], row 0 clean; and what the base model returned."""
        model, base = self.model, self.model.backbone
        of_row = [rows[0].prompt, *(cell.prompt for cell in rows)]
        prompt_B = torch.tensor(of_row, device=model.device)
        shared = len(self.ids_PT) == 1
        prefix = Prefix(start, self.states, None if shared else prompt_B)
        lowest = rows[0].first_layer
        kept: list[Any] = []

        def keep(_: nn.Module, __: object, output: Any) -> Any:
            kept.extend((output.last_hidden_state[:, -1].clone(), copy.copy(output)))
            output.last_hidden_state = output.last_hidden_state[:1]
            return output

        with ExitStack() as stack:
            for block in model.blocks[:lowest]:
                stack.enter_context(_skipped(block.module))
            for layer, (begin, end) in _steps(rows, lowest).items():
                join = _Join(self.inputs[layer][:, start - self.first :], prompt_B[begin:end], begin == 0)
                handle = model.blocks[layer].module.register_forward_pre_hook(join, with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(base.register_forward_hook(keep).remove)
            cache = _Seen(start, model.n_layers)
            model.suffix(self.ids_PT[:1, start:], [(), *(c.interventions for c in rows)], prefix, cache)
        hidden_BD, output = kept
        return hidden_BD, output

    def _unembed(self, hidden_AD: Tensor, base_output: Any) -> Tensor:
        """Logits of hidden states, [A, V] float32, by whatever the model does behind its last layer."""
        model, base = self.model, cast(Any, self.model.backbone)
        given = copy.copy(base_output)
        given.last_hidden_state = hidden_AD[:, None]
        base.forward = lambda *_, **__: given
        try:
            return model.unembedded(self.ids_PT[:1, -1:])
        finally:
            del base.forward


class _Join:
    """Lets rows join the batch in front of a layer, with that layer's clean input."""

    def __init__(self, input_PSD: Tensor, prompt_B: Tensor, first: bool) -> None:
        self.input_PSD, self.prompt_B, self.first = input_PSD, prompt_B, first

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        n_new = len(self.prompt_B)
        one = len(self.input_PSD) == 1
        new_BSD = self.input_PSD.expand(n_new, -1, -1) if one else self.input_PSD[self.prompt_B]
        x_BSD = new_BSD.clone() if self.first else torch.cat([hidden_input(args, kwargs), new_BSD])
        if args:
            return (x_BSD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": x_BSD}


def _steps(rows: Sequence[Cell], lowest: int) -> dict[int, tuple[int, int]]:
    """Layer -> the rows of the batch that join there, row 0 (the clean one) at the lowest."""
    steps: dict[int, tuple[int, int]] = {lowest: (0, 1)}
    for row, cell in enumerate(rows, start=1):
        begin, _ = steps.get(cell.first_layer, (row, row))
        steps[cell.first_layer] = begin, row + 1
    return steps


class _skipped:
    """A layer that, for a while, gives back what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = cast(Any, layer)

    def __enter__(self) -> None:
        self.layer.forward = lambda *args, **kwargs: hidden_input(args, kwargs)

    def __exit__(self, *_: object) -> None:
        del self.layer.forward


def ablations(model: HookedModel, ids_PT: Tensor, cells: Sequence[Cell]) -> Iterator[Batch]:
    """As `HookedModel.ablations`, by the causal cone."""
    first = min(cell.first_query for cell in cells)
    cone = Cone(model, ids_PT, first)
    by_query: dict[int, list[int]] = {}
    for index, cell in enumerate(cells):
        by_query.setdefault(cell.first_query, []).append(index)
    for _, indices in sorted(by_query.items()):
        indices.sort(key=lambda i: cells[i].first_layer)
        yield from cone.sweep(cells, indices)

"""Ablations measured in raymi's ways, in the order in which they were asked for."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from raymi.model.engine import Engine
from raymi.model.hooked import Cell, HookedModel


class Measured(NamedTuple):
    clean_PV: Tensor
    ablated_AV: Tensor
    fired_A: Tensor
    empty_A: Tensor
    closed_A: Tensor


def in_one_batch(model: HookedModel, ids_PT: Tensor, cells: Sequence[Cell]) -> Measured:
    """By a full forward, clean rows first."""
    n, rows = len(ids_PT), [*range(len(ids_PT)), *(of.prompt for of in cells)]
    out = model.forward(ids_PT[rows], [*([()] * n), *(of.interventions for of in cells)])
    assert out.closed_B is not None
    return Measured(out.logits_BV[:n], out.logits_BV[n:], out.fired_B[n:], out.empty_B[n:], out.closed_B[n:])


def by_engine(engine: Engine, ids_PT: Tensor, cells: Sequence[Cell]) -> Measured:
    """By the way that was found to be fastest on this model, the causal cone where it can be."""
    found: dict[int, tuple[Tensor, ...]] = {}
    for batch in engine.ablations(ids_PT, cells):
        assert batch.closed_A is not None
        counts = batch.fired_A, batch.empty_A, batch.closed_A
        rows = zip(batch.clean_PV[batch.prompt_A], batch.ablated_AV, *counts, strict=True)
        found.update(zip(batch.cells, rows, strict=True))
    clean_AV, *others = (torch.stack([found[i][column] for i in range(len(cells))]) for column in range(5))
    first = [next(i for i, of in enumerate(cells) if of.prompt == p) for p in range(len(ids_PT))]
    return Measured(clean_AV[first], *others)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models lose more by waking a second thread than they gain, on a busy machine many times as much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

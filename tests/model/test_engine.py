"""Batches that fit into memory, whichever way they are measured; and what is found out about a model at load."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import XGLMConfig, XGLMForCausalLM
from transformers.models.llama import modeling_llama

from raymi.model.attention import UnsupportedAttention
from raymi.model.engine import Engine, OutOfMemory, Way, WrongNumbers, measure_capability
from raymi.model.hooked import Cell, HookedModel
from raymi.model.interventions import Mask
from tests.families import PROMPT, build, prompt
from tests.model.measuring import by_engine

LAST = PROMPT - 1
CELLS = [
    Cell(p, (Mask(layer, (head,), ((LAST, LAST - 2), (query, query - 1))),))
    for p in (1, 0, 2)
    for layer in (3, 0, 1)
    for head in (0, 3)
    for query in (LAST, 7)
]
WAYS: tuple[Way, ...] = ("cone", "layers", "full")


@pytest.fixture
def engine() -> Callable[[Way], Engine]:
    """A fresh one: these tests change its limits and its model."""
    model = HookedModel(build("gemma2"), "gemma2")
    return lambda way: Engine(model, measure_capability(model, PROMPT), way)


class Scarce:
    """A forward for which memory runs out when it has too many rows."""

    def __init__(self, model: HookedModel, limit: int, error: Exception) -> None:
        self.run, self.limit, self.error = model.run, limit, error
        self.rows: list[int] = []
        model.run = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, ids_BT: Tensor, n_rows: int | None = None, **given: Any) -> Tensor:
        rows = n_rows or len(ids_BT)
        self.rows.append(rows)
        if rows > self.limit:
            raise self.error
        return self.run(ids_BT, n_rows, **given)


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ...")
ERRORS = {
    "cpu": CPU,
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("limit", [15, 7, 3, 2])
def test_halving_gives_the_same_rows(way: Way, limit: int, engine: Callable[[Way], Engine]):
    ids_PT, its = prompt(rows=3), engine(way)
    plenty = by_engine(its, ids_PT, CELLS)
    its.limits.clear()
    its.cones.clear()
    # The clean run takes a row a prompt, and all three fit.
    scarce = Scarce(its.model, limit if way == "full" else max(3, limit), CPU)
    fewer = by_engine(its, ids_PT, CELLS)
    assert max(scarce.rows) > limit
    for one, other in zip(plenty, fewer, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("error", ERRORS)
def test_memory_runs_out_in_many_words(error: str, engine: Callable[[Way], Engine]):
    its = engine("full")
    Scarce(its.model, 5, ERRORS[error])
    assert len(by_engine(its, prompt(rows=3), CELLS).ablated_AV) == len(CELLS)


@pytest.mark.parametrize("way", WAYS)
def test_when_not_even_one_fits(way: Way, engine: Callable[[Way], Engine]):
    its = engine(way)
    Scarce(its.model, 1, CPU)
    with pytest.raises(OutOfMemory, match=f"gemma2: one ablation of a prompt of {PROMPT} tokens"):
        list(its.ablations(prompt(), [Cell(0, cell.interventions) for cell in CELLS]))


def test_another_error_is_not_taken_for_a_lack_of_memory(engine: Callable[[Way], Engine]):
    its = engine("full")
    scarce = Scarce(its.model, 5, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        list(its.ablations(prompt(rows=3), CELLS))
    assert len(scarce.rows) == 1


@pytest.mark.parametrize("way", WAYS)
def test_batches_keep_to_the_limit_and_hold_the_clean_rows_of_their_prompts(way: Way, engine: Callable[[Way], Engine]):
    ids_PT, its = prompt(rows=3), engine(way)
    clean_PV = its.model.forward(ids_PT).logits_BV
    scarce = Scarce(its.model, 9, CPU)
    its.limits = {(way, computed, PROMPT): 9 for computed in range(PROMPT + 1)}
    batches = list(its.ablations(ids_PT, CELLS))
    assert max(scarce.rows) <= 9
    assert sorted(i for batch in batches for i in batch.cells) == list(range(len(CELLS)))
    for batch in batches:
        of = [CELLS[i].prompt for i in batch.cells]
        torch.testing.assert_close(batch.clean_PV[batch.prompt_A], clean_PV[of], atol=1e-5, rtol=0)
        assert len(batch.clean_PV) <= len(set(of))
        assert 0 <= batch.clean_error <= its.capability.tolerance


# ---- what is found out at load --------------------------------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[None]:
    before = modeling_llama.eager_attention_forward
    yield
    modeling_llama.eager_attention_forward = before


@pytest.mark.usefixtures("restored")
def test_a_family_that_attends_otherwise_is_found_out():
    """Its eager function does what raymi's cannot know of."""
    eager = modeling_llama.eager_attention_forward
    modeling_llama.eager_attention_forward = lambda *args, scaling, **kw: eager(*args, scaling=1.03 * scaling, **kw)
    model = HookedModel(build("llama"), "odd-llama")
    with pytest.raises(WrongNumbers, match=r"odd-llama: .* LlamaForCausalLM's own by"):
        measure_capability(model, PROMPT)


def peek(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every position sees the mean of all, later ones included."""
    return (args[0] + args[0].mean(1, keepdim=True), *args[1:]), kwargs


def test_a_model_that_looks_ahead_gets_no_cone():
    model = build("llama")
    model.get_submodule("model.layers.1").register_forward_pre_hook(peek, with_kwargs=True)
    capability = measure_capability(HookedModel(model, "llama"), PROMPT)
    assert capability.way == "layers"
    assert "cone: " in capability.why


def test_rows_that_know_of_each_other_are_found_out():
    """Neither is what it would be alone, so that no batch is right."""
    model = build("llama")
    model.get_submodule("model.layers.3").register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] + 0.1 * args[0].mean(0, keepdim=True), *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(WrongNumbers, match="sociable: the rows of a batch change each other"):
        measure_capability(HookedModel(model, "sociable"), PROMPT)


def test_a_family_whose_code_takes_no_mask_a_head_is_refused_by_name():
    sizes = {"vocab_size": 97, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
    model = HookedModel(XGLMForCausalLM(XGLMConfig(**sizes, attn_implementation="eager")), "xglm-tiny")
    with pytest.raises(
        UnsupportedAttention, match=r"xglm-tiny: XGLMForCausalLM fails when its attention is cut: .*mask"
    ):
        measure_capability(model, PROMPT)

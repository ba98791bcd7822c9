"""What only a GPU shows: its numbers beside the CPU's, memory that runs out and comes back, float32 that is float32.

`make gpu` runs these; with RAYMI_TESTS_DEVICE=cpu they run anywhere, and what a GPU would do is acted.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raymi.model import memory
from raymi.model.engine import Engine, OutOfMemory, WrongNumbers, measure_capability
from raymi.model.full import Full
from raymi.model.hooked import Cell, HookedModel, NotFinite
from raymi.model.interventions import Mask, scale, zero
from raymi.model.loading import DTYPES, load
from tests import families
from tests.device import NAMED
from tests.model.measuring import by_engine
from tests.model.test_engine import CPU, Scarce

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (NAMED or torch.cuda.is_available()), reason="no CUDA device"),
]

DEVICE = torch.device(NAMED or "cuda")
FAMILIES = ("llama", "gemma2", "gpt2", "mixtral", "qwen3_next")
N_TOKENS = 200

Record = Callable[[str, object], None]


def on(device: torch.device | str, family: str, dtype: str = "float32") -> HookedModel:
    return HookedModel(families.build(family).to(device, DTYPES[dtype]), family)


def cells(model: HookedModel, last: int) -> list[Cell]:
    """At several layers and positions, on two prompts."""
    lowest, highest = model.attention_layers[0], model.attention_layers[-1]
    masks = [
        Cell(p, (Mask(layer, (head,), ((last, 0),)),)) for p in (0, 1) for layer in (lowest, highest) for head in (0, 3)
    ]
    edits = [
        Cell(0, (scale(1, "hook_resid_pre", (last // 2,), 0.5),)),
        Cell(1, (zero(lowest, "attn.hook_z", (last,)),)),
    ]
    return [*masks, *edits, Cell(0, (Mask(highest, None, ((last, last), (last // 2, 1))),))]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_way_on_the_device_gives_what_full_forwards_on_the_cpu_give(family: str, record_property: Record):
    here, there = on("cpu", family), on(DEVICE, family)
    ids_PT = families.prompt(rows=2).cpu()
    capability = measure_capability(there, 12)
    wanted = cells(here, ids_PT.shape[1] - 1)
    [expected] = Full(here, ids_PT).measure(wanted, range(len(wanted)))
    found = by_engine(Engine(there, capability, capability.way), ids_PT, wanted)
    largest = float(expected.clean_PV.abs().max())
    off = float((found.ablated_AV.cpu() - expected.ablated_AV.cpu()).abs().max())
    effect = float((expected.ablated_AV.cpu() - expected.clean_PV.cpu()[expected.prompt_A.cpu()]).abs().max())
    record_property(
        "finding", f"{family}, by {capability.way}: off the CPU's full forwards by {off:.1e} of {largest:.0f}"
    )
    assert off < 1e-4 * largest
    assert effect > 0.01 * largest
    assert found.fired_A.tolist() == expected.fired_A.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_proof_in_three_dtypes(family: str, dtype: str, record_property: Record):
    try:
        found = measure_capability(on(DEVICE, family, dtype), 12)
    except (NotFinite, WrongNumbers) as error:
        assert dtype != "float32"
        record_property("finding", f"proof of {family} in {dtype}: refused, {error}")
        return
    said = f"noise {found.noise:.1e}, tolerance {found.tolerance:.1e}, off by {found.cone_error:.1e}"
    record_property(
        "finding", f"proof of {family} in {dtype}: {found.way}, {said}{f'; {found.why}' if found.why else ''}"
    )
    if dtype == "float32":
        assert found.why == "" or family == "qwen3_next"
        assert found.tolerance < 0.01


def test_float32_is_no_tf32(tmp_path: Path, record_property: Record):
    families.build("llama").save_pretrained(tmp_path)
    torch.set_float32_matmul_precision("high")
    load(tmp_path, device=str(DEVICE))
    assert not torch.backends.cuda.matmul.allow_tf32
    a, b = (torch.randn(1024, 1024, device="cpu") for _ in range(2))
    exact = a.double() @ b.double()
    off = float(((a.to(DEVICE) @ b.to(DEVICE)).cpu().double() - exact).abs().max() / exact.abs().max())
    record_property(
        "finding", f"a float32 product of 1024 x 1024 is off by {off:.0e} of its largest number (TF32: 3e-4)"
    )
    assert off < 2e-5


@contextmanager
def little_memory(model: HookedModel, rows: int, free: int) -> Iterator[None]:
    """A device on which a large batch finds no memory: really, on a GPU; else by an error beyond so many rows."""
    if DEVICE.type != "cuda":
        run = model.run
        Scarce(model, rows, CPU)
        yield
        model.run = run  # pyright: ignore[reportAttributeAccessIssue]
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(DEVICE)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + free) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@pytest.mark.parametrize("way", ["full", "cone"])
def test_memory_that_runs_out_halves_the_batch_and_changes_no_number(way: str, record_property: Record):
    model = on(DEVICE, "llama")
    model.model.config.max_position_embeddings = 2 * N_TOKENS
    ids_PT = families.prompt(N_TOKENS, rows=1)
    middle = N_TOKENS // 2
    many = [Cell(0, (Mask(i % 4, (i // 4 % 4,), ((middle, i // 16),)),)) for i in range(16 * 40)]
    capability = measure_capability(model, 12)
    engine = Engine(model, capability, way)  # pyright: ignore[reportArgumentType]
    plenty = by_engine(engine, ids_PT, many)
    before = dict(engine.limits)
    engine.limits.clear()
    engine.cones.clear()
    with little_memory(model, rows=10, free=96 << 20):
        fewer = by_engine(engine, ids_PT, many)
    after = dict(engine.limits)
    record_property(
        "finding", f"memory runs out, {way}: {max(before.values())} rows at a time, then {max(after.values())}"
    )
    assert max(after.values()) < max(before.values())
    for one, other in zip(plenty, fewer, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_when_not_even_one_fits_it_is_said_and_the_next_prompt_is_measured():
    model = on(DEVICE, "llama")
    capability = measure_capability(model, 12)
    engine = Engine(model, capability, "full")
    cell = Cell(0, (Mask(0, None, ((3, 0),)),))
    with little_memory(model, rows=1, free=0), pytest.raises(OutOfMemory, match="does not fit into memory"):
        list(engine.ablations(families.prompt(3000 if DEVICE.type == "cuda" else 14), [cell]))
    assert len(by_engine(engine, families.prompt(), [cell]).ablated_AV) == 1


def test_the_memory_of_a_model_comes_back(tmp_path: Path, record_property: Record):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8000)).save_pretrained(tmp_path)
    gc.collect()
    memory.empty_cache(DEVICE)
    held: list[int] = []
    for _ in range(3):
        loaded = load(tmp_path, device=str(DEVICE))
        ids_PT = torch.randint(2, 8000, (1, 50))
        wanted = [Cell(0, (Mask(layer, None, ((49, 0),)),)) for layer in range(8)]
        by_engine(loaded.engine, ids_PT, wanted)
        weights, after = loaded.model.weight_bytes, loaded.after
        if DEVICE.type == "cuda":
            assert after.vram is not None
            assert loaded.before.vram is not None
            assert weights <= after.vram - loaded.before.vram < 1.5 * weights + (64 << 20)
        del loaded
        gc.collect()
        memory.empty_cache(DEVICE)
        held.append(memory.snapshot(DEVICE).vram or 0)
    record_property(
        "finding", f"held after a model of {weights >> 20} MiB: {', '.join(str(n >> 20) for n in held)} MiB"
    )
    assert max(held) - min(held) < 1 << 20

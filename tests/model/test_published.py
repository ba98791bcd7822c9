"""Figures that candle-mi, the program whose job this is, published for three models, out of another stack, in Rust.

"The capital of France is", middle layer, all heads, last position to first. They run when a model is in the user's
Hugging Face cache, and are skipped by its name otherwise.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from raymi import catalog
from raymi.errors import UserError
from raymi.model.engine import Engine
from raymi.model.hooked import Cell
from raymi.model.interventions import Mask
from raymi.model.loading import load
from tests import oracles
from tests.model.measuring import by_engine

pytestmark = [pytest.mark.oracle, pytest.mark.published, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Published:
    shape: tuple[int, int, int]
    """Layers, heads, hidden size."""
    layer: int
    n_tokens: int
    kl: float
    logit_diff: float
    """Of the last piece of " Paris": all of it, but for StarCoder2, which reads " Par" and "is"."""
    changed: tuple[tuple[int, float, float], ...]
    """(token, probability clean, ablated), most changed first."""


LLAMA = Published(
    (16, 32, 2048), 8, 6, 0.05590993, 0.5527973,
    (
        (12366, 0.3934546, 0.26043534), (264, 0.083813675, 0.12875824), (832, 0.030767648, 0.0478224),
        (279, 0.07025879, 0.086290486), (1101, 0.03059414, 0.044096835), (459, 0.012330725, 0.021910692),
        (2162, 0.025135782, 0.022168376), (3629, 0.011634505, 0.014449166), (539, 0.01659021, 0.019315327),
        (7559, 0.011747584, 0.013895018),
    ),
)  # fmt: skip
GEMMA = Published(
    (26, 8, 2304), 13, 6, 0.017049061, -0.33103752,
    (
        (7127, 0.038783796, 0.06650263), (1170, 0.078236714, 0.06135467), (974, 0.08077458, 0.09295635),
        (2078, 0.050353155, 0.040463258), (780, 0.04193192, 0.033604648), (573, 0.100045666, 0.105764166),
        (2247, 0.026976483, 0.024007458), (235248, 0.007938842, 0.010856795), (10964, 0.025307184, 0.022753183),
        (3836, 0.048318982, 0.0502819),
    ),
)  # fmt: skip
STARCODER = Published(
    (30, 24, 3072), 15, 5, 0.02852036, -1.0776852,
    (
        (2736, 0.40930933, 0.3217822), (320, 0.029561557, 0.03999135), (517, 0.051559813, 0.041881926),
        (2172, 0.014221674, 0.022541584), (63, 0.050309885, 0.05739915), (48903, 0.007855332, 0.011350922),
        (43898, 0.009260806, 0.01259934), (332, 0.044866182, 0.048152734), (518, 0.030060519, 0.032841854),
        (666, 0.0038022478, 0.006337442),
    ),
)  # fmt: skip


def in_cache(id: str, cache: Path) -> Path:
    try:
        found = catalog.find(id, cache)
    except UserError:
        pytest.skip(f"{id} is not in {cache}")
    if found.reason:
        pytest.skip(f"{id} cannot run: {found.reason}")
    return found.path


def without_scaled_rotation(snapshot: Path, copy: Path) -> Path:
    """The snapshot as the other program reads it: it knows nothing of Llama 3's scaled rotary embedding."""
    for file in snapshot.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    config = json.loads((snapshot / "config.json").read_text())
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    config |= {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def check(engine: Engine, snapshot: Path, of: Published, first_piece: int, n_pieces: int = 1) -> None:
    model, tokenizer = engine.model, AutoTokenizer.from_pretrained(snapshot)
    assert (model.n_layers, model.n_heads, model.hidden_size) == of.shape
    ids = tokenizer("The capital of France is").input_ids
    paris = tokenizer(" Paris", add_special_tokens=False).input_ids
    assert (len(ids), paris[0], len(paris)) == (of.n_tokens, first_piece, n_pieces)

    mask = Mask(of.layer, None, ((of.n_tokens - 1, 0),))
    measured = by_engine(engine, torch.tensor([ids]), [Cell(0, (mask,))])
    clean_V, ablated_V = measured.clean_PV[0], measured.ablated_AV[0]
    assert oracles.kl(clean_V, ablated_V) == pytest.approx(of.kl, rel=1e-2)
    assert float(clean_V[paris[-1]] - ablated_V[paris[-1]]) == pytest.approx(of.logit_diff, rel=1e-2)
    ours = oracles.top_changes(clean_V, ablated_V, 10)
    assert [token for token, _, _ in ours] == [token for token, _, _ in of.changed]
    for column in (1, 2):
        assert [row[column] for row in ours] == pytest.approx([row[column] for row in of.changed], rel=1e-3)


def test_llama_3_2_1b(user_cache: Path, tmp_path: Path):
    snapshot = in_cache("meta-llama/Llama-3.2-1B", user_cache)
    engine = load(without_scaled_rotation(snapshot, tmp_path), device="cpu").engine
    check(engine, snapshot, LLAMA, 12366)


def test_gemma_2_2b(user_cache: Path):
    snapshot = in_cache("google/gemma-2-2b", user_cache)
    check(load(snapshot, device="cpu").engine, snapshot, GEMMA, 7127)


def test_starcoder2_3b(user_cache: Path):
    """Its figure is of the last piece of " Paris", which is given here as what it is."""
    snapshot = in_cache("bigcode/starcoder2-3b", user_cache)
    check(load(snapshot, device="cpu").engine, snapshot, STARCODER, 2736, n_pieces=2)

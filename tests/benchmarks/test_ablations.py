"""The benchmark measures the same thing on every side, and counts the operations that are really done."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ablations import main
from benchmarks.arithmetic import Arithmetic
from benchmarks.cases import Part, cases, make_shape, twin
from benchmarks.peers import PEERS
from benchmarks.results import FULL_EACH, Measured, PeerResult, aims
from raymi.model import linear
from raymi.model.engine import Engine, measure_capability
from raymi.model.hooked import HookedModel


def made():
    _, model, stream = make_shape("tiny", torch.float32, "cpu")
    return model, stream


def engine_of(model) -> Engine:
    hooked = HookedModel(model, "tiny")
    capability = measure_capability(hooked, 12)
    return Engine(hooked, capability, capability.way)


def named(stream, name: str) -> Part:
    return next(case for case in cases(stream, 3, 6, quick=True) if case.name == name).parts[0]


def logits(engine: Engine, part: Part) -> dict[int, torch.Tensor]:
    found = {}
    for batch in engine.ablations(*part):
        found.update(zip(batch.cells, batch.ablated_AV, strict=True))
    return found


@pytest.mark.parametrize("name", ["heads-5", "heads-128", "windows-128"])
def test_what_is_needed_is_what_the_engine_computes(name, monkeypatch):
    monkeypatch.setattr(linear, "_pays", lambda: False)  # what oneDNN multiplies, torch does not count
    model, stream = made()
    engine, part = engine_of(model), named(stream, name)
    logits(engine, part)  # the clean run is not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits(engine, part)
    arithmetic = Arithmetic(engine.model)
    # A last query sees all keys, so nothing is computed and then masked. Row 0 may be unembedded once more than needed.
    more = counter.get_total_flops() - arithmetic.cone(part.ids_PT.shape[1], part.cells)
    # The value at the last position itself is weighed by a plain multiplication, which is not counted.
    rows_of_layers = 3 + sum(3 - cell.first_layer for cell in part.cells)
    more += rows_of_layers * arithmetic.key // 2
    assert more in (0, arithmetic.unembedding)


@pytest.mark.oracle
@pytest.mark.parametrize("name", PEERS)
def test_peers_measure_what_raymi_measures(name):
    pytest.importorskip({"TransformerLens": "transformer_lens"}.get(name, "transformers" if " " in name else name))
    model, stream = made()
    peer, engine = PEERS[name](twin(model)), engine_of(model)
    for case in ("heads-5", "middle-128", "windows-128"):
        part = named(stream, case)
        ours = logits(engine, part)
        with torch.no_grad():
            clean_V = peer(part.ids_PT, ())
            for i in (0, len(part.cells) // 2, len(part.cells) - 1):
                theirs_V = peer(part.ids_PT, part.cells[i].interventions)
                torch.testing.assert_close(ours[i], theirs_V, atol=1e-5, rtol=0)
                # A query in the middle of the last layer reaches no later position.
                reaches = case != "middle-128" or part.cells[i].first_layer < 2
                assert bool((theirs_V - clean_V).abs().max() > 1e-4) == reaches


def test_cases_cover_what_they_say():
    _, stream = made()
    sizes = {case.name: case.n_cells for case in cases(stream, 3, 6, quick=False)}
    assert sizes == {
        **dict.fromkeys(("heads-5", "heads-16", "heads-128", "heads-1000", "middle-128", "windows-128"), 18),
        **{"keys-128": 3 * 128, "middle-1000": 3, "prompts": 1000},
    }


def test_aims_say_what_is_met():
    fine = Measured(
        name="heads-5",
        about="",
        n_cells=1,
        seconds=1.0,
        seconds_with_metrics=1.1,
        clean_seconds=0.0,
        flops=70.0,
        matmul_rates=(90.0, 100.0),
        peak_bytes=0,
        peers={FULL_EACH: PeerResult(50.0, 1, None)},
        difference=1e-5,
        effect=1.0,
    )
    assert all(aim.met for aim in aims([fine], "float32"))
    for worse in (
        replace(fine, flops=50.0),
        replace(fine, seconds_with_metrics=1.3),
        replace(fine, peers={FULL_EACH: PeerResult(30.0, 1, None)}),
        replace(fine, difference=1e-3),
    ):
        assert [aim.met for aim in aims([worse], "float32")].count(False) == 1


@pytest.mark.slow
def test_the_command_writes_a_section(tmp_path, capsys):
    main(["--shape", "tiny", "--quick", "--only", "heads-5", "--only", "prompts", "--markdown", str(tmp_path / "R.md")])
    section = (tmp_path / "R.md").read_text()
    assert "| heads-5 | 18 |" in section
    assert "| prompts | 100 |" in section
    assert "plain loop" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no case begins with nothing"):
        main(["--shape", "tiny", "--quick", "--only", "nothing"])

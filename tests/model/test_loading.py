"""Snapshots of every kind of disrepair, and the check that a loaded model computes what its family does."""

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from raymi.model.engine import WrongNumbers
from raymi.model.loading import SHORTEST_CHECK, BadWeights, check_length, load, pick_device
from raymi.model.sites import NoSuchPlace
from tests.families import build, prompt


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path)
    return tmp_path


def weights(snapshot: Path) -> Path:
    return snapshot / "model.safetensors"


def truncated(snapshot: Path) -> None:
    data = weights(snapshot).read_bytes()
    weights(snapshot).write_bytes(data[: len(data) // 2])


def cut_in_the_header(snapshot: Path) -> None:
    weights(snapshot).write_bytes(weights(snapshot).read_bytes()[:20])


def empty(snapshot: Path) -> None:
    weights(snapshot).write_bytes(b"")


def gone(snapshot: Path) -> None:
    weights(snapshot).unlink()


def without_a_tensor(snapshot: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(weights(snapshot))
    del state["model.layers.2.self_attn.k_proj.weight"]
    save_file(state, weights(snapshot), {"format": "pt"})


def of_another_shape(snapshot: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(weights(snapshot))
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(49, 32)
    save_file(state, weights(snapshot), {"format": "pt"})


def edit_config(snapshot: Path, **changes: Any) -> None:
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | changes))


def more_layers_than_weights(snapshot: Path) -> None:
    edit_config(snapshot, num_hidden_layers=6)


def of_no_known_type(snapshot: Path) -> None:
    edit_config(snapshot, model_type="lama", architectures=["LamaForCausalLM"])


def impossible_sizes(snapshot: Path) -> None:
    edit_config(snapshot, hidden_size="thirty-two")


def no_config(snapshot: Path) -> None:
    (snapshot / "config.json").unlink()


def not_json(snapshot: Path) -> None:
    (snapshot / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, "cannot be read"),
        (cut_in_the_header, "cannot be read"),
        (empty, "cannot be read"),
        (gone, "cannot be read.*model.safetensors"),
        (without_a_tensor, "layers.2.self_attn.k_proj.* is missing"),
        (of_another_shape, "layers.2.mlp.up_proj"),
        (more_layers_than_weights, "layers.4.* is missing.*and 15 more"),
        (of_no_known_type, "lama"),
        (impossible_sizes, "hidden_size"),
        (no_config, "config.json"),
        (not_json, "config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_snapshot_is_named_with_what_is_wrong(damage: Callable[[Path], None], says: str, snapshot: Path):
    damage(snapshot)
    with pytest.raises(BadWeights, match=f"(?s)org/hurt: .*{says}"):
        load(snapshot, name="org/hurt", device="cpu")


class Mine:
    """What a pickle can do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_refused_unless_asked_for(snapshot: Path):
    torch.save(build("llama").state_dict(), snapshot / "pytorch_model.bin")
    weights(snapshot).unlink()
    with pytest.raises(BadWeights, match=r"org/pickled: .*safetensors"):
        load(snapshot, name="org/pickled", device="cpu")
    loaded = load(snapshot, allow_pickle=True, device="cpu")
    torch.testing.assert_close(loaded.engine.model.forward(prompt()).logits_BV, build("llama")(prompt()).logits[:, -1])


def test_even_then_a_pickle_runs_no_code(snapshot: Path):
    (snapshot / "pytorch_model.bin").write_bytes(
        pickle.dumps({"model.norm.weight": Mine(snapshot / "ran")}, protocol=2)
    )
    weights(snapshot).unlink()
    with pytest.raises(BadWeights, match="org/mine"):
        load(snapshot, name="org/mine", allow_pickle=True, device="cpu")
    assert not (snapshot / "ran").exists()


def test_code_of_a_snapshot_is_not_run_unless_asked_for(snapshot: Path):
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(snapshot, model_type="own", auto_map=own, architectures=["OwnModel"])
    (snapshot / "own.py").write_text(f"open({str(snapshot / 'ran')!r}, 'w')\n")
    with pytest.raises(BadWeights, match="org/own"):
        load(snapshot, name="org/own", device="cpu")
    assert not (snapshot / "ran").exists()


@pytest.mark.parametrize(
    ("dtype", "stored", "itemsize"),
    [("float32", torch.bfloat16, 4), ("bfloat16", torch.float32, 2), ("float16", torch.float32, 2)],
)
def test_weights_become_what_was_asked_for(dtype: str, stored: torch.dtype, itemsize: int, tmp_path: Path):
    build("llama").to(stored).save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=dtype, device="cpu")
    model = loaded.engine.model
    assert model.dtype == getattr(torch, dtype)
    assert {p.dtype for p in model.model.parameters()} == {model.dtype}
    assert model.weight_bytes == itemsize * sum(p.numel() for p in model.model.parameters())
    assert model.forward(prompt()).logits_BV.dtype == torch.float32
    assert loaded.engine.way == "cone"


def test_what_loading_tells(snapshot: Path):
    loaded = load(snapshot, name="org/tiny", device="cpu")
    model = loaded.engine.model
    assert (model.n_layers, model.n_heads, model.hidden_size, model.vocab_size) == (4, 4, 32, 97)
    assert model.name == "org/tiny"
    assert loaded.seconds > 0
    assert loaded.before.ram > 10_000_000
    assert loaded.before.vram is None
    assert 0 <= loaded.engine.capability.noise < 1e-4
    assert loaded.engine.capability.disagreement < 1e-4


def test_float32_means_float32(snapshot: Path):
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    load(snapshot, device="cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


@pytest.fixture
def tampered() -> Iterator[None]:
    eager = modeling_llama.eager_attention_forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output, pattern = eager(*args, **kwargs)
        return 1.01 * output, pattern

    modeling_llama.eager_attention_forward = other
    yield
    modeling_llama.eager_attention_forward = eager


@pytest.mark.usefixtures("tampered")
def test_a_family_that_computes_something_else_is_not_loaded(snapshot: Path):
    with pytest.raises(WrongNumbers, match="org/odd: raymi's attention differs from LlamaForCausalLM's own"):
        load(snapshot, name="org/odd", device="cpu")


def test_a_model_without_attention_is_not_loaded(tmp_path: Path):
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(NoSuchPlace, match="org/mamba has no attention"):
        load(tmp_path, name="org/mamba", device="cpu")


@pytest.mark.parametrize(
    ("config", "longest", "length"),
    [
        ({}, 1000, SHORTEST_CHECK),
        ({"sliding_window": 512}, 1000, 515),
        ({"sliding_window": 512}, 300, SHORTEST_CHECK),
        ({"sliding_window": None, "attention_chunk_size": 64}, 65, 67),
        ({"sliding_window": 4}, 9, SHORTEST_CHECK),
    ],
)
def test_the_check_gets_past_every_window_that_prompts_get_past(config: dict[str, Any], longest: int, length: int):
    assert check_length(type("Config", (), config)(), longest) == length


def test_devices(monkeypatch: pytest.MonkeyPatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")

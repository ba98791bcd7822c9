"""Snapshots that are whole, and hold no weights that raymi loads: what they are instead."""

from collections.abc import Collection
from pathlib import Path

from raymi import snapshot

_NAMED = {
    ".gguf": "GGUF weights, as llama.cpp takes them",
    ".h5": "TensorFlow's weights",
    ".msgpack": "Flax's weights",
    ".onnx": "ONNX weights",
    ".npz": "NumPy's arrays",
    ".mlmodel": "Core ML's weights",
    ".tflite": "TensorFlow Lite's weights",
    ".safetensors": "safetensors under another name",
    ".bin": "PyTorch's weights under another name",
    ".pth": "PyTorch's weights under another name",
    ".pt": "PyTorch's weights under another name",
    ".ckpt": "PyTorch's weights under another name",
}
"""By the end of a file's name; the most telling first."""
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "optimizer.bin", "scheduler.bin")
_ADAPTER = "adapter_config.json"


def other_weights(names: Collection[str], folder: Path | None = None) -> str | None:
    """What the weights among the files of a repository are, if there are none that `transformers` would load.

    Args:
        names: of the files.
        folder: where they are, if they are at hand.

    Returns:
        A few words; None when there are weights, or nothing that could be some.
    """
    if snapshot.weights_stem(names) is not None:
        return None
    if _ADAPTER in names:
        return f"an adapter{_base(folder)}, and no whole model"
    for end, what in _NAMED.items():
        found = sorted(name for name in names if name.endswith(end) and name not in _NO_WEIGHTS)
        if found:
            return f"{what} ({found[0]}), none that transformers loads"
    return None


def _base(folder: Path | None) -> str:
    if folder is None:
        return ""
    try:
        base = snapshot.read_json(folder / _ADAPTER).get("base_model_name_or_path")
    except (snapshot.DamagedError, OSError):
        return ""
    return f" to {base}" if isinstance(base, str) and base else ""

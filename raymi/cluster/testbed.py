"""What rows are measured on and by: numbers of one testbed are alike exactly, those of two only statistically."""

import hashlib
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymi.store.manifest import code_version, versions

if TYPE_CHECKING:
    import torch


def testbed(device: "torch.device", dtype: str) -> dict[str, Any]:
    """The row of table `testbeds` for this process and a device of it; its key is a hash of all the rest.

    Args:
        device: where the model is.
        dtype: of the model.
    """
    from raymi.sae.evaluate import DEFINITIONS

    found = versions()
    said: dict[str, Any] = {
        "device": device.type,
        "device_name": device_name(device),
        "dtype": dtype,
        "raymi": found["raymi"],
        "code": code_version(),
        "torch": found.get("torch"),
        "transformers": found.get("transformers"),
        "definitions": DEFINITIONS,
    }
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return {"testbed": hashlib.sha256(text.encode()).hexdigest()[:12], **said}


def device_name(device: "torch.device") -> str:
    """What the device calls itself: `NVIDIA H100 80GB HBM3`, `AMD EPYC 7B13`."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return (_apples() if device.type == "mps" else "") or _processor()


def _apples() -> str:
    """The chip, which is all that there is of Apple's GPU."""
    import torch

    return torch.backends.mps.get_name() if torch.backends.mps.is_available() else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine()

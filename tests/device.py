"""Where the tests of the model and sae rooms compute: on the CPU, or on what RAYMI_TESTS_DEVICE names.

`make gpu` sets it. Models that tests build are there then, and so is what a test itself makes: a tensor out of nothing,
and one of the CPU that meets one of the device in a test's own line. In raymi's lines nothing is moved: what raymi
forgets to move fails.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

NAMED = os.environ.get("RAYMI_TESTS_DEVICE", "")
DEVICE = torch.device(NAMED or "cpu")

_TESTS = str(Path(__file__).parent)


class Placed(TorchFunctionMode):
    """Tensors in tests' own lines are on one device; see above."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.place = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        caller = sys._getframe(1)
        while caller.f_back and caller.f_code.co_name == "__torch_function__":  # another mode, which passes it on
            caller = caller.f_back
        if not caller.f_code.co_filename.startswith(_TESTS):
            return func(*args, **kwargs)
        if func is Tensor.numpy:
            return args[0].cpu().numpy()
        if func in _device_constructors():
            if kwargs.get("device") is not None:
                return func(*args, **kwargs)
            if kwargs.get("generator") is not None:  # the same numbers on every device
                return func(*args, **{**kwargs, "device": kwargs["generator"].device}).to(self.place)
            return func(*args, **{**kwargs, "device": self.place})
        if len({x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()}) > 1:
            args, kwargs = tree_map(self._moved, (args, kwargs))
        return func(*args, **kwargs)

    def _moved(self, value: Any) -> Any:
        return value.to(self.place) if isinstance(value, Tensor) else value

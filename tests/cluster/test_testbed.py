"""What rows say they were measured on."""

import torch

from raymi.cluster import testbed as testbeds
from raymi.store import schemas


def test_a_testbed_is_named_by_all_that_it_says(monkeypatch):
    cpu = torch.device("cpu")
    one, same, half = (testbeds.testbed(cpu, dtype) for dtype in ("float32", "float32", "bfloat16"))
    assert one == same
    assert set(one) == set(schemas.SCHEMAS["testbeds"].names)
    assert all(one.values())
    assert (one["device"], one["torch"]) == ("cpu", torch.__version__)
    assert one["testbed"] != half["testbed"]
    for name, value in (("code_version", "0" * 16), ("_processor", "another"), ("versions", {"raymi": "9"})):
        with monkeypatch.context() as patch:
            patch.setattr(testbeds, name, lambda value=value: value)
            assert testbeds.testbed(cpu, "float32")["testbed"] != one["testbed"]


def test_a_gpu_says_its_own_name_and_not_the_processor_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert testbeds.device_name(torch.device("cuda:1")) == "GPU 1"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M9")
    assert testbeds.device_name(torch.device("mps")) == "Apple M9"

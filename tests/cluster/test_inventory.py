"""What a replica reserves, and where it fits."""

import pytest

from raymi.cluster.inventory import PROCESS_BYTES, Demand, Node, demand
from raymi.cluster.messages import Impossible
from raymi.job import make_job
from tests.cluster.fake_worker import model

GB = 10**9
LAPTOP = Node("n", "laptop", cpus=4, gpus=0, memory=16 * GB)
APPLE = Node("n", "mac", cpus=8, gpus=1, memory=16 * GB)  # Ray counts Apple's GPU; NVML does not
TWO_GPUS = Node("n", "gpus", cpus=32, gpus=2, memory=200 * GB, gpu_memory=80 * GB)


def job(device="auto", dtype="float32"):
    spec = {"kind": "knockout", "layers": 0}
    return make_job({"name": "x", "prompts": [{"text": "a"}], "experiments": [spec], "device": device, "dtype": dtype})


@pytest.mark.parametrize(
    ("node", "device", "parameters", "share", "roomy", "cpus", "gpus"),
    [
        (LAPTOP, "auto", 10**6, 1.0, False, 4, 0),
        (LAPTOP, "auto", 10**6, 0.5, False, 2, 0),
        (LAPTOP, "auto", 10**6, 0.01, False, 1, 0),
        (APPLE, "auto", 10**6, 1.0, False, 8, 0),
        (TWO_GPUS, "cpu", 10**6, 1.0, False, 8, 0),  # more threads than eight are better spent on a second replica
        (TWO_GPUS, "auto", 10**9, 1.0, False, 1, 0.08),
        (TWO_GPUS, "auto", 10**9, 1.0, True, 1, 1.0),
        (TWO_GPUS, "cuda", 10**10, 1.0, False, 1, 1.0),
        (TWO_GPUS, "cuda:1", 10**9, 1.0, False, 1, 0.08),
    ],
)
def test_demand(node, device, parameters, share, roomy, cpus, gpus):
    found = demand(model("a", parameters), node, job(device), share=share, roomy=roomy)
    assert isinstance(found, Demand)
    assert (found.cpus, found.gpus) == (cpus, gpus)
    assert PROCESS_BYTES < found.memory <= node.memory


@pytest.mark.parametrize(
    ("node", "device", "parameters", "says"),
    [
        (LAPTOP, "cuda", 10**6, "laptop has no CUDA device"),
        (APPLE, "cuda", 10**6, "mac has no CUDA device"),
        (LAPTOP, "auto", 5 * 10**9, "20.0 GB"),
        (TWO_GPUS, "auto", 2 * 10**10, "93.1 GB, a GPU of gpus has 80.0 GB"),
    ],
)
def test_what_cannot_be_is_said_with_its_numbers(node, device, parameters, says):
    found = demand(model("a", parameters), node, job(device), share=1.0, roomy=False)
    assert isinstance(found, Impossible)
    assert says in found.reason


def test_half_the_bytes_are_half_the_share():
    whole = demand(model("a", 4 * 10**9), TWO_GPUS, job(), share=1.0, roomy=False)
    half = demand(model("a", 4 * 10**9), TWO_GPUS, job(dtype="bfloat16"), share=1.0, roomy=False)
    assert isinstance(whole, Demand)
    assert isinstance(half, Demand)
    assert half.gpus < whole.gpus / 1.7


@pytest.mark.parametrize(
    ("taken", "wanted", "fits"),
    [
        ([], 1.0, True),
        ([1.0], 1.0, True),
        ([1.0, 1.0], 0.1, False),
        ([0.4, 0.4], 1.0, True),  # both on the first GPU
        ([0.6, 0.6], 0.5, False),  # 0.8 of a GPU is free, but on no single one
        ([0.6, 0.6], 0.4, True),
        ([0.3, 0.3, 0.3, 0.3], 0.7, True),
    ],
)
def test_shares_of_a_gpu_lie_on_one_gpu(taken, wanted, fits):
    node = Node("n", "gpus", cpus=32, gpus=2, memory=200 * GB, gpu_memory=80 * GB)
    node.taken = {i: Demand(1, share, GB) for i, share in enumerate(taken)}
    assert node.has_room(Demand(1, wanted, GB)) == fits


def test_a_replica_takes_the_cores_that_are_left():
    node = Node("n", "laptop", cpus=4, gpus=0, memory=16 * GB)
    node.taken = {1: Demand(3, 0.0, GB)}
    found = demand(model("a"), node, job(), share=1.0, roomy=False)
    assert isinstance(found, Demand)
    assert found.cpus == 1
    assert node.has_room(found)
    node.taken[2] = found
    assert not node.has_room(Demand(1))

"""What the nodes of a cluster have, which models lie on which, and what of it a replica takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymi.catalog import CachedModel
from raymi.cluster.frozen import Cache, Choice, choose
from raymi.cluster.messages import Impossible
from raymi.errors import UserError
from raymi.job import Job

MAX_THREADS = 8
"""More cores do not make one model's small products faster; a second replica does."""
PROCESS_BYTES = 2**30
"""What a replica takes besides weights: Python, torch, a CUDA context, one batch."""
LOOK_SECONDS = 120.0
"""For a node to say what it has. Importing what it needs takes seconds on a busy machine."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Demand:
    """What a replica reserves."""

    cpus: int = 1
    gpus: float = 0.0
    memory: int = 0
    """Bytes of RAM."""


@dataclass(slots=True)
class Node:
    """A machine of the cluster. What is free is counted here: only replicas of this run are known."""

    id: str
    host: str
    cpus: int
    gpus: int
    memory: int
    """Bytes of RAM that Ray gives out."""
    gpu_memory: int = 0
    """Bytes of its smallest CUDA device; 0 where there is none."""
    models: dict[str, CachedModel] = field(default_factory=dict[str, CachedModel])
    """By `id@revision`."""
    taken: dict[int, Demand] = field(default_factory=dict[int, Demand])
    """By replica."""

    @property
    def free_cpus(self) -> int:
        return self.cpus - sum(demand.cpus for demand in self.taken.values())

    @property
    def free_gpus(self) -> float:
        return self.gpus - sum(demand.gpus for demand in self.taken.values())

    @property
    def free_memory(self) -> int:
        return self.memory - sum(demand.memory for demand in self.taken.values())

    def has_room(self, demand: Demand) -> bool:
        """Whether `demand` fits now. Shares of a GPU must lie on one."""
        gpus = self.free_gpus if demand.gpus == 0 or demand.gpus >= 1 else self._largest_free_share()
        return demand.cpus <= self.free_cpus and demand.memory <= self.free_memory and demand.gpus <= gpus + 1e-9

    def _largest_free_share(self) -> float:
        """Ray packs shares onto the first GPU that has room; so does this count."""
        free = [1.0] * self.gpus
        for demand in sorted(self.taken.values(), key=lambda demand: -demand.gpus):
            for _ in range(math.ceil(demand.gpus)):
                at = next((i for i, room in enumerate(free) if room + 1e-9 >= min(1.0, demand.gpus)), None)
                if at is not None:
                    free[at] -= min(1.0, demand.gpus)
        return max(free, default=0.0)


def key_of(model: CachedModel) -> str:
    """What names a snapshot on every node."""
    return f"{model.id}@{model.revision}"


def demand(model: CachedModel, node: Node, job: Job, *, share: float, roomy: bool) -> Demand | Impossible:
    """What a replica of `model` reserves on `node`.

    Args:
        model: the model.
        node: where it would run.
        job: for dtype and device.
        share: this model's part of all work that is left.
        roomy: less than a whole GPU, or the usual memory, was too little.
    """
    weights = _weights(model, job.dtype)
    wants_gpu = job.device.startswith("cuda") or (job.device == "auto" and node.gpu_memory > 0)
    if wants_gpu and not node.gpu_memory:
        return Impossible(f"device {job.device}, but {node.host} has no CUDA device")
    if wants_gpu:
        need = weights * 1.15 + PROCESS_BYTES
        if need > node.gpu_memory:
            return Impossible(f"needs about {_gb(need)}, a GPU of {node.host} has {_gb(node.gpu_memory)}")
        part = math.ceil(100 * need / node.gpu_memory) / 100
        return Demand(1, 1.0 if roomy or part > 0.5 else part, min(node.memory, PROCESS_BYTES + weights))
    if weights > node.memory:
        return Impossible(f"its weights take {_gb(weights)}, {node.host} has {_gb(node.memory)}")
    memory = min(node.memory, PROCESS_BYTES + math.ceil(weights * (3 if roomy else 1.5)))
    deserved = max(1, min(MAX_THREADS, round(share * node.cpus)))
    return Demand(max(1, min(deserved, node.free_cpus)), 0.0, memory)


def survey() -> list[Node]:
    """The nodes that are alive."""
    nodes = [_node(each) for each in ray.nodes() if each["Alive"]]
    probes = {_gpu_memory.options(scheduling_strategy=_on(node.id)).remote(): node for node in nodes if node.gpus}
    ready, _ = ray.wait(list(probes), num_returns=len(probes), timeout=LOOK_SECONDS) if probes else ([], [])
    for probe in ready:
        probes[probe].gpu_memory = ray.get(probe)
    return nodes


def choose_here(nodes: Sequence[Node], choice: Choice) -> None:
    """Notes that the driver's own models lie on the only node."""
    for node in nodes:
        node.models = {key_of(model): model for model in choice.models}


def choose_everywhere(nodes: Sequence[Node], job: Job, cache: Cache, commits: dict[str, str]) -> Choice:
    """The models that a job names, on every node of a cluster that has any of them.

    Raises:
        UserError: no node has any.
    """
    choices: list[Choice] = []
    refusals: list[UserError] = []
    for node in nodes:
        look = _choose.options(scheduling_strategy=_on(node.id)).remote(job, cache, {**commits})
        try:
            found = ray.get(look, timeout=LOOK_SECONDS)
        except RayError as error:
            refusals.append(UserError(f"{node.host} did not say which models it has: {error}"))
            continue
        if isinstance(found, str):
            refusals.append(UserError(f"{node.host}: {found}"))
            continue
        node.models = {key_of(model): model for model in found.models}
        commits = {**found.commits, **commits}  # the next nodes are asked for the same commits
        choices.append(found)
    if not choices:
        raise refusals[0] if refusals else UserError("the cluster has no node")
    models = {key_of(model): model for choice in choices for model in choice.models}
    present = {model.id for model in models.values()}
    rejected = {each.model_id: each for choice in choices for each in choice.rejected if each.model_id not in present}
    return Choice(list(models.values()), list(rejected.values()), commits)


def place(node: Node) -> NodeAffinitySchedulingStrategy:
    """On this node or nowhere."""
    return _on(node.id)


def _on(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _node(record: dict[str, object]) -> Node:
    resources = record["Resources"]
    assert isinstance(resources, dict)
    return Node(
        id=str(record["NodeID"]),
        host=str(record["NodeManagerHostname"]),
        cpus=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)),
        memory=int(resources.get("memory", 0)),
    )


@ray.remote(num_cpus=0, max_retries=0)
def _gpu_memory() -> int:
    """Bytes of the smallest CUDA device, without making a CUDA context; 0 when there is none (Apple's GPUs count)."""
    from ray._private.thirdparty import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return min((int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles), default=0)
    except pynvml.NVMLError:
        return 0


@ray.remote(num_cpus=0, max_retries=0)
def _choose(job: Job, cache: Cache, commits: dict[str, str]) -> Choice | str:
    try:
        return choose(job, cache, commits)
    except UserError as error:
        return str(error)


def _weights(model: CachedModel, dtype: str) -> int:
    """Bytes of the weights, as they are loaded."""
    return model.parameters * _BYTES[dtype] if model.parameters else 2 * model.size_on_disk


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"

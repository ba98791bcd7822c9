"""Whether a replica's process stays near what --dry-run says of it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MEASURE = """
import sys
from pathlib import Path
from raymi import catalog
from raymi.cluster import rehearsal
from raymi.cluster.tokenised import from_rows
from raymi.cluster.worker import Worker
from raymi.experiments.autoencoders.resolve import refs
from raymi.job import load_job, make_job
from raymi.model.memory import peak_ram
from raymi.plan.estimate import estimate
from raymi.plan.units import units

LONG = {  # several prompts of some hundred tokens, each with fewer ablations than fill a batch
    "name": "long",
    "models": sys.argv[1],
    "prompts": [{"text": f"{n} " + "and then there was more of it " * 90} for n in ("One", "Two", "Six", "Ten")],
    "experiments": [{"kind": "knockout", "layers": {"each": "all"}, "heads": "all", "keys": "first"}],
}
MANY = LONG | {  # prompts that share their clean runs and sweeps
    "name": "many",
    "prompts": [{"text": f"{n} and then there was some more of it" + " again" * (n % 4)} for n in range(1000, 1400)],
    "experiments": [{"kind": "knockout", "layers": "middle", "heads": "all", "keys": "first"}],
}
own = {"long": LONG, "many": MANY}
job = make_job(own[sys.argv[3]]) if sys.argv[3] in own else load_job(Path("jobs/demo.yaml"))
model = catalog.find(sys.argv[1], Path(sys.argv[2]))
worker = Worker(model, job, cache_dir=Path(sys.argv[2]), threads=2)
tables = worker.prepare()
prompts = {prompt.prompt.id: prompt for prompt in from_rows(tables["prompts"].to_pylist())}
saes = refs(tables["saes"].to_pylist())
cut = [
    unit
    for spec in job.experiments
    for unit in units(job, spec, model, list(prompts.values()), saes=saes.get(spec.name, ()))
]
assert isinstance(worker.load(), dict)
assert len(list(worker.run(cut))) == len(cut)
print(peak_ram(), estimate(job, model, cut, prompts, rehearsal.measure()).peak_bytes)
"""


SMOL = "SmolLM2-135M-Instruct-Q4_1"


@pytest.mark.parametrize(
    ("name", "job"),
    [
        ("glassllm-en", "demo"),
        pytest.param(SMOL, "demo", marks=pytest.mark.slow),
        pytest.param(SMOL, "long", marks=pytest.mark.slow),
        pytest.param(SMOL, "many", marks=pytest.mark.slow),
    ],
)
def test_peak_memory_is_within_a_quarter_of_the_estimate(
    name: str, job: str, demo_models: object, demo_cache: Path
) -> None:
    command = [sys.executable, "-c", MEASURE, f"raymi-demo/{name}", str(demo_cache), job]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, estimated = map(int, said.stdout.split()[-2:])
    assert 0.75 <= peak / estimated <= 1.25, (peak, estimated)

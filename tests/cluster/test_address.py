"""Joining a cluster: models are found where they lie, and a node may die."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import raymi.store
from tests.cluster.test_kill import JOB, TEXTS
from tests.fakes import LLAMA, add_model, llama_shapes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def cluster():
    """A head without cores and two nodes with two cores each, that notice the death of a node in seconds."""
    from ray.cluster_utils import Cluster

    fast = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 6}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": fast})
    yield cluster
    cluster.shutdown()


def test_a_run_joins_a_cluster_and_outlives_one_of_its_nodes(cluster, tmp_path: Path):
    config = LLAMA | {"num_hidden_layers": 4}
    for name in ("one", "two", "three"):
        add_model(tmp_path / "cache", f"tiny/{name}", config, tensors=llama_shapes(config))
    prompts = "\n".join(f'  - {{id: p{i}, text: "{text}", answer: " Paris"}}' for i, text in enumerate(TEXTS))
    (tmp_path / "job.yaml").write_text(JOB.format(prompts=prompts))
    nodes = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
    arguments = ["run", "job.yaml", "--store", "store", "--cache-dir", str(tmp_path / "cache")]
    run = subprocess.Popen(
        [sys.executable, "-m", "raymi", *arguments, "--address", cluster.address],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = ""
    assert run.stdout is not None
    while "loading" not in seen:
        line = run.stdout.readline()
        assert line, seen
        seen += line
    time.sleep(2)
    cluster.remove_node(nodes[0], allow_graceful=False)
    output = seen + run.communicate(timeout=400)[0]
    assert run.returncode == 0, output
    rows = raymi.store.open(str(tmp_path / "store")).scan("ablations").collect()
    assert rows.height == rows["ablation_id"].n_unique() == 3 * len(TEXTS) * 16
    lost = raymi.store.open(str(tmp_path / "store")).scan("events").filter(kind="lost").collect()
    assert lost["message"].str.contains("node: ").all(), lost["message"].to_list()

"""Kill anything at any moment: the same command goes on where it stopped, to the rows of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest

import raymi.store
from tests.fakes import LLAMA, add_model, llama_shapes

VICTIM = Path(__file__).with_name("victim.py")
ROOT = VICTIM.parents[2]
N_UNITS = 208
JOB = """
name: killed
models: tiny/*
prompts:
{prompts}
experiments:
  - {{kind: knockout, name: heads, layers: {{each: all}}, heads: {{each: all}}, queries: last, keys: first}}
unit_ablations: 1
verify: 2
"""
TEXTS = [
    f"The {what} of {where} is"
    for what in ("capital", "Paris", "Rome")
    for where in ("France", "Spain", "Italy", "Peru")
]


@dataclass
class Bench:
    """A cache with one tiny model, a job of 208 units on it, and commands that run it."""

    folder: Path

    def __post_init__(self) -> None:
        config = LLAMA | {"num_hidden_layers": 4}
        add_model(self.folder / "cache", "tiny/llama", config, tensors=llama_shapes(config))
        texts = [*TEXTS, "the capital of Peru was"]
        prompts = "\n".join(f'  - {{id: p{i}, text: "{text}", answer: " Paris"}}' for i, text in enumerate(texts))
        (self.folder / "job.yaml").write_text(JOB.format(prompts=prompts))

    def start(self, store: str, how: str = "none", n: int = 0, *more: str, **env: str) -> subprocess.Popen[str]:
        arguments = ["run", "job.yaml", "--store", store, "--cache-dir", "cache", *more]
        return subprocess.Popen(
            [sys.executable, str(VICTIM), how, str(n), str(self.folder / "pids"), "--", *arguments],
            cwd=self.folder,
            env=self.environment() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C goes to a process group
        )

    def run(self, store: str, how: str = "none", n: int = 0, *more: str, **env: str) -> tuple[int, str]:
        process = self.start(store, how, n, *more, **env)
        output, _ = process.communicate(timeout=170)
        return process.returncode, output

    def environment(self) -> dict[str, str]:
        """A user's own, with nothing said to Ray: what raymi tells it by itself is what is tested."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {"PYTHONPATH": str(ROOT), "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}

    def rows(self, store: str) -> pl.DataFrame:
        return raymi.store.open(str(self.folder / store)).scan("ablations").sort("ablation_id").collect()

    def processes(self) -> list[psutil.Process]:
        """Those that the last victim had started, and that are still there."""
        pids = [int(pid) for pid in (self.folder / "pids").read_text().split()]
        alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("kill"))
    code, output = bench.run("whole", "none", 0, "--inline")
    assert code == 0, output
    assert bench.rows("whole").height == N_UNITS
    return bench


def assert_as_undisturbed(bench: Bench, store: str) -> None:
    """The same keys, none lost and none twice, and the same floats to the tolerance of float32."""
    rows, whole = bench.rows(store), bench.rows("whole")
    for key in ("ablation_id", "unit_id", "prompt_id", "layer", "head"):
        assert rows[key].to_list() == whole[key].to_list()
    for column in (name for name, kind in whole.schema.items() if kind == pl.Float64):
        a, b = rows[column].to_numpy(), whole[column].to_numpy()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=column)
    # A plain reader sees the same: nothing half written, no file that does not count.
    files = bench.folder / store / "ablations" / "**" / "*.parquet"
    assert pl.scan_parquet(files).select("ablation_id").collect().height == N_UNITS


def wait_for_end(bench: Bench, seconds: float = 20) -> list[psutil.Process]:
    """That nothing which a killed driver had started outlives it.

    Returns:
        The two agents of its raylet: they go too, but first try for a minute to tell the cluster, which is gone.
    """
    until = time.monotonic() + seconds
    processes = bench.processes()
    agents = [process for process in processes if "Agent" in process.name() or "DashboardA" in process.name()]
    assert_gone([process for process in processes if process not in agents], until)
    return agents


def assert_gone(processes: list[psutil.Process], until: float) -> None:
    _, left = psutil.wait_procs(processes, timeout=max(0.0, until - time.monotonic()))
    left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    assert not left


def kill_and_go_on(bench: Bench, store: str, hows: list[str], rng: random.Random) -> list[psutil.Process]:
    """Issues the command again and again, each time with another death, until nothing disturbs it.

    Args:
        bench: where.
        store: a new one.
        hows: ways to die (see `victim`); `inline` after one of them means without Ray.
        rng: says at which unit.

    Returns:
        What `wait_for_end` says takes a minute to go.
    """
    agents: list[psutil.Process] = []
    for how, *inline in (each.split() for each in hows):
        n = rng.randint(1, 30)  # so that all deaths find their unit
        print(f"kill: {how} at unit {n}")
        before = bench.rows(store).height if (bench.folder / store).exists() else 0
        code, output = bench.run(store, how, n, *(f"--{word}" for word in inline))
        after = bench.rows(store).height
        if how == "replica":
            assert code == 0, output
            assert "replica lost" in output
            break
        assert code == -signal.SIGKILL, output
        if how == "flushed":
            assert after >= before + n
        assert after < N_UNITS
        agents += wait_for_end(bench)
    else:
        code, output = bench.run(store)
        assert code == 0, output
    assert_as_undisturbed(bench, store)
    assert not (bench.folder / ".ray").exists(), "Ray wrote its token into the home directory"
    return agents


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_kills(bench):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    kill_and_go_on(bench, "four", ["driver inline", "write inline", "flushed", "replica"], random.Random(seed))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("round", range(4))
def test_twenty_kills(bench, round):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    hows = ["flushed", "flushed", "driver", "write" if round < 2 else "flushed"]
    rng.shuffle(hows)
    agents = kill_and_go_on(bench, f"twenty{round}", [*hows, "replica"], rng)
    assert_gone(agents, time.monotonic() + 120)


def test_a_finished_run_does_nothing_quickly(bench):
    began = time.monotonic()
    code, output = bench.run("whole")
    assert (code, "nothing to do" in output) == (0, True), output
    assert time.monotonic() - began < 20  # Ray alone takes ten; imports on a busy machine some
    assert "tokenising" not in output


@pytest.mark.timeout(300)
def test_ctrl_c_reaches_every_process_and_loses_nothing(bench):
    code, output = bench.run("interrupted", "interrupt", 20)
    assert code == 130, output
    assert "The same command goes on" in output
    assert "raymi run job.yaml --store interrupted" in output
    assert "replica lost" not in output
    assert 20 <= bench.rows("interrupted").height < N_UNITS
    wait_for_end(bench)
    code, output = bench.run("interrupted", "none", 0, "--inline")
    assert code == 0, output
    assert_as_undisturbed(bench, "interrupted")


@pytest.mark.parametrize(("how", "expected"), [("terminate", 143), ("twice", 130)])
def test_signals_have_their_exit_codes_and_what_was_measured_is_kept(bench, how, expected):
    code, output = bench.run(how, how, 20, "--inline")
    assert code == expected, output
    assert "Traceback" not in output
    assert 20 <= bench.rows(how).height < N_UNITS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("where", ["--inline", pytest.param("--device=cpu", marks=pytest.mark.slow, id="ray")])
def test_a_driver_that_slept_finds_its_run_taken_and_writes_nothing(bench, where):
    store = f"slept{where}"
    sleeper = bench.start(store, "stop", 20, where, RAYMI_HEARTBEAT_SECONDS="0.2")
    try:
        wait_until_stopped(sleeper.pid)
        code, output = bench.run(store, "none", 0, "--inline")
        if code == 2:  # its heart may have beaten a moment ago
            assert "is being driven by" in output
            time.sleep(2)
            code, output = bench.run(store, "none", 0, "--inline")
        assert code == 0, output
        os.kill(sleeper.pid, signal.SIGCONT)
        output, _ = sleeper.communicate(timeout=100)
    finally:
        sleeper.kill()
    assert sleeper.returncode == 2, output
    assert "was taken over" in output
    assert "Traceback" not in output
    wait_for_end(bench)
    assert_as_undisturbed(bench, store)


def wait_until_stopped(pid: int, seconds: float = 100) -> None:
    until = time.monotonic() + seconds
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < until, "it never came to its stop"
        time.sleep(0.1)

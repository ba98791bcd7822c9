"""Starting a Ray of one's own, or joining one that is there."""

import contextlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raymi.errors import UserError

OBJECT_STORE_BYTES = 200 * 2**20
"""Only rows pass through it, a few at a time."""
KNOCK_SECONDS = 10.0
_SOCKET_PATH = len("/ray/session_2026-11-22_11-51-11_584486_1234567/sockets/plasma_store")
_LONGEST_SOCKET_PATH = 107
_TOKEN_FILE = Path("~/.ray/auth_token")


@contextlib.contextmanager
def session(address: str | None = None) -> Iterator[None]:
    """A Ray session, ended on leaving. To be entered from the main thread: Ray's processes die with it.

    Args:
        address: `auto` or `host:port` of a cluster to join; None starts Ray on this machine, for this process only.

    Raises:
        UserError: no such cluster, or an address of a kind that loses runs.
    """
    if address and address.startswith("ray://"):
        raise UserError(
            f"{address} is a Ray Client address, and a run would end whenever its connection does",
            hint="Run raymi on the cluster: `ray job submit --address http://HEAD:8265 -- raymi run JOB.yaml "
            "--address auto`, or `ray attach cluster.yaml` and raymi run there.",
        )
    if address and address != "auto":
        _knock(address)
    _environment(joins=address is not None)
    import ray  # reads its environment when it is imported
    from ray.exceptions import AuthenticationError

    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",  # else a stale file of another cluster decides
                num_cpus=cores(),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=_temp_dir(),
            )
    except (ConnectionError, ValueError, RuntimeError, AuthenticationError) as error:
        if address is None:
            raise
        raise UserError(
            f"no Ray cluster can be joined at {address}: {error}",
            hint="Without --address raymi starts Ray on this machine. A cluster with token authentication needs "
            "RAY_AUTH_MODE=token and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """That somebody listens at `host:port`: Ray itself would try for many minutes, and not say so."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"{address!r} is no address of a Ray cluster", hint="Allowed: auto or host:port, as in 10.0.0.5:6379."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster can be joined at {address}: {error.strerror or error}",
            hint="`ray status --address ADDRESS` asks it. Without --address raymi starts Ray on this machine.",
        ) from error


def cores() -> int:
    """CPUs that this process may use: what Ray counts by itself is all of the host's, in a container too."""
    return (
        max(1, min(len(os.sched_getaffinity(0)), _quota())) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def _quota() -> int:
    """The container's limit (cgroup v2) in whole cores, or many."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return 2**16 if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return 2**16


def _environment(*, joins: bool) -> None:
    """What Ray must be told before it is imported. What the user has set is left as it is."""
    defaults = {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would upload the working directory
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # what Ray prints of lost workers, on stdout: raymi says it itself
        "POLARS_MAX_THREADS": "2",  # in the replicas, which inherit it: their cores are for torch
    }
    # A Ray of our own listens on every interface, so it needs a token. Left alone, Ray would write one into
    # ~/.ray/auth_token, where it changes what other Ray commands of the user do; ours lives in memory and dies with us.
    # A cluster that is joined says itself what it wants; Ray sends the token of that file only in token mode.
    if not joins and "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
        defaults |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    elif joins and ("RAY_AUTH_TOKEN" in os.environ or _TOKEN_FILE.expanduser().exists()):
        defaults |= {"RAY_AUTH_MODE": "token"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _temp_dir() -> str | None:
    """Where Ray keeps its sockets, whose paths have a length that the system limits; None is Ray's own choice."""
    wanted = os.environ.get("RAY_TMPDIR")
    folder = wanted or tempfile.gettempdir()
    if len(folder.rstrip("/")) + _SOCKET_PATH <= _LONGEST_SOCKET_PATH:
        return None
    if wanted:
        longest = _LONGEST_SOCKET_PATH - _SOCKET_PATH
        raise UserError(f"RAY_TMPDIR={wanted} is too long for Ray's sockets", hint=f"At most {longest} characters.")
    return "/tmp/ray"

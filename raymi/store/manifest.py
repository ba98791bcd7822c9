"""What a run is: the jobs behind it, what was frozen when first seen, who drives it, and on what."""

import functools
import hashlib
import os
import platform
import secrets
import socket
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, Field, ValidationError, field_validator

import raymi
from raymi.errors import UserError
from raymi.store.schemas import SCHEMA_VERSION
from raymi.store.secret import scrub

Status = Literal["running", "interrupted", "failed", "done"]

_LIBRARIES = ("raymi", "torch", "transformers", "ray", "polars")


def now() -> datetime:
    return datetime.now(UTC)


class Issue(BaseModel):
    """The job of a command that was issued on the run."""

    issued_at: datetime = Field(default_factory=now)
    written: str
    """The job file's own text."""
    resolved: dict[str, Any]
    """Every field, defaults included."""

    @field_validator("resolved")
    @classmethod
    def _has_what_is_looked_up(cls, resolved: dict[str, Any]) -> dict[str, Any]:
        _Looked.model_validate(resolved)
        return resolved


class _LookedPrompt(BaseModel, extra="forbid"):
    id: str
    text: str = ""
    answer: str | None = None
    wrong: str | None = None
    subject: str | None = None


class _LookedExperiment(BaseModel):
    name: str
    measure: str | None = None


class _Looked(BaseModel):
    """What is looked up in the jobs of a manifest, which may have been damaged."""

    prompts: list[_LookedPrompt] = []
    experiments: list[_LookedExperiment] = []


class Driver(BaseModel):
    """The process that drives a run, told apart from any later one that is given the same pid."""

    host: str = Field(default_factory=socket.gethostname)
    pid: int = Field(default_factory=os.getpid)
    process_started: float = Field(default_factory=lambda: psutil.Process().create_time())
    """Seconds since 1970."""
    started_at: datetime = Field(default_factory=now)
    """When it took the run."""
    heartbeat: float
    """Seconds between two signs of life."""
    token: str = Field(default_factory=lambda: secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.started_at:%Y-%m-%d %H:%M:%S} UTC"

    def process_is_gone(self) -> bool:
        """Known for this host only: False where nothing can be known."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.process_started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Manifest(BaseModel):
    """`runs/<run>/manifest.json`, and one a driver in `runs/<run>/epochs`."""

    schema_version: int = SCHEMA_VERSION
    run: str
    created_at: datetime = Field(default_factory=now)
    status: Status = "running"
    status_at: datetime = Field(default_factory=now)
    jobs: list[Issue] = []
    """One for each command that brought a job other than the one before."""
    taken: int | None = None
    """How many of the job's prompts the last command took, where that was a few of them; None: all."""
    cut_rule: dict[str, int] = {}
    """How units are cut: frozen by the first command."""
    commits: dict[str, str] = {}
    """Model id -> revision, frozen when first seen."""
    generations: list[list[str]] = []
    """Prompt ids in the order first seen; each list holds those that one command added."""
    versions: dict[str, str] = Field(default_factory=lambda: versions())
    code: str = Field(default_factory=lambda: code_version())
    """Hash of raymi's own source."""
    hardware: dict[str, Any] = Field(default_factory=lambda: hardware())
    """Of the driver's machine."""
    epoch: int
    driver: Driver
    accepted: list[str] = []
    """Files of earlier epochs that hold; whoever wrote any other had lost the run."""
    live: list[str] | None = None
    """Exactly the files that hold, from a compaction on; None: the accepted ones and all of this epoch."""

    def follow(self, issue: Issue, cut_rule: Mapping[str, Any]) -> None:
        """Notes the job of one more command, and that this code on this machine goes on with the run."""
        if not self.jobs or self.jobs[-1].resolved != issue.resolved:
            self.jobs.append(issue)
        self.cut_rule = self.cut_rule or dict(cut_rule)
        self.versions, self.code, self.hardware = versions(), code_version(), hardware()
        self.set_status("running")

    def set_status(self, status: Status) -> None:
        self.status, self.status_at = status, now()

    def freeze_commits(self, commits: Mapping[str, str]) -> None:
        """Adds models; one that is known keeps the revision it was first seen with."""
        self.commits = {**commits, **self.commits}

    def add_prompts(self, prompt_ids: Iterable[str]) -> None:
        """Adds the prompts that are new, as one generation."""
        known = {prompt for generation in self.generations for prompt in generation}
        if new := [prompt for prompt in dict.fromkeys(prompt_ids) if prompt not in known]:
            self.generations.append(new)

    def as_bytes(self) -> bytes:
        return scrub(self.model_dump_json(indent=1)).encode()


class NoManifest(UserError):
    """What stands where a manifest should is none."""


def parse(data: bytes, where: str) -> Manifest:
    """The manifest in `data`.

    Raises:
        NoManifest: it is none.
        UserError: a newer raymi wrote it.
    """
    try:
        version = _Version.model_validate_json(data)
        if version.schema_version <= SCHEMA_VERSION:
            return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise NoManifest(
            f"{where} is not a manifest: {field}: {first['msg']}",
            hint="Put back a good copy of it, or move the folder of this run out of `runs`.",
        ) from error
    wrote = version.versions.get("raymi", "a newer version")
    raise UserError(
        f"{where} has schema {version.schema_version}; this raymi ({raymi_version()}) reads up to {SCHEMA_VERSION}",
        hint=f"It was written by raymi {wrote}: install that one or a later one, or choose another --store.",
    )


class _Version(BaseModel):
    """The part of a manifest that every version of raymi can read."""

    schema_version: int
    versions: dict[str, str] = {}


def raymi_version() -> str:
    return metadata.version("raymi")


@functools.cache
def versions() -> dict[str, str]:
    """Of the libraries that numbers depend on, from their metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found.setdefault(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_version() -> str:
    """First 16 hexadecimal digits of the SHA-256 of raymi's source files, installed or checked out."""
    root = Path(raymi.__path__[0])
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def hardware() -> dict[str, Any]:
    """Platform, cores and RAM (bytes) of this machine. Never environment variables."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "ram": psutil.virtual_memory().total,
    }

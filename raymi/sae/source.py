"""Where an autoencoder's files are: in a folder, or in a Hugging Face cache under a repository's id and a path."""

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from raymi import paths
from raymi.catalog import default_cache
from raymi.errors import UserError, quoted

_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?(?::(?P<path>.*))?")


@dataclass(frozen=True, slots=True)
class Source:
    """A folder that may hold one autoencoder."""

    folder: Path
    repo: str | None = None
    revision: str | None = None
    path: str = ""
    """Of the folder in the repository, with slashes."""

    def __str__(self) -> str:
        return str(self.folder) if self.repo is None else f"{self.repo}:{self.path}" if self.path else self.repo

    @property
    def place(self) -> str:
        """Repository and path, in which some formats say which layer and site they belong to."""
        return f"{self.repo}/{self.path}" if self.repo else self.folder.absolute().as_posix()

    @property
    def root(self) -> Path:
        """The repository's snapshot; for a local folder, its parent."""
        if self.repo is None:
            return self.folder.parent
        return self.folder.parents[self.path.count("/")] if self.path else self.folder

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    @property
    def above(self) -> "Source":
        """The folder that this one is in."""
        return Source(self.folder.parent, self.repo, self.revision, self.path.rpartition("/")[0])

    def below(self, path: str) -> "Source":
        """A folder below this one."""
        joined = "/".join(part for part in (self.path, path) if part and part != ".")
        return Source(self.folder / path, self.repo, self.revision, joined)


@dataclass(frozen=True, slots=True)
class Config:
    """A JSON object that an autoencoder comes with, and which complains about itself by name."""

    file: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Config":
        try:
            values = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{file}: no such file") from None
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"{file}: cannot be read as JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{file}: expected a JSON object")
        return cls(file, cast(dict[str, Any], values))

    def part(self, key: str) -> "Config":
        """A nested object; empty where there is none."""
        return Config(self.file, self._typed(key, dict, "an object") or {})

    def text(self, key: str) -> str | None:
        return self._typed(key, str, "text")

    def integer(self, key: str) -> int | None:
        return self._typed(key, int, "a whole number")

    def flag(self, key: str, default: bool) -> bool:
        found = self._typed(key, bool, "true or false")
        return default if found is None else found

    def number(self, key: str) -> float | None:
        found = self._typed(key, (int, float), "a number")
        return None if found is None else float(found)

    def refuse(self, key: str, allowed: str) -> UserError:
        return UserError(f"{self.file}: {key} is {quoted(self.values.get(key))}; raymi knows {allowed}")

    def _typed(self, key: str, kind: Any, expected: str) -> Any:
        value = self.values.get(key)
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        raise UserError(f"{self.file}: {key}: expected {expected}, found {quoted(value)}")


def locate(where: str | Path, *, cache_dir: Path | None = None) -> Source:
    """Finds what a user points at: a folder, a file in it, or `repo[@revision][:path]` in the cache.

    Raises:
        UserError: when there is no such thing; it names what comes near.
    """
    local = paths.at_home(where)
    if paths.exists(local):
        return Source(local if local.is_dir() else local.parent)
    match = _REPO.fullmatch(str(where)) if isinstance(where, str) else None
    if match is None:
        raise UserError(f"there is no folder or file {str(where)!r}", hint="A repository is written org/name:path.")
    repo = cached(match["repo"], match["revision"], cache_dir)
    path = (match["path"] or "").strip("/")
    inside = repo.below(path) if path else repo
    if not paths.exists(inside.folder):
        raise UserError(
            f"{match['repo']} has no {path!r} in the cache", hint=f"`raymi sae fetch {where}` downloads it."
        )
    return inside if inside.folder.is_dir() else repo.below(str(Path(path).parent.as_posix()))


def repositories(cache_dir: Path | None = None) -> list[str]:
    """The ids of all model repositories in the cache; SAEs are kept in such."""
    folders = (cache_dir or default_cache()).expanduser().glob("models--*--*")
    return sorted(path.name.removeprefix("models--").replace("--", "/", 1) for path in folders if path.is_dir())


def cached(repo: str, revision: str | None = None, cache_dir: Path | None = None) -> Source:
    """A repository's snapshot in the cache: the one asked for, else the one that refs/main points to, else the newest.

    Args:
        repo: its id.
        revision: a branch, a tag, a commit or the beginning of one.
        cache_dir: the cache; by default the one HF_HOME names.

    Raises:
        UserError: when it is not there.
    """
    cache = (cache_dir or default_cache()).expanduser()
    folder = cache / f"models--{repo.replace('/', '--')}"
    if not paths.is_dir(folder):
        near = get_close_matches(repo, repositories(cache_dir), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"`raymi sae fetch {repo}:PATH` downloads from it."
        raise UserError(f"no repository {repo!r} in {cache}", hint=hint)
    ref = folder / "refs" / (revision or "main")
    named = ref.read_text(errors="replace").strip() if paths.is_file(ref) else revision
    snapshots = folder / "snapshots"
    there = snapshots.iterdir() if snapshots.is_dir() else ()
    commits = sorted(
        (c for c in there if c.name.startswith(named or "") and c.is_dir()), key=lambda c: c.stat().st_mtime
    )
    if not commits:
        raise UserError(f"{repo} has no revision {revision or 'main'!r} in {cache}")
    return Source(commits[-1], repo, commits[-1].name)

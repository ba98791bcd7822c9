"""Whole objects by key, in a folder or in a bucket: put, create once, get, list, delete.

An object is there whole or not at all.
"""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError

from raymi.errors import UserError

_UNFINISHED = ".tmp-"
"""Prefix of what is still being written: hidden, and with no suffix, so that no `*.parquet` glob matches it."""


class Entry(NamedTuple):
    key: str
    """Relative to the store, with forward slashes."""
    size: int
    """Bytes."""
    modified: float
    """Seconds since 1970, by the clock of the store."""


class Objects(Protocol):
    """What a store needs of the place that it is kept in. Everything raises `UserError` when the place refuses."""

    def uri(self, key: str) -> str:
        """Where Polars finds the object."""
        ...

    def put(self, key: str, data: bytes) -> None: ...

    def create(self, key: str, data: bytes) -> bool:
        """Puts unless the key is taken: of any number of callers at once, exactly one gets True."""
        ...

    def get(self, key: str) -> bytes | None: ...

    def head(self, key: str) -> Entry | None: ...

    def entries(self, prefix: str) -> list[Entry]:
        """What stands under the folder `prefix`, at any depth, by key; unfinished writes are not listed."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes; what is not there is no error."""
        ...

    def sweep(self, prefix: str) -> None:
        """Removes what killed writers left unfinished under the folder `prefix`."""
        ...


def connect(uri: str) -> Objects:
    """The place that a path or URI names; nothing is made before the first put.

    Raises:
        UserError: it can be no store.
    """
    if "://" in uri and not uri.startswith("file://"):
        return RemoteObjects(uri)
    root = Path(uri.removeprefix("file://")).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise UserError(f"the store {root} is a file", hint="A store is a folder or an object-store URI.")
    return LocalObjects(root)


class LocalObjects:
    """A folder. Durable too: file and folder are synced before a put returns."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def uri(self, key: str) -> str:
        return str(self.root / key)

    def put(self, key: str, data: bytes) -> None:
        with self._written(key, data) as (unfinished, path):
            os.replace(unfinished, path)

    def create(self, key: str, data: bytes) -> bool:
        with self._written(key, data) as (unfinished, path):
            try:
                os.link(unfinished, path)
            except FileExistsError:
                return False
            except FileNotFoundError:
                # Who won the key has swept what the others were writing.
                if path.exists():
                    return False
                raise
        return True

    def get(self, key: str) -> bytes | None:
        with self._refusal("read"):
            try:
                return (self.root / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def head(self, key: str) -> Entry | None:
        with self._refusal("read"):
            try:
                return self._entry(self.root / key)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def entries(self, prefix: str) -> list[Entry]:
        found: list[Entry] = []
        for path in self._files(prefix):
            with contextlib.suppress(FileNotFoundError):  # another process may be deleting
                if not path.name.startswith("."):
                    found.append(self._entry(path))
        return found

    def delete(self, keys: Iterable[str]) -> None:
        with self._refusal("write to"):
            for key in keys:
                (self.root / key).unlink(missing_ok=True)

    def sweep(self, prefix: str) -> None:
        with self._refusal("write to"):
            for path in self._files(prefix):
                if path.name.startswith(_UNFINISHED):
                    path.unlink(missing_ok=True)

    def _files(self, prefix: str) -> list[Path]:
        with self._refusal("read"):
            return sorted(path for path in (self.root / prefix).rglob("*") if path.is_file())

    def _entry(self, path: Path) -> Entry:
        stat = path.stat()
        return Entry(path.relative_to(self.root).as_posix(), stat.st_size, stat.st_mtime)

    @contextlib.contextmanager
    def _written(self, key: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """(synced hidden file of `data` beside its place, its place); what the caller does with them is synced too."""
        path = self.root / key
        unfinished = path.with_name(_UNFINISHED + secrets.token_hex(8))
        with self._refusal("write to"):
            _make_folder(path.parent)
            try:
                with unfinished.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield unfinished, path
            finally:
                unfinished.unlink(missing_ok=True)
            _sync_folder(path.parent)

    @contextlib.contextmanager
    def _refusal(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot {verb} the store {self.root}: {error.strerror or error}",
                hint="Choose another with --store, or mend this one and issue the command again.",
            ) from error


def _make_folder(folder: Path) -> None:
    """`mkdir -p`, with every new name synced into its parent."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteObjects:
    """A bucket, or a part of one. Credentials come from the environment, as obstore and Polars both read it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")
        with self._refusal():
            self._store = obstore.store.from_url(self._uri)

    def __str__(self) -> str:
        return self._uri

    def uri(self, key: str) -> str:
        return f"{self._uri}/{key}"

    def put(self, key: str, data: bytes) -> None:
        with self._refusal():
            obstore.put(self._store, key, data)

    def create(self, key: str, data: bytes) -> bool:
        with self._refusal():
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def get(self, key: str) -> bytes | None:
        with self._refusal():
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except (NotFoundError, FileNotFoundError):
                return None

    def head(self, key: str) -> Entry | None:
        with self._refusal():
            try:
                meta = obstore.head(self._store, key)
            except (NotFoundError, FileNotFoundError):
                return None
        return Entry(key, meta["size"], meta["last_modified"].timestamp())

    def entries(self, prefix: str) -> list[Entry]:
        with self._refusal():
            metas = [meta for chunk in obstore.list(self._store, prefix) for meta in chunk]
        return sorted(Entry(meta["path"], meta["size"], meta["last_modified"].timestamp()) for meta in metas)

    def delete(self, keys: Iterable[str]) -> None:
        with self._refusal():
            for key in keys:
                with contextlib.suppress(NotFoundError, FileNotFoundError):
                    obstore.delete(self._store, key)

    def sweep(self, prefix: str) -> None:
        """Nothing to do: an upload that was broken off is not visible."""

    @contextlib.contextmanager
    def _refusal(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            what = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"the store {self._uri} refuses: {what[0]}",
                hint="Check the URI and the credentials in the environment.",
            ) from error

"""The models in a Hugging Face cache: what is there, what of it can run, why the rest cannot, and fetching more."""

import os
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raymi import headcounts, snapshot
from raymi.context import context
from raymi.errors import UserError
from raymi.heads import Heads
from raymi.hubid import why_none
from raymi.other_weights import other_weights
from raymi.snapshot import DamagedError


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One snapshot of one model, described by what its own files say (config.json, safetensors headers)."""

    id: str
    revision: str
    """The commit: 40 hexadecimal digits; empty when an interrupted download left none."""
    path: Path
    """The snapshot folder."""
    model_type: str | None
    n_layers: int | None
    n_heads: int | None
    """Query heads; None where the model has no attention (Mamba)."""
    hidden_size: int | None
    vocab_size: int | None
    context: int | None
    """Longest prompt in tokens, where the config states one."""
    parameters: int | None
    """Tied weights once, buffers not at all; None where no safetensors header tells."""
    size_on_disk: int
    """Bytes of all files of the snapshot."""
    dtype: str | None
    """As stored: float32, bfloat16, ..."""
    reason: str | None
    """Why it cannot run, or None when it can."""
    n_kv_heads: int | None = None
    intermediate_size: int | None = None
    """Of one expert where only that is stated; 4 x hidden_size where nothing is."""
    head_dim: int | None = None
    weight_files: tuple[str, ...] = ()
    """Relative to `path`; empty when they cannot all be read."""
    needs_remote_code: bool = False
    pickle_only: bool = False
    heads_by_layer: tuple[int, ...] | None = None
    """Query heads of each layer, where not all have `n_heads`, as far as config.json tells."""
    attention_layers: tuple[int, ...] | None = None
    """Those that have attention, ascending, of a model in which others have none; None: all of them, as far as
    config.json tells."""
    not_built: tuple[str, ...] = ()
    """Parts of the checkpoint that loading a causal language model leaves out: towers, prediction heads."""

    @property
    def heads(self) -> Heads | None:
        """Query heads of its layers, as far as config.json tells."""
        return None if self.n_heads is None else Heads(self.n_heads, self.heads_by_layer)

    @property
    def runnable(self) -> bool:
        return self.reason is None

    @property
    def refused(self) -> str | None:
        """`reason`, with the option that allows it all the same where there is one."""
        option = {"pickle weights only": "--allow-pickle", "needs remote code": "--trust-remote-code"}
        found = option.get(self.reason or "")
        return f"{self.reason} ({found} {self.id} allows it)" if found else self.reason

    @property
    def damaged(self) -> bool:
        """Whether files are missing or spoilt, which `fetch` mends."""
        return (self.reason or "").startswith(("incomplete", "truncated", "corrupt"))


@dataclass(slots=True)
class _Repo:
    """One model's folder in the cache."""

    path: Path
    refs: dict[str, str] = field(default_factory=dict[str, str])
    """Branch or tag -> commit. The commit may not be there."""
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    """Commit -> bytes."""

    def main(self) -> str:
        """The commit that stands for the model: where refs/main points, else the newest one there is."""
        if self.refs.get("main"):  # an interrupted write leaves an empty one
            return self.refs["main"]
        return max(self.sizes, key=lambda commit: (self.snapshot(commit).stat().st_mtime, commit), default="")

    def snapshot(self, commit: str) -> Path:
        return self.path / "snapshots" / commit


def default_cache() -> Path:
    """Where Hugging Face keeps models: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).expanduser()


def demo_cache() -> Path:
    """Where `make demo` puts its models: in raymi's own cache, `$RAYMI_CACHE`, else `~/.cache/raymi`."""
    own = os.environ.get("RAYMI_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "raymi"
    return Path(own).expanduser() / "hub"


def scan(
    cache_dir: Path | None = None, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> list[CachedModel]:
    """Describes every model in the cache, in the order of the ids, each at the revision that refs/main points to.

    Repositories of other things, such as sparse autoencoders, are left out.

    Args:
        cache_dir: the cache; by default the one of `default_cache`. One that does not exist is empty.
        allow_pickle: whether pickled weights count as runnable.
        trust_remote_code: whether models that bring their own code count as runnable.

    Raises:
        UserError: when the cache cannot be read.
    """
    return [
        _describe(id, repo, repo.main(), allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        for id, repo in sorted(_repos(cache_dir).items())
        if not _of_another_kind(repo)
    ]


def find(
    ref: str, cache_dir: Path | None = None, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> CachedModel:
    """Describes one model of the cache.

    Args:
        ref: `id`, or `id@revision` with a branch, a tag, a commit or the beginning of one.
        cache_dir: see `scan`, as are `allow_pickle` and `trust_remote_code`.

    Raises:
        UserError: when the cache has no such model or revision; it names those that come near.
    """
    id, _, revision = ref.partition("@")
    repos = _repos(cache_dir)
    repo = repos.get(id)
    if repo is None:
        near = _near(id, list(repos))
        gets = f". {why_none(ref)}" if why_none(ref) else f", `raymi fetch {id}` gets it."
        hint = f"Did you mean {near}?" if near else f"`raymi models` lists what is there{gets}"
        if (demo_cache() / f"models--{id.replace('/', '--')}").is_dir():
            hint = f"The demo has it: --cache-dir {demo_cache()}"
        raise UserError(f"no model {id!r} in {cache_dir or default_cache()}", hint=hint)
    commit = _commit(id, repo, revision) if revision else repo.main()
    return _describe(id, repo, commit, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def fetch(ref: str, cache_dir: Path | None = None, *, allow_pickle: bool = False) -> CachedModel:
    """Downloads the files that a model needs, or those of them that are not in the cache yet. Shows progress on stderr.

    Args:
        ref: `id`, or `id@revision` with a branch, a tag or a commit.
        cache_dir: where to; by default `default_cache`.
        allow_pickle: whether to take pickled weights where there are no others.

    Raises:
        UserError: when the model cannot be had: no network, no such model, no access, no weights that may be loaded.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  # httpx's, or httpx2's from 2 on

    id, _, revision = ref.partition("@")
    if hint := why_none(ref):
        raise UserError(f"{ref!r} is not the id of a model", hint=hint)
    try:
        about = HfApi().model_info(id, revision=revision or None)
        names = [file.rfilename for file in about.siblings or []]
        needed = snapshot.files_needed(names)
        _refuse_unloadable(id, names, needed, allow_pickle=allow_pickle)
        download = partial(
            snapshot_download,
            id,
            revision=revision or None,
            cache_dir=cache_dir,
            allow_patterns=[escape(name) for name in needed],
        )
        download()
        model = find(ref, cache_dir, allow_pickle=allow_pickle)
        if model.damaged:  # huggingface_hub takes any file of the right name for the right file
            download(force_download=True)
            model = find(ref, cache_dir, allow_pickle=allow_pickle)
    except (HTTPError, OSError, ValueError) as error:
        raise _unfetched(id, revision, error) from None
    return model


def _refuse_unloadable(id: str, names: list[str], needed: list[str], *, allow_pickle: bool) -> None:
    stem = snapshot.weights_stem(needed)
    if stem is None or snapshot.CONFIG not in needed:
        missing = "weights" if stem is None else snapshot.CONFIG
        other = other_weights(names)
        what = other if other else f"no {missing} for transformers"
        raise UserError(f"{id} cannot be loaded: the repository holds {what}")
    if stem == snapshot.PICKLE and not allow_pickle:
        raise UserError(
            f"{id} has pickle weights only, which can run any code when they are loaded",
            hint="--allow-pickle fetches them all the same.",
        )


def _unfetched(id: str, revision: str, error: Exception) -> UserError:
    """What a failed download means to its user. Never quotes the error itself: it may hold what must not be shown."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    host = urlsplit(ENDPOINT).hostname
    match error:
        case errors.GatedRepoError():
            return UserError(f"{id} is gated", hint=f"Ask for access on its page at {host}, then set HF_TOKEN.")
        case errors.RepositoryNotFoundError():
            return UserError(f"there is no model {id} at {host}", hint="If it is private, set HF_TOKEN.")
        case errors.RevisionNotFoundError():
            return UserError(f"{id} has no revision {revision!r} at {host}")
        case errors.HFValidationError():
            return UserError(f"{id!r} is not the id of a model", hint="An id looks like organisation/name.")
        case errors.OfflineModeIsEnabled():
            return UserError(f"{id} cannot be fetched: offline mode is on", hint="Unset HF_HUB_OFFLINE.")
        case errors.HfHubHTTPError():
            return UserError(f"{id} cannot be fetched: {host} answered {error.response.status_code}")
        case _ if isinstance(error, OSError) and error.strerror:
            return UserError(f"{id} cannot be fetched: {error.strerror}")
        case _:
            return UserError(f"{id} cannot be fetched: {host} cannot be reached ({type(error).__name__})")


def _near(id: str, ids: list[str]) -> str:
    """The ids most like this one, case and organisation aside."""
    name = id.lower().rpartition("/")[2]
    whole = get_close_matches(id.lower(), [other.lower() for other in ids], n=3, cutoff=0.75)
    near = [o for o in ids if o.lower() in whole or o.lower().rpartition("/")[2] == name]
    return " or ".join(near[:3])


def _commit(id: str, repo: _Repo, revision: str) -> str:
    if repo.refs.get(revision):
        return repo.refs[revision]
    commits = [commit for commit in repo.sizes if commit.startswith(revision.lower())]
    if len(commits) == 1:
        return commits[0]
    known = ", ".join([*sorted(repo.refs), *sorted(commit[:8] for commit in commits or repo.sizes)])
    problem = f"{len(commits)} revisions begin with" if commits else "there is no revision"
    raise UserError(f"model {id!r}: {problem} {revision!r} in the cache", hint=f"There is: {known}.")


def _repos(cache_dir: Path | None) -> dict[str, _Repo]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    folder = (cache_dir or default_cache()).expanduser()
    try:
        info = scan_cache_dir(folder)
    except CacheNotFound:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"the cache {folder} cannot be read: {error}") from None
    repos: dict[str, _Repo] = {}
    for found in info.repos:
        if found.repo_type == "model":
            refs = {ref: revision.commit_hash for revision in found.revisions for ref in revision.refs}
            sizes = {revision.commit_hash: revision.size_on_disk for revision in found.revisions}
            repos[found.repo_id] = _Repo(found.repo_path, refs, sizes)
    # What huggingface_hub leaves out as corrupt (a broken link, a ref to nowhere) is there for the user all the same.
    known = {repo.path.name for repo in repos.values()}
    for path in folder.glob("models--*"):
        if path.name not in known and path.is_dir():
            repos[path.name.removeprefix("models--").replace("--", "/")] = _damaged_repo(path)
    return repos


def _damaged_repo(path: Path) -> _Repo:
    refs = path / "refs"
    snapshots = path / "snapshots"
    commits = [commit for commit in snapshots.iterdir() if commit.is_dir()] if snapshots.is_dir() else []
    return _Repo(
        path,
        {
            str(ref.relative_to(refs)): ref.read_text("utf-8", "replace").strip()
            for ref in refs.rglob("*")
            if ref.is_file()
        },
        {commit.name: sum(f.stat().st_size for f in commit.rglob("*") if f.is_file()) for commit in commits},
    )


def _describe(id: str, repo: _Repo, commit: str, *, allow_pickle: bool, trust_remote_code: bool) -> CachedModel:
    folder = repo.snapshot(commit)
    config: dict[str, Any] = {}
    weights: snapshot.Weights | None = None
    reason: str | None = None
    try:
        present = _files(folder)
        other = None if _interrupted(repo) else other_weights(present, folder)
        reason = other and f"holds {other}"
        config = snapshot.read_json(folder / snapshot.CONFIG)
        reason = reason or snapshot.unloadable(config, remote_code=trust_remote_code)
        weights = snapshot.weights(folder, present, config)
        if weights.pickle and not allow_pickle:
            reason = reason or "pickle weights only"
        if not snapshot.tokenizer_present(present):
            reason = reason or "no tokenizer"
    except DamagedError as damage:
        reason = reason or str(damage) + (" (download interrupted)" if _interrupted(repo) else "")
    sizes = snapshot.sizes(config)
    sizes["context"] = context(config, sizes["context"])
    if sizes["n_layers"] is None:
        reason = reason or "config.json does not say how many layers there are"
    return CachedModel(
        id=id,
        revision=commit,
        path=folder,
        model_type=snapshot.model_type(config),
        parameters=weights and weights.parameters,
        size_on_disk=repo.sizes.get(commit, 0),
        dtype=weights and weights.dtype,
        reason=reason,
        weight_files=weights.files if weights else (),
        needs_remote_code=snapshot.needs_remote_code(config),
        pickle_only=weights is not None and weights.pickle,
        heads_by_layer=headcounts.heads_by_layer(config, sizes["n_layers"], sizes["n_heads"]),
        attention_layers=snapshot.attention_layers(config, sizes["n_layers"]),
        not_built=weights.not_built if weights else (),
        **sizes,
    )


def _files(folder: Path) -> set[str]:
    """The names in a snapshot, which are links to blobs.

    Raises:
        DamagedError: when there is no snapshot, or a file the model needs has lost its blob.
    """
    try:
        with os.scandir(folder) as entries:
            there = {entry.name: entry.is_file() for entry in entries}
    except (OSError, ValueError):
        raise DamagedError("incomplete snapshot: its folder is missing") from None
    lost = [name for name in snapshot.files_needed(there) if not there[name]]
    if lost:
        raise DamagedError(f"incomplete snapshot: {lost[0]} is a broken link")
    return set(there)


def _of_another_kind(repo: _Repo) -> bool:
    """Whether a repository never was a model's: it has no file that one needs, and none is on its way.

    An autoencoder's `cfg.json` tells whose the weights beside it are.
    """
    try:
        names = [path.name for path in repo.snapshot(repo.main()).iterdir()]
    except (OSError, ValueError):  # no ref tells of a folder
        return False
    if not names or snapshot.CONFIG in names or _interrupted(repo):
        return False
    known = {"adapter_config.json"}.intersection(names) or any(name.endswith(".gguf") for name in names)
    return "cfg.json" in names or not (snapshot.files_needed(names) or known)


def _interrupted(repo: _Repo) -> bool:
    return any((repo.path / "blobs").glob("*.incomplete"))

"""Which autoencoders experiments use on a model: what a job says and a cache holds becomes what a run is pinned to."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from raymi.catalog import CachedModel
from raymi.errors import UserError
from raymi.experiments.autoencoders import modules
from raymi.experiments.autoencoders.refs import SaeChoice, SaeRef, WithSaes
from raymi.sae.description import MLP_INPUT, NORMALISED, Description, check_fits, same_model
from raymi.sae.discover import describe, placed, scan

Record = dict[str, Any]
"""One row of table `saes`."""


def resolve(
    specs: Iterable[WithSaes], model: CachedModel, *, cache_dir: Path | None = None, others: bool = False
) -> list[Record]:
    """The autoencoders that experiments use on one model, on the machine where both are.

    A pattern takes what fits the model of the cache and leaves the rest; what is named has to be there and to fit. A
    pattern may leave them all, where they belong to other models: then the experiment has one row without `sae`, and a
    note.

    Args:
        specs: the experiments.
        model: the model.
        cache_dir: the Hugging Face cache; by default the one HF_HOME names.
        others: whether there is something else to measure on the model.

    Raises:
        UserError: something that is named does not fit, or is not there; no autoencoder of the cache matches, or those
            that say they belong to this model cannot be used; or there is nothing to measure on the model at all.
    """
    cached = _Cached(cache_dir)
    records = [record for spec in specs for record in _records(spec, model, cached)]
    if records and not others and all(record["sae"] is None for record in records):
        raise UserError(
            f"{model.id}: experiment {records[0]['experiment']!r}: {records[0]['note']}",
            hint="`raymi sae list` shows what is there.",
        )
    return records


def renewed(
    records: Iterable[Record], specs: Iterable[WithSaes], model: CachedModel, *, cache_dir: Path | None = None
) -> list[Record]:
    """Rows of an older raymi, looked up again: it did not read all that an autoencoder's files say of how it is fed.

    The same files are looked at, whatever a pattern would match by now. What a pattern took and cannot be used is left.

    Args:
        records: rows of table `saes` of one model.
        specs: the job's experiments.
        model: the model.
        cache_dir: see `resolve`.

    Raises:
        UserError: what the job names cannot be used, or nothing is left of an experiment's autoencoders.
    """
    by_name = {spec.name: spec for spec in specs}
    found: dict[str, list[Record]] = {}
    refusals: dict[str, UserError] = {}
    for row in records:
        spec, its = by_name.get(row["experiment"]), found.setdefault(row["experiment"], [])
        if spec is None or is_current(row):
            its.append(row)
            continue
        try:
            its.append(_again(row, spec, model, cache_dir))
        except UserError as error:
            if any(not choice.is_pattern for choice in spec.saes):
                raise
            refusals[spec.name] = error
    for name, error in refusals.items():
        if not found[name]:
            raise error
    return [row for its in found.values() for row in its]


def is_current(row: Mapping[str, Any]) -> bool:
    """Whether all that is read today was read of an autoencoder when the row was made."""
    told_apart = row.get("before_weights") is not None or not (row.get("site") or "").endswith(NORMALISED)
    return row["sae"] is None or (row.get("centred") is not None and told_apart)


def latest(records: Iterable[Record]) -> list[Record]:
    """Rows of table `saes` without those that were looked up again."""
    rows = list(records)
    known = {(row["experiment"], row["sae"]) for row in rows if is_current(row)}
    return [row for row in rows if is_current(row) or (row["experiment"], row["sae"]) not in known]


def _again(row: Record, spec: WithSaes, model: CachedModel, cache_dir: Path | None) -> Record:
    about = describe(row["where"], cache_dir=cache_dir, input_scale=row["input_scale"])
    sites = [(choice, choice.site) for choice in spec.saes if choice.site is not None]
    said = next((each for each, at in sites if row["site"] in (at, at.replace(NORMALISED, MLP_INPUT))), None)
    about = placed(about, said.site, said.site_out) if said else about
    return _record(spec, row["input_scale"], model, about) | {name: row[name] for name in ("sae", "where", "version")}


def refs(records: Iterable[Mapping[str, Any]]) -> dict[str, tuple[SaeRef, ...]]:
    """The autoencoders of such rows, by experiment, in an order that is always the same; perhaps none."""
    found: dict[str, list[SaeRef]] = {}
    for row in records:
        its = found.setdefault(row["experiment"], [])
        if row["sae"] is None:
            continue
        ref = SaeRef(
            name=row["sae"],
            where=row["where"],
            version=row["version"],
            site=row["site"],
            site_out=row["site_out"],
            d_sae=row["d_sae"],
            input_scale=row["input_scale"],
            centred=bool(row.get("centred")),
            prepend_bos=row.get("prepend_bos"),
            bos=row.get("bos"),
            plain=row.get("plain"),
            z_moved=bool(row.get("z_moved")),
        )
        its.append(ref)
    return {name: tuple(sorted(its, key=lambda ref: (ref.layer, ref.site, ref.name))) for name, its in found.items()}


def check_unchanged(ref: SaeRef) -> None:
    """Raises UserError when local files are not those that the run has measured. What is in a cache does not change."""
    folder = Path(ref.where)
    if not folder.is_absolute():
        return
    version = _version(describe(folder)) if folder.exists() else None
    if version != ref.version:
        what = "is not there any more" if version is None else "is not what it was when the run first saw it"
        raise UserError(f"the SAE {folder} {what}", hint="Put it back, or start another run with --new.")


class _Cached:
    """The autoencoders of a cache, looked for once and only where a pattern asks for them."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._found: list[tuple[str, Description | None, str | None]] | None = None

    def matching(self, choice: SaeChoice) -> Iterator[tuple[str, Description | None, str | None]]:
        """(Name, description or None, why it cannot be used) of those that a pattern means."""
        if self._found is None:
            self._found = [(each.source, each.description, each.reason) for each in scan(cache_dir=self.folder)]
        return (each for each in self._found if fnmatchcase(each[0], choice.sae))


def _records(spec: WithSaes, model: CachedModel, cached: _Cached) -> list[Record]:
    found: dict[tuple[object, object], Record] = {}
    for choice in (choice for choice in spec.saes if not choice.is_pattern):
        record = _named(spec, choice, model, cached.folder)
        if found.setdefault((record["sae"], record["site"]), record) != record:
            raise UserError(f"experiment {spec.name!r}: {record['sae']} is named twice, in different ways")
    left: list[str] = []
    of_this = False
    named = {name for name, _ in found}
    for choice in (choice for choice in spec.saes if choice.is_pattern):
        for name, about, reason in cached.matching(choice):
            if name in named:  # with what the job says of it by name
                continue
            try:
                if about is None:
                    raise UserError(reason or "cannot be used")
                record = _record(spec, choice.input_scale, model, placed(about, choice.site, choice.site_out))
            except UserError as error:
                left.append(f"{name}: {error.what}")
                of_this |= about is not None and about.model_id is not None and same_model(about.model_id, model.id)
            else:
                found.setdefault((record["sae"], record["site"]), record)
    if not found and (of_this or not left):
        raise _nothing(spec, model, left)
    if not found:
        return [_none(spec, model)]
    spec.check_saes(model.id, list(found.values()))
    return list(found.values())


def _none(spec: WithSaes, model: CachedModel) -> Record:
    patterns = " or ".join(repr(choice.sae) for choice in spec.saes)
    note = f"no SAE in the cache that matches {patterns} fits this model"
    return {"model_id": model.id, "revision": model.revision, "experiment": spec.name, "sae": None, "note": note}


def _named(spec: WithSaes, choice: SaeChoice, model: CachedModel, cache_dir: Path | None) -> Record:
    place = choice.local or choice.sae
    about = describe(
        place, cache_dir=cache_dir, site=choice.site, site_out=choice.site_out, input_scale=choice.input_scale
    )
    record = _record(spec, choice.input_scale, model, about)
    return record | {"sae": choice.sae} if about.revision is None else record


def _record(spec: WithSaes, input_scale: float | None, model: CachedModel, about: Description) -> Record:
    """One autoencoder that fits; UserError otherwise."""
    if model.n_layers is None or model.hidden_size is None:
        raise UserError(f"{model.id}: its config.json does not say how many layers it has, and how wide they are")
    named = about
    about = modules.in_model(about, model)
    _check_normalised(model, about)
    of_model, at = model.heads, about.layer
    own = of_model is not None and at is not None and at < model.n_layers
    heads = of_model.of(at) if own and of_model is not None and at is not None else model.n_heads
    _check_revision(spec, model, about)
    check_fits(
        about,
        model_id=model.id,
        hidden_size=model.hidden_size,
        n_layers=model.n_layers,
        n_heads=heads,
        head_dim=model.head_dim or (model.hidden_size // model.n_heads if model.n_heads else None),
        any_model=spec.any_model,
    )
    if about.normalisation == "expected_average_only_in" and about.input_scale is None:
        raise UserError(
            f"{about.file}: inputs are to be scaled by an average norm which no file of this SAE states",
            hint="Name the SAE with its `input_scale`: the root of d_in over the average norm of the activations.",
        )
    return {
        "model_id": model.id,
        "revision": model.revision,
        "experiment": spec.name,
        "sae": about.source,
        "where": _place(about),
        "version": about.revision or _version(about),
        "site": about.site,
        "site_out": about.site_out,
        "d_in": about.d_in,
        "d_sae": about.d_sae,
        "architecture": about.architecture,
        "k": about.k,
        "format": about.format,
        "dtype": about.dtype,
        "input_scale": input_scale,
        "centred": (about.centred or about.centred_out) and not modules.has_rms_norms(model),
        "prepend_bos": about.prepend_bos,
        "bos": None,
        "plain": modules.meant(about) if about == named else None,
        "before_weights": (about.site or "").endswith(NORMALISED),
        "z_moved": modules.z_moved(about, model),
    }


def _check_revision(spec: WithSaes, model: CachedModel, about: Description) -> None:
    """Whether the checkpoint is the one whose activations it was trained on, where its files name one."""
    wanted = about.model_revision
    if wanted is None or spec.any_model:
        return
    ref = model.path.parent.parent / "refs" / wanted
    commit = ref.read_text().strip() if ref.is_file() else wanted
    if wanted != "main" and not model.revision.startswith(commit):
        raise UserError(
            f"{about.file}: this SAE was trained on revision {wanted!r} of its model, and {model.id} is at "
            f"{model.revision[:8]}",
            hint=f"`raymi fetch {model.id}@{wanted}` and name that revision, or say `any_model`.",
        )


def _check_normalised(model: CachedModel, about: Description) -> None:
    """With LayerNorms it depends on TransformerLens's version what it calls normalised."""
    if about.of_lens and (about.site or "").endswith(NORMALISED) and not modules.has_rms_norms(model):
        fed = str(about.site).replace(NORMALISED, MLP_INPUT)
        raise UserError(
            f"{about.file}: its files say {about.site}, which TransformerLens takes behind the weights of a LayerNorm "
            "before version 3, unless they are folded, and before these from then on",
            hint=f"Name it with `site: {about.site}` (before the weights) or `site: {fed}` (behind them).",
        )


def _place(about: Description) -> str:
    """Where it is opened, and nothing else can be opened: a folder, or `repo@commit[:path]`."""
    if about.revision is None:
        return str(Path(about.source).absolute())
    repo, colon, path = about.source.partition(":")
    return f"{repo}@{about.revision}{colon}{path}"


def _version(about: Description) -> str:
    """The sha256 of an autoencoder's own files: its weights, and what lies beside them to say what they mean."""
    files = [about.file, *sorted(about.file.parent.glob("*.json"))]
    stats = [(path, path.stat()) for path in files]
    return _digest(tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _nothing(spec: WithSaes, model: CachedModel, left: Sequence[str]) -> UserError:
    patterns = " or ".join(repr(choice.sae) for choice in spec.saes)
    who = f"{model.id}: experiment {spec.name!r}"
    if not left:
        return UserError(f"{who}: no SAE in the cache matches {patterns}", hint="`raymi sae list` shows what is there.")
    reasons = "".join(f"\n  {reason}" for reason in left[:3]) + ("\n  ..." if len(left) > 3 else "")
    return UserError(f"{who}: of {len(left)} SAEs in the cache that match {patterns} none fits{reasons}")

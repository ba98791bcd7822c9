"""Ids of repositories on the hub: what is none, and what was probably meant."""

import re
from pathlib import Path

from raymi import paths

_NAME = r"(?!\.)[\w.-]{1,96}"
_ID = re.compile(f"({_NAME}/)?{_NAME}", re.ASCII)
_LINK = re.compile(r"(?:https?://|hf://)?(?:[\w.-]+\.\w+/|hf://)((?:models/)?[\w.-]+/[\w.-]+)(?:[/?#].*)?", re.ASCII)


def why_none(ref: str) -> str | None:
    """What to do where `id` or `id@revision` is none, in a sentence; None where it is one."""
    id, at, revision = ref.partition("@")
    is_job = Path(ref).suffix in (".yaml", ".yml") and ("/" not in ref or paths.is_file(Path(ref)))
    if _ID.fullmatch(id) and ".." not in id and (revision or not at) and not is_job:
        return None
    link = _LINK.fullmatch(ref)
    if link:
        return f"Of a page, the id is what follows the host: {link[1]}"
    if any(character in id for character in "*?["):
        return "A pattern only finds what is in the cache already: name each model."
    if ref and paths.exists(Path(ref)):
        return "It is a file or folder of this machine; an id looks like organisation/name."
    if _ID.fullmatch(id.partition(":")[0]) and ":" in id:
        return f"Behind a colon stands the path of an autoencoder: `raymi sae fetch {ref}` gets one."
    if at and not revision and id:
        return f"Behind the @ a revision is missing: {id}@main, or just {id}."
    if id.count("/") > 1 and _ID.fullmatch("/".join(id.split("/")[:2])):
        return f"An id has two parts, organisation/name; did you mean {'/'.join(id.split('/')[:2])}?"
    return "An id looks like organisation/name, of letters, digits, '-', '_' and '.'."

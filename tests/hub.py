"""A hub on this machine that answers huggingface_hub's requests for models, and remembers them."""

import hashlib
import json
import re
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "c0ffee" + "0" * 34
ERRORS = {"RepoNotFound": 404, "GatedRepo": 403, "RevisionNotFound": 404}


@dataclass
class Hub:
    """Repositories by id: their files, or the error that the hub gives for them (a code of `ERRORS`, or a status)."""

    repositories: Mapping[str, Mapping[str, bytes] | str | int]
    url: str = ""
    downloads: list[str] = field(default_factory=list[str])
    tokens: set[str] = field(default_factory=set[str])


@contextmanager
def serve(repositories: Mapping[str, Mapping[str, bytes] | str | int]) -> Generator[Hub]:
    """Runs a hub with these repositories, each with one commit and the branch main."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.tokens.add(self.headers.get("Authorization") or "")
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)", path):
                self.answer(*match.groups(), kind="tree")
            elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", path):
                self.answer(match[1], match[2] or "main", kind="info")
            elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
                self.answer(match[1], match[2], kind=match[3])
            else:
                self.reply(404, b"{}")

        def answer(self, id: str, revision: str, *, kind: str) -> None:
            files = hub.repositories.get(id, "RepoNotFound")
            if isinstance(files, int):
                self.reply(files, b"{}")
            elif isinstance(files, str):
                self.reply(ERRORS[files], b"{}", {"X-Error-Code": files})
            elif revision not in ("main", REVISION):
                self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif kind == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.reply(200, json.dumps(tree).encode())
            elif kind == "info":
                siblings = [{"rfilename": name} for name in files]
                self.reply(200, json.dumps({"id": id, "sha": REVISION, "siblings": siblings}).encode())
            else:
                if self.command == "GET":
                    hub.downloads.append(kind)
                etag = hashlib.sha1(files[kind]).hexdigest()
                self.reply(200, files[kind], {"X-Repo-Commit": REVISION, "ETag": f'"{etag}"'})

        def reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A small server that speaks as much of the hubs' protocols as a download needs, and remembers what it was asked."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Hub:
    """name -> revision -> folder; a folder's commit is a hash of its name."""

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    drop_after: int | None = None
    """Bytes after which the next answer with a file breaks off, once."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header)"""
    url: str = ""

    def files(self) -> list[str]:
        """Paths of the files that were sent, or begun, in order."""
        return [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]

    def revision(self, name: str, wanted: str) -> Path | None:
        for revision, folder in self.repositories[name].items():
            if wanted in (revision, commit(folder)):
                return folder
        return None


def commit(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


def listing(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            path = unquote(address.path)
            hub.asked.append((self.command, path, self.headers.get("Range", "")))
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(auth-check|revision/.+|tree/.+))?", path):
                self._model(found[1], found[2] or "revision/main")
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(found[1], found[2], found[3])
            elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", path):
                query = {key: values[0] for key, values in parse_qs(address.query).items()}
                if found[2]:
                    self._modelscope(found[1], query["Revision"])
                else:
                    self._file(found[1], query["Revision"], query["FilePath"])
            else:
                self._refuse(404, "EntryNotFound")

        def _model(self, name: str, what: str) -> None:
            if name not in hub.repositories:
                return self._refuse(401, "RepoNotFound")
            if what == "auth-check":
                return self._refuse(403, "GatedRepo") if name in hub.gated else self._json({})
            kind, _, revision = what.partition("/")
            folder = hub.revision(name, revision)
            if folder is None:
                return self._refuse(404, "RevisionNotFound")
            files = listing(folder)
            if kind == "tree":
                return self._json(
                    [{"type": "file", "path": n, "size": p.stat().st_size, "oid": _tag(p)} for n, p in files.items()]
                )
            siblings = [{"rfilename": n, "size": p.stat().st_size, "blobId": _tag(p)} for n, p in files.items()]
            gated = "manual" if name in hub.gated else False
            return self._json({"id": name, "sha": commit(folder), "gated": gated, "siblings": siblings})

        def _modelscope(self, name: str, revision: str) -> None:
            folder = hub.revision(name, revision) if name in hub.repositories else None
            if folder is None:
                return self._json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
            files = [
                {
                    "Path": n,
                    "Size": p.stat().st_size,
                    "Type": "blob",
                    "Sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
                }
                for n, p in listing(folder).items()
            ]
            return self._json({"Code": 200, "Success": True, "Data": {"Files": files}})

        def _file(self, name: str, revision: str, file: str) -> None:
            folder = hub.revision(name, revision)
            if folder is None or not (folder / file).is_file():
                return self._refuse(404, "EntryNotFound")
            data = (folder / file).read_bytes()
            first = int(found[1]) if (found := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
            self.send_response(206 if first else 200)
            self.send_header("ETag", f'"{_tag(folder / file)}"')
            self.send_header("X-Repo-Commit", commit(folder))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - first))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.drop_after is not None and len(data) - first > hub.drop_after:
                data, hub.drop_after, self.close_connection = data[: first + hub.drop_after], None, True
            self.wfile.write(data[first:])

        def _json(self, value: object, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *values: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _tag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()

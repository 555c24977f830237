"""A hub of data sets on this machine: the few requests of ``datasets``, answered from folders; others fail loudly."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

Repositories = dict[tuple[str, str], Path]


class LocalHub(ThreadingHTTPServer):
    """Serves ``{(repository, revision): folder}``; ``asked`` lists the requests, ``unknown`` those without one."""

    daemon_threads = True

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.asked: list[str] = []
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub(repositories: Repositories) -> Iterator[LocalHub]:
    server = LocalHub(repositories)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path == "/api/agent-harnesses":  # the client's own curiosity about what runs it; no data is asked for
            self._json({}, 404)
            return
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        if parts[0] != "datasets" or len(parts) < 3:
            self._unknown(path)
            return
        repository, (verb, *rest) = "/".join(parts[1:3]), parts[3:] or ["revision", ""]
        if not any(name == repository for name, _ in self.server.repositories):
            self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
            return
        folder = self.server.repositories.get((repository, rest[0] if rest else ""))
        if folder is None:
            self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        self._verb(verb, folder, rest[0], "/".join(rest[1:]), parse_qs(url.query), body)

    def _verb(self, verb: str, folder: Path, revision: str, inner: str, query: dict, body: bytes) -> None:
        if verb == "revision":
            files = [{"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)]
            self._json({"id": "x/y", "sha": revision, "siblings": files, "private": False, "gated": False, "tags": []})
        elif verb == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            root = folder / inner
            if not root.is_dir():
                self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            found = sorted(root.rglob("*") if recursive else root.iterdir())
            self._json([_entry(path, folder) for path in found])
        elif verb == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            paths = asked["paths"] if isinstance(asked["paths"], list) else [asked["paths"]]
            self._json([_entry(folder / path, folder) for path in paths if (folder / path).exists()])
        elif verb == "resolve":
            self._file(folder / inner, revision)
        else:
            self._unknown(self.path)

    def _file(self, path: Path, revision: str) -> None:
        headers = {"X-Repo-Commit": revision}
        if not path.is_file():
            self._json({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        headers |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self._send(content, status, headers)

    def _unknown(self, path: str) -> None:
        self.server.unknown.append(f"{self.command} {path}")
        self._json({"error": f"this hub has no answer to {path}"}, 501)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(path: Path, folder: Path) -> dict:
    name = path.relative_to(folder).as_posix()
    digest = hashlib.sha1(path.read_bytes() if path.is_file() else name.encode()).hexdigest()
    kind = "file" if path.is_file() else "directory"
    return {"type": kind, "oid": digest, "size": path.stat().st_size if path.is_file() else 0, "path": name}

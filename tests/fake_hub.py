"""A stand-in for the Hugging Face Hub, in a thread: enough of its HTTP interface to load and to publish.

Files are never stored apart (LFS, Xet), and there is one revision. What real repositories refuse, it refuses
with the same codes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

__all__ = ["FakeHub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories by name, and what was asked of them."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refuses: dict[str, tuple[int, str]] = {}
        """Status and error code of repositories that refuse."""
        self.requests: list[str] = []
        self.breaks_at: int | None = None
        """Bytes after which the connection of a download is cut; no later one is answered."""
        self.cut = False
        self.user: str | None = "someone"

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Its address, as long as it answers."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: _Handler(self, *given))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: FakeHub, *given) -> None:
        self.hub = hub
        super().__init__(*given)

    def log_message(self, *given) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(content)
            owner = asked.get("organization") or self.hub.user
            name = f"{owner}/{asked['name']}"
            if self._refused(name):
                return
            self.hub.repositories.setdefault(name, {})
            self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif parts[4] == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(content)["files"]
            ]
            self._json({"files": files})
        elif parts[4] == "commit":
            for line in content.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    data = base64.b64decode(item["value"]["content"])
                    self.hub.repositories["/".join(parts[2:4])][item["value"]["path"]] = data
            address = f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": address})

    def _get(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if path == "/":
            self._json({})
        elif path == "/api/whoami-v2":
            known = self.hub.user is not None and self.headers.get("Authorization")
            self._json(
                {"name": self.hub.user, "type": "user", "orgs": []} if known else {}, 200 if known else 401
            )
        elif parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if self._refused(name, parts[5] if len(parts) > 5 else None):
                return
            files = self.hub.repositories[name]
            if parts[4:5] == ["tree"]:
                self._json([
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ])  # fmt: skip
            else:
                self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        elif parts[2:3] == ["resolve"]:
            name = "/".join(parts[:2])
            if not self._refused(name, parts[3]):
                self._file(self.hub.repositories[name]["/".join(parts[4:])])

    def _refused(self, name: str, revision: str | None = None) -> bool:
        """Answer a request for what is not there, or not for everybody."""
        there = name in self.hub.repositories or self.command == "POST"
        status, code = self.hub.refuses.get(name, (200, "") if there else (401, "RepoNotFound"))
        if status == 200 and revision not in (None, "main", COMMIT):
            status, code = 404, "RevisionNotFound"
        if status != 200:
            self._json({"error": code}, status, {"X-Error-Code": code})
        return status != 200

    def _file(self, data: bytes) -> None:
        if self.hub.cut:  # closed without a word
            self.close_connection = True
            return
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks_at is not None and len(data) > self.hub.breaks_at:
            self.wfile.write(data[first : self.hub.breaks_at])
            self.hub.cut = self.close_connection = True
        else:
            self.wfile.write(data[first:])

    def _json(self, data: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

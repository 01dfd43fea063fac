"""A stand-in for the Hugging Face hub: repositories in memory behind the paths that the real client asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REVISION = "0" * 39 + "1"


class Handler(BaseHTTPRequestHandler):
    """GET: a repository's list and its files. POST: a new repository, and a commit."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].strip("/")
        if "/resolve/" in path:
            name, _, rest = path.partition("/resolve/")
            file = self.server.repositories.get(name, {}).get(rest.partition("/")[2])
            if file is None:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            return self.answer(file, ETag=f'"{hashlib.sha1(file).hexdigest()}"', X_Repo_Commit=REVISION)
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if "/tree/" in path:
            return self.answer(
                [{"type": "file", "path": file, "size": len(value), "oid": "0" * 40} for file, value in files.items()]
            )
        return self.answer({"id": name, "sha": REVISION, "siblings": [{"rfilename": file} for file in files]})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            self.server.repositories.setdefault(name, {})
            self.server.private[name] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            return self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.repositories[name][entry["value"]["path"]] = content
        return self.answer(
            {"commitUrl": f"http://127.0.0.1:{self.server.server_port}/{name}/commit/{REVISION}", "commitOid": REVISION}
        )


@contextmanager
def hub_server(**repositories: dict[str, bytes]) -> Iterator[ThreadingHTTPServer]:
    """A hub on this machine; `server.repositories` is name → path → content."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.private, server.asked = dict(repositories), {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

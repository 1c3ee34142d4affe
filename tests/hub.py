"""A stand-in for Hugging Face's hub: the part of its HTTP interface that creates repositories and takes commits.

Paths and bodies as `huggingface_hub` sends them: `/api/repos/create`, `/api/validate-yaml`, `preupload`, the batch
interface of Git LFS, and `commit` with its lines of JSON. The other upload protocol, Xet, has to be disabled.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secret_token_of_the_tests"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The server's content, and the failures that it simulates."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by SHA-256."""
    fails: dict[str, int] = field(default_factory=dict)
    """HTTP status to answer with, by part of a path."""
    requests: list[str] = field(default_factory=list)
    private: bool = False
    """Whether new repositories are private unless the request says otherwise, as organisations can set."""


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that has failed may disconnect
            super().handle()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, status: int, value: Any, content_type: str = "application/json") -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_one(self) -> None:
        hub, path, body = self.state, self.path.partition("?")[0], self.body()
        hub.requests.append(f"{self.command} {path}")
        for part, status in hub.fails.items():
            if part in path:
                return self.answer(status, {"error": f"refused for {TOKEN}" if status == 403 else "it went wrong"})
        if path.startswith("/lfs/"):
            hub.objects[path.removeprefix("/lfs/")] = body
            return self.answer(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and path != "/api/validate-yaml":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        name = next((name for name in hub.repositories if f"/{name}" in path), None)
        if name is None:
            return self.answer(404, {"error": "Repository not found"})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None} for f in files
            ]  # fmt: skip
            return self.answer(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{hub.address}/lfs/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        if "/commit/" in path:
            return self.commit(name, body)
        return self.answer(404, {"error": f"no such path: {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = lambda self: self.handle_one()

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.state.repositories:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.state.address}/{name}"}
            )
        known = "private" in asked or "visibility" in asked
        private = bool(asked.get("private") or asked.get("visibility") == "private") if known else self.state.private
        self.state.repositories[name] = Repository(private)
        return self.answer(200, {"url": f"{self.state.address}/{name}", "name": name, "id": "1"})

    def commit(self, name: str, body: bytes) -> None:
        repository = self.state.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.state.objects[value["oid"]]
        self.answer(200, {"commitUrl": f"{self.state.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

"""A server on 127.0.0.1 that speaks as much of the Hugging Face Hub's protocol as downloading needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories as folders, and what was asked for."""

    repositories: dict[str, Path]
    gated: frozenset[str] = frozenset()
    private: frozenset[str] = frozenset()
    token: str = "hf_secret"
    fail_after_bytes: int | None = None
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str]:
        """The files that were really sent, in alphabetical order."""
        return sorted(
            {
                path.split("/resolve/")[1].split("/", 1)[1]
                for path in self.requests
                if path.startswith("GET") and "/resolve/" in path
            }
        )


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the server for the length of a block."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # looked at by shutdown
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, send_body: bool) -> None:
        self.state.requests.append(f"{self.command} {self.path}")
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        folder, revision = self.state.repositories.get(name), "main"
        allowed = self.headers.get("Authorization") == f"Bearer {self.state.token}"
        if folder is None or (name in self.state.private and not allowed):
            return self._refuse(401, "RepoNotFound", send_body)
        if name in self.state.gated and not allowed and not is_api:
            return self._refuse(403, "GatedRepo", send_body)
        if is_api:
            revision = parts[5] if parts[4:5] in (["revision"], ["tree"]) else "main"
        elif parts[2:3] == ["resolve"]:
            revision = parts[3]
        if revision not in ("main", "v1", COMMIT):
            return self._refuse(404, "RevisionNotFound", send_body)
        if parts[4:5] == ["tree"]:
            return self._send_tree(folder, send_body)
        if is_api:
            return self._send_info(name, folder, send_body)
        return self._send_file(folder / "/".join(parts[4:]), send_body)

    def _send_info(self, name: str, folder: Path, send_body: bool) -> None:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        siblings: list[dict[str, object]] = [{"rfilename": str(file.relative_to(folder))} for file in files]
        if "blobs=" in urlparse(self.path).query:  # like the Hub, which tells sizes only when it is asked for them
            siblings = [{**entry, "size": file.stat().st_size} for entry, file in zip(siblings, files, strict=True)]
        info = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, send_body)

    def _send_tree(self, folder: Path, send_body: bool) -> None:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        entries = [
            {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "0" * 40}
            for file in files
        ]
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, send_body)

    def _send_file(self, file: Path, send_body: bool) -> None:
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", send_body)
        body = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[start:]
        return self._send(status, body, headers, send_body)

    def _refuse(self, status: int, code: str, send_body: bool) -> None:
        self._send(
            status,
            b"{}",
            {"X-Error-Code": code, "X-Error-Message": code, "Content-Type": "application/json"},
            send_body,
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str], send_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        limit = self.state.fail_after_bytes
        if send_body and limit is not None and len(body) > limit:
            self.wfile.write(body[:limit])
            self.state.fail_after_bytes = None
            self.close_connection = True
            self.connection.close()
        elif send_body:
            self.wfile.write(body)

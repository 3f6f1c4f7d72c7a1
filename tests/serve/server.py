"""A server as a process on this machine, and calls to it."""

import base64
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from parity.recipe import make_picture

ROOT = Path(__file__).parents[2]
JSON = {"content-type": "application/json"}


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


class RunningServer:
    """A process that serves, and where."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path):
        self.process, self.log = process, log
        self.port = 0

    def wait_until_ready(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while "florence2: ready" not in self.words():
            assert self.process.poll() is None, self.words()
            assert time.monotonic() < end, self.words()
            time.sleep(0.02)
        self.port = int(re.search(r"listening on http://\S+?:(\d+),", self.words()).group(1))

    def words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The log's lines about requests."""
        texts = self.words().splitlines(keepends=True)
        lines: list[dict[str, Any]] = [json.loads(each) for each in texts if each[0] == "{" and each[-1] == "\n"]
        return lines

    def wait_for_line(self, **values: Any) -> dict[str, Any]:
        """The log's newest line with these values; it is written after the response was sent."""
        end = time.monotonic() + 60
        while True:
            found = [line for line in self.lines() if values.items() <= line.items()]
            if found:
                return found[-1]
            assert time.monotonic() < end, self.words()
            time.sleep(0.02)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 600
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, JSON if headers is None and body is not None else headers or {})
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers.items()), response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None, timeout: float = 600) -> Reply:
        return self.call("POST", path, body, headers, timeout)

    def chat(self, text: str, image: bytes, **fields: Any) -> Reply:
        return self.post("/v1/chat/completions", chat_body(text, image, **fields))

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        text = self.call("GET", "/metrics").body.decode()
        return sum(float(value) for value in re.findall(rf"^florence2_{name}(?:{{.*}})? (\S+)$", text, re.M))

    def wait_for(self, name: str, value: float, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while (now := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {now}, not {value}"
            time.sleep(0.02)

    def stop(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)


@contextmanager
def serving(folder: Path, *options: str, model: str = "nano", **environment: str) -> Iterator[RunningServer]:
    """A server that is ready."""
    with starting(folder, *options, model=model, **environment) as server:
        server.wait_until_ready()
        yield server


@contextmanager
def starting(folder: Path, *options: str, model: str = "nano", **environment: str) -> Iterator[RunningServer]:
    """A server that may not be ready yet. Its log must hold no traceback at the end."""
    log = folder / "server.log"
    device = () if "--devices" in options else ("--device", "cpu")
    words = [sys.executable, "-m", "florence2", "serve", "--model", model, "--port", "0", *device, *options]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=known)
    server = RunningServer(process, log)
    try:
        yield server
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in server.words(), server.words()


def processes_of(server: RunningServer) -> list[int]:
    """The processes of the server's devices, the oldest first."""
    threads = Path(f"/proc/{server.process.pid}/task").iterdir()
    children = sorted(int(child) for thread in threads for child in (thread / "children").read_text().split())
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def png(seed: int = 5, width: int = 320, height: int = 200) -> bytes:
    """The bytes of an image file."""
    return encode(make_picture(seed, width, height))


def encode(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def messages(text: str, image: bytes | str) -> list[dict[str, Any]]:
    url = image if isinstance(image, str) else data_url(image)
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def chat_body(text: str, image: bytes | str, **fields: Any) -> dict[str, Any]:
    return {"messages": messages(text, image), **fields}


def native_body(image: bytes, *tasks: Any, **fields: Any) -> dict[str, Any]:
    asked = [{"task": task} if isinstance(task, str) else task for task in tasks]
    return {"image": {"data": base64.b64encode(image).decode()}, "tasks": asked, **fields}

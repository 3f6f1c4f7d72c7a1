"""`docs/ray_serve.py` on a local Ray cluster: two replicas give the answers of the library."""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import florence2
from tests.serve.server import JSON, ROOT, native_body, png

PORT = 8000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    log = tmp_path_factory.mktemp("ray") / "log"
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    known |= {"FLORENCE2_MODEL": "nano", "FLORENCE2_DEVICE": "cpu", "FLORENCE2_GPUS": "0", "FLORENCE2_REPLICAS": "2"}
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "docs.ray_serve"], stdout=file, stderr=file, env=known)
    try:
        wait_until_ready(process, log)
        yield
    finally:
        process.terminate()
        process.wait(timeout=90)


def wait_until_ready(process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 180
    while True:
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        try:
            if all(call("GET", "/ready")[0] == 200 for _ in range(12)):  # whichever replica is asked
                return
        except OSError:
            pass
        time.sleep(0.5)


def call(method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body), JSON)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, json.loads(data) if data.startswith(b"{") else data


def test_answers_are_those_of_the_library(cluster: None) -> None:
    nano = florence2.load("nano", device="cpu")
    images = [png(9000 + i) for i in range(8)]
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda image: call("POST", "/v1/florence2", native_body(image, "caption")), images))
    for image, (status, reply) in zip(images, replies, strict=True):
        assert status == 200, reply
        right = nano.run("<CAPTION>", image)
        assert (reply["answers"][0]["text"], reply["answers"][0]["finish_reason"]) == (right.text, right.finish_reason)


def test_errors_are_those_of_the_server(cluster: None) -> None:
    status, reply = call("POST", "/v1/florence2", native_body(b"no image", "caption"))
    assert (status, reply["error"]["code"]) == (400, "invalid_image")

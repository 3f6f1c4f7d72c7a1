"""The process under load and at its end: 429, deadlines, clients that leave, slow ones, and signals."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serve.server import RunningServer, chat_body, png, serving, starting


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that answers one request at a time, and lets three wait; it needs a key."""
    folder = tmp_path_factory.mktemp("narrow")
    with serving(folder, "--max-batch", "1", "--max-queue", "3", FLORENCE2_API_KEYS="a-long-key") as running:
        yield running


KEY = {"authorization": "Bearer a-long-key", "content-type": "application/json"}


def raw_post(port: int, body: bytes, *headers: str) -> socket.socket:
    """A connection on which a request was sent, and nothing read yet."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines = [*head, f"Content-Length: {len(body)}", *headers, "", ""]
    connection.sendall("\r\n".join(lines).encode() + body)
    return connection


def read_all(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as file:
        return file.read()


def slow_body(seed: int) -> bytes:
    """A request that takes long: a task that nano answers at length, without an end before the limit."""
    return json.dumps(chat_body("<OD>", png(seed), n=3)).encode()


def test_a_full_queue_is_429_with_a_time(narrow: RunningServer) -> None:
    bodies = [chat_body("<OD>", png(2000 + i)) for i in range(12)]
    with ThreadPoolExecutor(12) as threads:
        replies = list(threads.map(lambda body: narrow.post("/v1/chat/completions", body, KEY), bodies))
    refused = [reply for reply in replies if reply.status == 429]
    assert {reply.status for reply in replies} == {200, 429} and len(refused) >= 4
    for reply in refused:
        assert reply.code == "queue_full" and 1 <= int(reply.headers["retry-after"]) <= 60


def test_a_deadline_is_504(narrow: RunningServer) -> None:
    started = time.monotonic()
    reply = narrow.post("/v1/chat/completions", chat_body("<OD>", png(2100)), KEY | {"x-request-timeout-ms": "1"})
    assert (reply.status, reply.code) == (504, "deadline_exceeded") and time.monotonic() - started < 5


def test_a_key_is_needed(narrow: RunningServer) -> None:
    reply = narrow.call("GET", "/v1/models")
    assert (reply.status, reply.code) == (401, "invalid_api_key") and narrow.call("GET", "/health").status == 200
    assert narrow.call("GET", "/v1/models", headers=KEY).status == 200


def test_clients_that_leave_free_their_places(server: RunningServer) -> None:
    for connection in [raw_post(server.port, slow_body(2200 + i)) for i in range(12)]:
        connection.close()
    server.wait_for("requests_running", 0)
    server.wait_for("requests_waiting", 0)
    server.wait_for("queue_bytes", 0)
    server.wait_for_line(status=499)
    assert server.chat("<CAPTION>", png(2300)).status == 200


def test_a_client_that_leaves_a_stream(server: RunningServer) -> None:
    body = json.dumps(chat_body("<CAPTION>", png(2301), stream=True, florence2={"num_beams": 1})).encode()
    with raw_post(server.port, body) as connection:
        connection.recv(100)
    server.wait_for("requests_running", 0)


def test_a_host_that_is_not_this_machine(server: RunningServer) -> None:
    reply = server.call("GET", "/v1/models", headers={"host": "evil.org"})
    assert (reply.status, reply.code) == (403, "host_not_allowed")


def test_bytes_that_are_not_http(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"hello\r\n\r\n")
        reply = connection.makefile("rb").read()
    assert reply.startswith(b"HTTP/1.1 400 ") and b'"code": "invalid_http"' in reply


def test_a_port_that_is_taken(server: RunningServer, tmp_path: Path) -> None:
    with starting(tmp_path, "--port", str(server.port)) as second:
        assert second.process.wait(timeout=30) == 2
        assert "cannot listen on 127.0.0.1" in second.words() and "Choose another" in second.words()


def test_sigterm_answers_what_was_accepted_and_refuses_the_rest(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        bodies = [json.dumps(chat_body("<OD>", png(2400 + i))).encode() for i in range(8)]
        connections = [raw_post(server.port, body, "Connection: close") for body in bodies]
        end = time.monotonic() + 20
        while server.metric("picture_cache_queries_total") < 8 and time.monotonic() < end:
            time.sleep(0.01)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
        assert server.call("GET", "/ready").code == "draining"
        refused = server.chat("<CAPTION>", png(1))
        assert (refused.status, refused.code) == (503, "draining") and refused.headers["retry-after"]
        replies = [read_all(connection) for connection in connections]
        assert all(reply.startswith(b"HTTP/1.1 200 ") for reply in replies)
        assert server.process.wait(timeout=30) == 0 and time.monotonic() - started < 32


@pytest.mark.release  # a server of its own, to its end
def test_what_is_left_after_the_drain_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain", "0.2", "--max-batch", "1") as server:
        bodies = [json.dumps(chat_body("<OD>", png(2700 + i))).encode() for i in range(12)]
        connections = [raw_post(server.port, body, "Connection: close") for body in bodies]
        server.wait_for("picture_cache_queries_total", 12)
        server.process.send_signal(signal.SIGTERM)
        replies = [read_all(connection) for connection in connections]
        assert {reply[:12] for reply in replies} <= {b"HTTP/1.1 200", b"HTTP/1.1 503"}
        assert any(b'"draining"' in reply for reply in replies) and server.process.wait(timeout=20) == 0


@pytest.mark.release
def test_threads_and_files_do_not_grow(server: RunningServer) -> None:
    """Clients come, leave and send nonsense; the process has no more threads and open files after than before."""

    def counts() -> tuple[int, int]:
        folder = Path(f"/proc/{server.process.pid}")
        return len([*(folder / "task").iterdir()]), len([*(folder / "fd").iterdir()])

    def bother(seed: int) -> None:
        raw_post(server.port, slow_body(2600 + seed % 3)).close()
        server.post("/v1/florence2", b"{")

    def rush() -> None:
        threads = [threading.Thread(target=bother, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.wait_for("requests_running", 0)

    rush()
    time.sleep(0.1)
    before = counts()
    rush()
    time.sleep(0.3)
    after = counts()
    assert after[0] <= before[0] + 1 and after[1] <= before[1] + 2


@pytest.mark.release
def test_a_second_signal_ends_at_once(narrow: RunningServer) -> None:
    """The last test of this server."""
    key = f"Authorization: {KEY['authorization']}"
    connections = [raw_post(narrow.port, slow_body(2500 + i), key) for i in range(4)]
    time.sleep(0.2)
    assert narrow.process.poll() is None
    narrow.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    started = time.monotonic()
    narrow.process.send_signal(signal.SIGTERM)
    assert narrow.process.wait(timeout=5) == 130 and time.monotonic() - started < 1
    for connection in connections:
        connection.close()

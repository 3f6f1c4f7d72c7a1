"""Images of URLs: what may be fetched, from which address, and how much of it; no test leaves this machine."""

import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from florence2.serve.errors import RequestError
from florence2.serve.incoming.fetch import Fetcher, is_public
from florence2.serve.settings import Settings

PUBLIC = "93.184.215.14"
HOST = "images.example.com"
ALLOWED = Settings(url_hosts=(HOST, "bücher.example"), url_http=True, max_body_bytes=1000)


class Host:
    """Plays a public host: every connection is answered by `serve`, and its address is kept."""

    def __init__(self, serve: Callable[[socket.socket], None], addresses: list[str] | None = None):
        self.serve, self.addresses = serve, addresses or [PUBLIC]
        self.connected: list[tuple[str, int]] = []
        self.resolved: list[str] = []

    def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        return self.addresses

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connected.append((address, port))
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._answer, args=(theirs,), daemon=True).start()
        return ours

    def _answer(self, channel: socket.socket) -> None:
        with channel, suppress(OSError):  # the other side may have read enough
            self.serve(channel)

    def fetcher(self, settings: Settings = ALLOWED) -> Fetcher:
        return Fetcher(settings, self.resolve, self.connect)


def reply(status: str = "200 OK", body: bytes = b"bytes", *headers: str) -> Callable[[socket.socket], None]:
    def serve(channel: socket.socket) -> None:
        received.append(channel.recv(10_000))
        head = "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""])
        channel.sendall(head.encode() + body)

    return serve


received: list[bytes] = []


def test_an_image_of_an_allowed_host() -> None:
    host = Host(reply())
    assert host.fetcher().fetch(f"http://{HOST}/a.png?size=2") == b"bytes"
    assert host.connected == [(PUBLIC, 80)] and host.resolved == [HOST]
    head = received[-1].decode()
    assert head.startswith("GET /a.png?size=2 HTTP/1.1\r\nHost: images.example.com\r\nUser-Agent: florence2/")
    assert "cookie" not in head.lower() and "accept-encoding" not in head.lower()


def test_a_host_in_other_letters() -> None:
    host = Host(reply())
    assert host.fetcher().fetch("http://xn--bcher-kva.example/ü.png") == b"bytes"
    assert received[-1].startswith(b"GET /%C3%BC.png ")


REFUSED = [
    "https://example.com/a.png",
    "https://images.example.com.evil.org/",
    "https://evil.org/images.example.com",
    "https://images.example.com@evil.org/",
    "https://evil.org#@images.example.com",
    "https://images.example.com:8443/",
    "https://images.example.com:80/",
    "http://images.example.com:443/",
    "https://user@images.example.com/",
    "https://user:word@images.example.com/",
    "https://images.example.com\\@evil.org/",
    "https://images.example.com./",
    "https://sub.images.example.com/",
    "https://127.0.0.1/",
    "https://2130706433/",
    "https://0177.0.0.1/",
    "https://0x7f.1/",
    "https://127.1/",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://１２７.０.０.１/",
    "https://localhost/",
    "ftp://images.example.com/",
    "file:///etc/passwd",
    "gopher://images.example.com/",
    "//images.example.com/",
    "/etc/passwd",
    "images.example.com/a.png",
    "",
    "https://",
    "https://[",
    "https://images.example.com:x/",
    "https://images.example.com/ a",
    "https://images.example.com/\r\nHost: evil.org",
    "https://images.example.com/\0",
    "https://images.example.com/" + "a" * 3000,
    "javascript:alert(1)",
]


@pytest.mark.parametrize("url", REFUSED)
def test_urls_that_are_refused_before_anything_is_resolved(url: str) -> None:
    host = Host(reply())
    with pytest.raises(RequestError) as error:
        host.fetcher().fetch(url)
    assert error.value.code == "url_not_allowed" and not host.resolved and not host.connected


def test_http_needs_a_permission_and_urls_are_off() -> None:
    host = Host(reply())
    for settings in (Settings(), Settings(url_hosts=(HOST,))):
        with pytest.raises(RequestError) as error:
            host.fetcher(settings).fetch(f"http://{HOST}/")
        assert error.value.code == "url_not_allowed" and not host.resolved


PRIVATE = """
    127.0.0.1 127.255.255.254 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1 198.18.0.1
    224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    ::1 :: fe80::1 fc00::1 fd00:ec2::254 fec0::1 ff02::1 2001:db8::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
    ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::7f00:1 2002:7f00:1:: 2002:a9fe:a9fe::1
    2001:0:7f00:1::1 fe80::1%eth0 127.1 localhost
""".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_public(address)
    host = Host(reply(), [PUBLIC, address])
    with pytest.raises(RequestError) as error:
        host.fetcher().fetch(f"http://{HOST}/")
    assert not host.connected and address not in str(error.value) and "could not be fetched" in str(error.value)
    assert address in capsys.readouterr().err


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


def test_the_address_that_was_checked_is_connected_to() -> None:
    """A resolver that gives a private address the second time is not asked again."""
    host = Host(reply())
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    fetcher = Fetcher(ALLOWED, lambda _host, _port: next(answers), host.connect)
    assert fetcher.fetch(f"http://{HOST}/") == b"bytes" and host.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "307 Temporary", "404 Not Found", "500 Failed", "204 Empty"]
)
def test_no_redirects_and_no_errors(status: str) -> None:
    host = Host(reply(status, b"", "Location: http://127.0.0.1/"))
    with pytest.raises(RequestError) as error:
        host.fetcher().fetch(f"http://{HOST}/")
    assert (error.value.status, error.value.code) == (400, "invalid_image") and len(host.connected) == 1


def test_a_long_image_is_not_read_to_its_end() -> None:
    with pytest.raises(RequestError) as error:
        Host(reply("200 OK", bytes(5000), "Content-Length: 3")).fetcher(
            Settings(url_hosts=(HOST,), url_http=True, max_body_bytes=2)
        ).fetch(f"http://{HOST}/")
    assert error.value.code == "image_too_large"


def test_a_slow_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence2.serve.incoming.fetch._SECONDS", 0.4)

    def drip(channel: socket.socket) -> None:
        channel.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(50):
            channel.sendall(b"x")
            time.sleep(0.05)

    started = time.monotonic()
    with pytest.raises(RequestError):
        Host(drip).fetcher().fetch(f"http://{HOST}/")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500])
def test_a_host_that_speaks_no_http(answer: bytes) -> None:
    def serve(channel: socket.socket) -> None:
        channel.recv(10_000)
        channel.sendall(answer)

    with pytest.raises(RequestError, match="could not be fetched"):
        Host(serve).fetcher().fetch(f"http://{HOST}/")


def test_an_https_host_needs_a_certificate() -> None:
    def serve(channel: Any) -> None:
        channel.recv(100)
        channel.sendall(b"HTTP/1.1 200 OK\r\n\r\nbytes")

    host = Host(serve)
    with pytest.raises(RequestError, match="could not be fetched"):
        host.fetcher().fetch(f"https://{HOST}/")
    assert host.connected == [(PUBLIC, 443)]


attempts: list[Any] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Keep every address that Python would connect to, and let none through."""
    if event == "socket.connect" and attempts is not None:
        attempts.append(arguments[1])
        raise PermissionError("no connection in this test")


sys.addaudithook(_watch)  # which cannot be taken back, so it is idle outside the next test


def test_no_connection_is_even_tried_to_any_other_address() -> None:
    """Python itself reports what is connected to, so that no way around the checks goes unseen."""
    global attempts
    attempts = []
    answers: list[list[str]] = []
    fetcher = Fetcher(ALLOWED, lambda _host, _port: answers.pop(0))
    try:
        for url in REFUSED:
            with pytest.raises(RequestError):
                fetcher.fetch(url)
        for address in PRIVATE:
            answers[:] = [[address, PUBLIC], [PUBLIC]]
            with pytest.raises(RequestError):
                fetcher.fetch(f"https://{HOST}/")
        assert attempts == [] and len(REFUSED) + len(PRIVATE) >= 45
        answers[:] = [[PUBLIC], ["127.0.0.1"]]  # the name is bound again between the check and the connection
        with pytest.raises(RequestError):
            fetcher.fetch(f"https://{HOST}/")
        assert attempts == [(PUBLIC, 443)] and answers == [["127.0.0.1"]]
    finally:
        attempts = None

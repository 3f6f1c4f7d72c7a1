"""Fetch an image from a URL, where that is allowed: exact hosts, checked addresses, no redirects, limits on everything.

The address that was checked is the one that is connected to, so that a name that resolves differently a moment later
(DNS rebinding) reaches nothing.
"""

import http.client
import ipaddress
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import SplitResult, urlsplit

from florence2 import __version__
from florence2.serve.errors import RequestError
from florence2.serve.settings import Settings

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve: TypeAlias = Callable[[str, int], list[str]]
"""Host and port -> its addresses."""
Connect: TypeAlias = Callable[[str, int, float], socket.socket]
"""Address, port and seconds -> a connected socket."""
_LONGEST_URL = 2048
_CONNECT_SECONDS, _SECONDS = 5.0, 10.0
_CHUNK = 64 << 10
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_COMPATIBLE = ipaddress.ip_network("::/96")


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, as the system resolves it."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(each[4][0]) for each in found]


def connect(address: str, port: int, seconds: float) -> socket.socket:
    """Return a socket that is connected to an address."""
    return socket.create_connection((address, port), timeout=seconds)


@dataclass(frozen=True)
class Fetcher:
    """Gets the bytes of URLs within a server's settings; tests bring a `resolve` and a `connect` of their own."""

    settings: Settings
    resolve: Resolve = resolve
    connect: Connect = connect
    trust: ssl.SSLContext | None = None

    def fetch(self, url: str) -> bytes:
        """Return the bytes of a URL. Raises RequestError, which says nothing about addresses."""
        parts, port = self._check(url)
        host = str(parts.hostname)
        try:
            address = self._address(host, port)
            return self._get(parts, host, address, port)
        except RequestError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._log(host, repr(error))
            raise self._failure() from None

    def _check(self, url: str) -> tuple[SplitResult, int]:
        """Return the parts of a URL and its port. Raises RequestError for one that may not be fetched."""
        if not self.settings.url_hosts:
            raise _refused(
                "URLs are not fetched by this server; send the image as a data URL, data:image/png;base64,..."
            )
        if len(url) > _LONGEST_URL or not url.isprintable() or " " in url:
            raise _refused(
                f"The URL must have at most {_LONGEST_URL:,} characters, without spaces and control characters."
            )
        ports = {"https": 443} | ({"http": 80} if self.settings.url_http else {})
        try:
            parts = urlsplit(url)
            port, host = parts.port or ports.get(parts.scheme), parts.hostname
        except ValueError:
            raise _refused("The URL cannot be read.") from None
        if parts.scheme not in ports or port != ports[parts.scheme]:
            raise _refused(f"The URL must begin with {' or '.join(f'{each}://' for each in ports)}, without a port.")
        if "@" in parts.netloc or "\\" in url:
            raise _refused("The URL must not have a user name or a backslash.")
        if host is None or _plain_host(host) not in {_plain_host(each) for each in self.settings.url_hosts}:
            raise _refused("Images of this host are not fetched here.")
        return parts, port

    def _address(self, host: str, port: int) -> str:
        """Return a checked address of a host, resolved once. Raises RequestError where any is not public."""
        addresses = self.resolve(_plain_host(host), port)
        private = [address for address in addresses if not is_public(address)]
        if private or not addresses:
            self._log(host, f"addresses that are not public: {private}" if private else "no address")
            raise self._failure()
        return addresses[0]

    def _get(self, parts: SplitResult, host: str, address: str, port: int) -> bytes:
        deadline = time.monotonic() + _SECONDS
        with self.connect(address, port, _CONNECT_SECONDS) as plain:
            plain.settimeout(_CONNECT_SECONDS)
            name = _plain_host(host)
            secure = parts.scheme == "https"
            channel = self._trust().wrap_socket(plain, server_hostname=name) if secure else plain
            connection = http.client.HTTPConnection(name, port, timeout=_CONNECT_SECONDS)
            connection.sock = channel
            try:
                connection.putrequest("GET", _target(parts), skip_host=True, skip_accept_encoding=True)
                connection.putheader("Host", name)
                connection.putheader("User-Agent", f"florence2/{__version__}")
                connection.putheader("Accept", "image/*")
                connection.putheader("Connection", "close")
                connection.endheaders()
                return self._read(connection, channel, host, deadline)
            finally:
                channel.close()

    def _trust(self) -> ssl.SSLContext:
        return self.trust or ssl.create_default_context()

    def _read(self, connection: http.client.HTTPConnection, channel: Any, host: str, deadline: float) -> bytes:
        # a sender of one byte now and then never lets a socket's own time run out
        _limit(channel, deadline)
        with connection.getresponse() as response:
            if response.status != 200:
                self._log(host, f"status {response.status}")
                raise self._failure()
            chunks: list[bytes] = []
            size, most = 0, self.settings.max_body_bytes
            while chunk := response.read1(_CHUNK):
                chunks.append(chunk)
                size += len(chunk)
                if size > most:
                    raise RequestError(
                        400, "image_too_large", f"The image of the URL is longer than the {most:,} bytes allowed."
                    )
                _limit(channel, deadline)
            return b"".join(chunks)

    def _failure(self) -> RequestError:
        return RequestError(
            400, "invalid_image", "The image of the URL could not be fetched; send it as a data URL.", param="image"
        )

    def _log(self, host: str, reason: str) -> None:
        print(f"florence2: an image of {host} could not be fetched: {reason}", file=sys.stderr)


def _limit(channel: Any, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the whole answer took too long")
    channel.settimeout(min(left, _CONNECT_SECONDS))


def _target(parts: SplitResult) -> str:
    path = parts.path or "/"
    target = f"{path}?{parts.query}" if parts.query else path
    return "".join(char if char.isascii() else "".join(f"%{byte:02X}" for byte in char.encode()) for char in target)


def _plain_host(host: str) -> str:
    """Return a host's name in the letters of DNS; one that has none stays as it was, and equals no listed one."""
    try:
        return host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        return host.lower()


def _refused(sentence: str) -> RequestError:
    return RequestError(400, "url_not_allowed", sentence, param="image")


def is_public(address: str) -> bool:
    """Return whether an address, and every IPv4 address within it, belongs to a public host."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return "%" not in address and all(map(_is_public, _with_embedded(parsed)))


def _is_public(address: Address) -> bool:
    special = address.is_multicast or address.is_reserved or address.is_loopback or address.is_unspecified
    site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not special and not site_local


def _with_embedded(address: Address) -> Iterator[Address]:
    """Yield the addresses that must be public for this one to be: those that it carries, and mostly itself."""
    if isinstance(address, ipaddress.IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
        return
    yield address
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in _COMPATIBLE or any(address in network for network in _NAT64):
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)

"""Who may call: keys, Host and Origin, and the options that decide it."""

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest

from florence2.errors import OptionError
from florence2.serve.app import create_app
from florence2.serve.command import build_parser, read_settings
from florence2.serve.incoming.guard import Guard, is_loopback
from florence2.serve.incoming.log import RequestLog
from florence2.serve.metrics import Metrics
from florence2.serve.settings import Settings
from tests.serve.asgi import call

KEYS = ("first-key", "second-key")
LOG = RequestLog(io.StringIO())


def status(settings: Settings, path: str = "/v1/models", method: str = "GET", **headers: str) -> tuple[int, str]:
    """The status of a request that passes the guard, and who it belongs to."""
    sent: list[dict[str, Any]] = []
    owner = ""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal owner
        owner = scope.get("florence2.owner", "")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    named = {"host": "127.0.0.1:8000", **{name.replace("_", "-"): value for name, value in headers.items()}}
    pairs = [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in named.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(Guard(app, settings, Metrics(settings), LOG)(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], owner


@pytest.mark.parametrize("key", KEYS)
def test_a_right_key(key: str) -> None:
    code, owner = status(Settings(keys=KEYS), authorization=f"Bearer {key}")
    assert code == 200 and owner and key not in owner


def test_clients_of_different_keys_share_no_images() -> None:
    settings = Settings(keys=KEYS)
    assert len({status(settings, authorization=f"Bearer {key}")[1] for key in KEYS}) == 2


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Bearer first", "Bearer first-key2", "Basic first-key", "first-key", "Bearer \udcff"],
)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/version", "/ready", "/openapi.json", "/healthy", "/nothing"]
)
def test_wrong_keys(value: str, path: str) -> None:
    assert status(Settings(keys=KEYS), path, authorization=value)[0] == 401


@pytest.mark.parametrize("path", ["/health", "/", "/page/page.js"])
def test_what_needs_no_key(path: str) -> None:
    assert status(Settings(keys=KEYS), path)[0] == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "127.1.2.3:80", "[::1]:8000", "[::1]"])
def test_names_of_this_machine(host: str) -> None:
    assert is_loopback(host) and status(Settings(), host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.org",
        "127.0.0.1.evil.org",
        "localhost.evil.org",
        "127.0.0.1@evil.org",
        "0.0.0.0",
        "10.0.0.1",
        "[",
        "x/127.0.0.1",
    ],
)
def test_other_names(host: str) -> None:
    assert status(Settings(), host=host)[0] == 403 and status(Settings(local=False), host=host)[0] == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "https://app.example.com"}, 200),
        ({"origin": "https://app.example.com.evil.org"}, 403),
        ({"origin": "https://evil.org"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
    ],
)
def test_pages_of_other_hosts(headers: dict[str, str], code: int) -> None:
    assert status(Settings(origins=("https://app.example.com",)), method="POST", **headers)[0] == code


def test_a_browser_asks_for_permission_without_a_key() -> None:
    app = create_app(lambda: None, Settings(keys=KEYS, origins=("https://app.example.com",)), log=LOG)  # type: ignore[return-value]
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    allowed = call(app, "OPTIONS", "/v1/florence2", origin="https://app.example.com", **asked)
    assert allowed.status == 200 and allowed.headers["access-control-allow-origin"] == "https://app.example.com"
    refused = call(app, "OPTIONS", "/v1/florence2", origin="https://evil.org", **asked)
    assert refused.status == 400 and "access-control-allow-origin" not in refused.headers
    told = call(app, "POST", "/v1/florence2", {}, origin="https://app.example.com")
    assert told.status == 401 and told.headers["access-control-allow-origin"] == "https://app.example.com"


def test_without_permission_no_page_is_let_in() -> None:
    app = create_app(lambda: None, Settings(), log=LOG)  # type: ignore[return-value]
    reply = call(app, "OPTIONS", "/v1/florence2", origin="https://evil.org", access_control_request_method="POST")
    assert reply.status == 403 and "access-control-allow-origin" not in reply.headers
    assert call(app, "GET", "/ready").error["code"] == "loading"


# ---- options -------------------------------------------------------------------------------------------------------


def settings_of(*words: str) -> Settings:
    return read_settings(build_parser().parse_args(words))


def test_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLORENCE2_API_KEYS", raising=False)
    settings = settings_of()
    assert settings.names == ("microsoft/Florence-2-base", "base") and settings.local and not settings.keys
    assert settings == Settings(names=settings.names)


def test_names_of_a_folder_hide_where_it_is(tmp_path: Path) -> None:
    assert settings_of("--model", str(tmp_path), "--served-name", "mine").names == ("mine", tmp_path.name)


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLORENCE2_API_KEYS", "key-number-1, key-number-2")
    assert settings_of("--host", "0.0.0.0").keys == ("key-number-1", "key-number-2")
    (tmp_path / "keys").write_text("key-number-3\n\n")
    assert settings_of("--api-key-file", str(tmp_path / "keys")).keys == ("key-number-3",)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_other_machines_need_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLORENCE2_API_KEYS", raising=False)
    with pytest.raises(OptionError, match="--no-key"):
        settings_of("--host", host)
    assert not settings_of("--host", host, "--no-key").local


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "at most 65535"),
        (["--max-batch", "0"], "--max-batch is 0"),
        (["--queue-mb", "0"], "--queue-mb is 0"),
        (["--cache-mb", "-1"], "--cache-mb is -1"),
        (["--deadline", "0"], "must be positive"),
        (["--deadline", "nan"], "must be positive"),
        (["--drain", "-1"], "--drain is -1"),
        (["--api-key-file", "/nowhere/keys"], "No such file"),
    ],
)
def test_wrong_options(words: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        settings_of(*words)


def test_short_and_missing_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for text, message in (("short\n", "shorter than 8"), ("\n", "holds no key")):
        file.write_text(text)
        with pytest.raises(OptionError, match=message):
            settings_of("--api-key-file", str(file))

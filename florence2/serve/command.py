"""`florence2 serve`: one model for many clients over HTTP."""

import argparse
import ipaddress
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from florence2.checkpoints.hub import NAMES
from florence2.cli.options.arguments import check_at_least, check_devices, check_model, load_model
from florence2.cli.options.groups import add_background, add_calibration, add_devices, add_model, add_weights
from florence2.cli.options.values import name_argument, path_argument
from florence2.errors import OptionError
from florence2.serve.settings import (
    BODY_MIB,
    CACHE_MIB,
    DEADLINE,
    DRAIN,
    MIB,
    PIXELS,
    QUEUE_LENGTH,
    QUEUE_MIB,
    Settings,
)

if TYPE_CHECKING:
    from florence2.pipeline import Florence2

PORT = 8000
_KEYS = "FLORENCE2_API_KEYS"
_SHORTEST_KEY = 8


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 serve",
        description="Serve a model over HTTP: OpenAI's /v1/chat/completions, /v1/florence2 for several tasks on one "
        "image, and a page to try it. Answers are those of `florence2 run`; many requests are answered at once. "
        "Example: florence2 serve --model base --port 8000",
    )
    add_model(parser)
    add_devices(
        parser,
        "several devices, such as cuda:0,cuda:1, each with the model in a process of its own that is started again "
        "when it dies (default: --device, in this process)",
    )
    add_weights(parser)
    add_calibration(parser)
    add_background(parser)
    _add_who(parser)
    _add_limits(parser)
    return parser


def _add_who(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=PORT, help=f"the port; 0 takes a free one (default: {PORT})")
    parser.add_argument(
        "--api-key-file",
        type=path_argument,
        metavar="FILE",
        help=f"keys, one a line; clients must send one of them (default: those in {_KEYS}, separated by commas)",
    )
    parser.add_argument("--no-key", action="store_true", help="let other machines in without a key")
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages that may call the server from a browser, such as https://app.example.com; repeatable",
    )
    parser.add_argument(
        "--allow-url-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch images from this host over https; repeatable (default: URLs are not fetched)",
    )
    parser.add_argument("--allow-url-http", action="store_true", help="fetch them over plain http too")
    parser.add_argument(
        "--served-name",
        action="append",
        default=[],
        type=name_argument,
        metavar="NAME",
        help="a name by which requests may call the model; repeatable",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    def add(option: str, metavar: str, default: float | None, about: str, kind: type = int) -> None:
        said = f" (default: {default:,})" if default is not None else " (default: 8 on a CPU, 64 elsewhere)"
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=about + said)

    add("--max-batch", "N", None, "answers computed at once")
    add("--cache-mb", "MB", CACHE_MIB, "encoded images kept for later requests, in MiB; 0 keeps none")
    add("--max-queue", "N", QUEUE_LENGTH, "requests that may wait; further ones are refused with 429")
    add("--queue-mb", "MB", QUEUE_MIB, "bytes of the images of waiting requests, in MiB")
    add("--max-body-mb", "MB", BODY_MIB, "the longest body of a request, in MiB")
    add("--max-pixels", "N", PIXELS, "the most pixels of an image")
    add("--deadline", "SECONDS", DEADLINE, "time after which a request is given up with 504", float)
    add("--drain", "SECONDS", DRAIN, "time for accepted requests after SIGTERM or Ctrl-C", float)
    parser.add_argument("--log-answers", action="store_true", help="write prompts and answers to the log as well")
    parser.add_argument("--vllm-metrics", action="store_true", help="report metrics under vLLM's names as well")


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal ends it; return 0."""
    options = build_parser().parse_args(arguments)
    settings = read_settings(options)
    check_devices(options)
    check_model(options)
    _check_port(options.host, options.port)
    _limit_decoders(settings.max_pixels)
    from florence2.serve.app import create_app
    from florence2.serve.process import run

    app = create_app(loaders(options), settings)
    run(app, app.state.service, options.host, options.port)
    return 0


def loaders(options: argparse.Namespace) -> "Callable[[], Florence2] | list[tuple[str, Callable[[], Florence2]]]":
    """Return what loads the model, or what loads it on each of `--devices`, by its name."""
    if options.devices is None:
        return partial(load_model, options)
    return [
        (f"{name} ({number})", partial(load_model, argparse.Namespace(**vars(options) | {"device": name})))
        for number, name in enumerate(options.devices, start=1)
    ]


def read_settings(options: argparse.Namespace) -> Settings:
    """Return the settings that the options mean. Raises OptionError for wrong ones."""
    check_at_least(options, 1, "max_batch", "max_queue", "queue_mb", "max_body_mb", "max_pixels")
    check_at_least(options, 0, "cache_mb", "port", "drain")
    if options.port > 65535:
        raise OptionError(f"--port is {options.port}; it must be at most 65535.")
    if not 0 < options.deadline < 1e6 or not options.drain < 1e6:
        raise OptionError("--deadline and --drain are seconds; they must be positive and below 1,000,000.")
    keys = read_keys(options.api_key_file)
    local = is_local(options.host)
    if not local and not keys and not options.no_key:
        raise OptionError(
            f"--host {options.host} lets other machines in. Give them a key with --api-key-file FILE or {_KEYS}, or "
            "say --no-key to let everyone in."
        )
    return Settings(
        names=_names(options),
        max_batch=options.max_batch,
        cache_bytes=options.cache_mb * MIB,
        max_queue=options.max_queue,
        queue_bytes=options.queue_mb * MIB,
        deadline=options.deadline,
        drain=options.drain,
        max_body_bytes=options.max_body_mb * MIB,
        max_pixels=options.max_pixels,
        keys=keys,
        local=local,
        origins=tuple(options.allow_origin),
        url_hosts=tuple(options.allow_url_host),
        url_http=options.allow_url_http,
        log_answers=options.log_answers,
        vllm_metrics=options.vllm_metrics,
    )


def read_keys(file: Path | None) -> tuple[str, ...]:
    """Return the keys of a file, or of the environment. Raises OptionError for a file that cannot be used."""
    if file is None:
        keys = [key.strip() for key in os.environ.get(_KEYS, "").split(",")]
    else:
        try:
            keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
            raise OptionError(f"--api-key-file {file} cannot be read: {reason}.") from None
        if not any(keys):
            raise OptionError(f"--api-key-file {file} holds no key; write one a line.")
    keys = [key for key in keys if key]
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise OptionError(f"An API key is shorter than {_SHORTEST_KEY} characters; make it longer.")
    return tuple(dict.fromkeys(keys))


def is_local(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the model: those given, its Hub id, and the name it was loaded by; never a path."""
    given = options.model
    hub = NAMES.get(given, given)
    own = (hub, given) if not Path(given).exists() else (Path(given).resolve().name,)
    return tuple(dict.fromkeys((*options.served_name, *own)))


def _limit_decoders(most_pixels: int) -> None:
    """Let Pillow refuse images that are larger than their headers say, in this process."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = (most_pixels + 1) // 2  # it raises at twice as many
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _check_port(host: str, port: int) -> None:
    """Raise OptionError where the address cannot be listened on, before the model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise OptionError(
            f"The server cannot listen on {host}, port {port}: {error.strerror or error}. Choose another --host or "
            "--port."
        ) from None

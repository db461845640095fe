"""The page on this machine: one address, no other is asked for anything, neither by the server nor by the browser."""

from __future__ import annotations

import importlib.resources
import ipaddress
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trips.demo.models import Shown
from trips.demo.page import build_page, import_gradio
from trips.demo.uploads import MAX_BYTES
from trips.errors import ConfigError

logger = logging.getLogger("trips")

# The browser itself refuses what the page must never do: ask another address for fonts, scripts or anything.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
_MAX_REQUEST = 2**20  # bytes of a request that is no upload: words, numbers and the name of a file


@contextmanager
def served(shown: Shown, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serve the page as long as the block lasts: its address.

    Args:
        shown: model and index.
        host: address to listen on; by default this machine alone can reach it.
        port: None takes the first that is free from 7860.
    Raises:
        ConfigError: a port that is taken, or an address that is not this machine's.
        MissingDependencyError: gradio is not installed.
    """
    gradio = import_gradio()
    from starlette.middleware import Middleware

    if port is not None and not 0 < port < 65536:
        raise ConfigError("not a port", item="port", found=port, expected="1 to 65535")
    _check_free(host, port)
    if not _is_local(host):
        logger.warning("%s: everyone who reaches this machine can use the page", host)
    with tempfile.TemporaryDirectory(prefix="trips_demo_") as folder, _environment(folder, host):
        page = build_page(shown, folder)
        try:
            _, url, _ = page.launch(
                server_name=f"[{host}]" if ":" in host else host,  # IPv6, as in an address of the web
                server_port=port,
                share=False,
                quiet=True,
                inbrowser=False,
                prevent_thread_lock=True,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                pwa=False,
                footer_links=[],
                max_file_size=MAX_BYTES,
                theme=_theme(gradio),
                css=importlib.resources.files("trips.demo").joinpath("page.css").read_text(encoding="utf-8"),
                app_kwargs={"middleware": [Middleware(_Guarded)]},
            )
        except OSError as error:  # none is free, or it was taken a moment ago
            raise ConfigError(f"cannot be listened on: {error}", item=f"{host}:{port or 7860}") from error
        try:
            yield url
        finally:
            page.close(verbose=False)


@contextmanager
def _environment(folder: str, host: str) -> Iterator[None]:
    """What gradio reads from the environment, as long as the page lasts.

    Uploads lie in a folder of this page alone, which other users of the machine cannot read and which ends with the
    page; gradio's own is one for all. A folder that the user has chosen stays. gradio asks its page whether it is
    there, which no proxy of the network can answer.
    """
    passed = filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", host))
    ours = {"no_proxy": ",".join(passed)}
    if "GRADIO_TEMP_DIR" not in os.environ:
        ours["GRADIO_TEMP_DIR"] = os.path.join(os.path.realpath(folder), "uploads")
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Guarded:
    """ASGI middleware: the policy with every answer, and no request that would have the server fetch an address.

    gradio downloads whatever a request calls the path of a picture. Uploads, which it limits by itself, pass.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        # By its path: what a body is, is said by those who send it.
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].endswith("/gradio_api/upload"):
            await self.app(scope, receive, guarded)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > _MAX_REQUEST:
                await PlainTextResponse("request is too large", 413)(scope, receive, guarded)
                return
        if _names_address(body):
            await PlainTextResponse("hand the picture in: the page fetches nothing", 400)(scope, receive, guarded)
            return
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Any:
            return next(parts, None) or await receive()

        await self.app(scope, replay, guarded)


def _names_address(body: bytes) -> bool:
    """Whether a picture's path is an address, at any depth of a JSON document."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):  # gradio refuses it, too
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str) and "://" in value["path"]:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _theme(gradio: Any) -> Any:
    """gradio's own with the fonts of the visitor's system."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    return gradio.themes.Default(font=sans, font_mono=["ui-monospace", "monospace"], primary_hue="blue")


def _check_free(host: str, port: int | None) -> None:
    """Raise `ConfigError` before the server's own thread fails with a traceback."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no machine can have
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot be listened on: {reason}", item=f"{host}:{port}" if port else host) from error


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""The page on this machine: one address, no other is asked for anything, neither by the server nor by the browser."""

from __future__ import annotations

import importlib.resources
import ipaddress
import logging
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
    with tempfile.TemporaryDirectory(prefix="trips_demo_") as folder:
        page = build_page(shown, folder)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                inbrowser=False,
                prevent_thread_lock=True,
                ssr_mode=False,
                mcp_server=False,
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


class _Guarded:
    """ASGI middleware that sends the policy with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        await self.app(scope, receive, guarded)


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
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot be listened on: {reason}", item=f"{host}:{port}" if port else host) from error


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

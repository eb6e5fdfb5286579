"""Serving the page: one address, the routes that the page needs, and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flowback.app.flows import Flows
from flowback.app.inputs import MOST_BYTES
from flowback.checked import require
from flowback.errors import InputError

if TYPE_CHECKING:
    import uvicorn

__all__ = ["Gate", "listen", "load_gradio", "server"]

ROUTES = (
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
    *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/cancel", "/gradio_api/reset"),
    "/gradio_api/startup-events",
)
"""What the page asks for."""
FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
"""What begins what it asks for."""
MOST_BODY = 2 * (MOST_BYTES * 4 // 3) + 2**16
"""Bytes of a request: two files in base64, and the other fields."""


def load_gradio() -> None:
    """Import Gradio, without its telemetry.

    Raises:
        InputError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError("The app needs Gradio: pip install 'flowback-nf[app]'.") from None


class Gate:
    """Refuses what the page does not ask for: other routes (files, uploads, proxies) and large requests.

    Args:
        app: the ASGI application behind it.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] == "http":
            refused = self._refusal(scope)
            if refused:
                status, text = refused
                headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": text.encode()})
                return
        elif scope["type"] != "lifespan":
            return  # the page uses no WebSocket
        await self.app(scope, receive, send)

    @staticmethod
    def _refusal(scope: dict[str, Any]) -> tuple[int, str] | None:
        path, headers = scope["path"], dict(scope["headers"])
        if ((path.rstrip("/") or "/") not in ROUTES and not path.startswith(FOLDERS)) or ".." in path:
            return 404, "There is nothing here.\n"
        if scope["method"] == "POST":
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                return 411, "State the length of what you send.\n"
            if int(length) > MOST_BODY:
                return 413, f"This is too large; files may have {MOST_BYTES // 2**20} MB.\n"
        return None


def listen(host: str, port: int) -> socket.socket:
    """A socket on this address; port 0 takes a free one.

    Raises:
        InputError: the address cannot be used.
    """
    require(0 <= port < 2**16, f"--port is {port}; ports go from 0 to {2**16 - 1}.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"The app cannot listen on {host}:{port} ({reason}); choose another --port or --host."
        ) from None


def server(flows: Flows) -> uvicorn.Server:
    """The server of an app, not yet started: ``server.run(sockets=[listen(host, port)])``."""
    load_gradio()
    import gradio
    import uvicorn
    from fastapi import FastAPI

    from flowback.app.page import build

    page = build(flows)
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size=1,
        theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
    )
    return uvicorn.Server(
        uvicorn.Config(Gate(app), log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    )

"""``flowback app``: a page in the browser to draw from a flow, and to see how it reads an image."""

from __future__ import annotations

import gc
import ipaddress
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from flowback.cli.console import say
from flowback.cli.options import parse

if TYPE_CHECKING:
    from flowback.app.flows import Flows

__all__ = ["Options", "is_loopback", "run"]


COMES_ALONG = "fashion"
"""The flow that comes with flowback; the others whose names begin with it are of the same data."""


@dataclass(frozen=True)
class Options:
    """Open a page in the browser: draw, follow, read, interpolate, inpaint, and compare two flows.

    Nothing leaves this machine, and only this machine can open the page, unless --host says otherwise.
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """A run's folder, a checkpoint or a name on the Hub, and more of the same data to compare with; left out,
    the flow that comes with flowback."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets everyone in who can reach this machine."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    open: bool = True
    """Open the page in the browser."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


def run(argv: list[str]) -> None:
    """Serve until Ctrl-C."""
    options = parse(Options, argv, "app")
    with _no_collection():
        from flowback.app.server import listen, load_gradio, server

        load_gradio()
    flows = _flows(options)
    with listen(options.host, options.port) as sock:
        serving = server(flows)
        port = sock.getsockname()[1]
        name = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{name}:{port}"
        say(f"{flows.names[0]} is at {address} (Ctrl-C ends it).")
        if not is_loopback(options.host):
            say(f"Everyone who can reach {options.host}:{port} can use it.")
        if options.open:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        serving.run(sockets=[sock])


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for garbage in large imports, a fifth of whose time it takes, nor later in what they left."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _flows(options: Options) -> Flows:
    from flowback import checkpoint
    from flowback.app.flows import Flows
    from flowback.devices import pick_device

    along = [name for name in checkpoint.packaged() if name.startswith(COMES_ALONG)]
    return Flows(options.runs or along, pick_device(options.device))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

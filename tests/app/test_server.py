"""What the server lets through, without Gradio."""

import asyncio
import sys

import pytest

from flowback import InputError
from flowback.app.server import MOST_BODY, Gate, listen, load_gradio


def ask(path, method="GET", **headers):
    """Status and text of an answer; 200 is that of the application behind the gate."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the page"})

    async def send(message):
        sent.append(message)

    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": lines}
    asyncio.run(Gate(app)(scope, None, send))
    return sent[0]["status"], sent[1]["body"].decode()


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/assets/a.js", "/gradio_api/queue/data"])
def test_what_the_page_needs(path):
    assert ask(path) == (200, "the page")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/upload",
        "/gradio_api/proxy=http://example.org",
        "/gradio_api/stream/x",
        "/gradio_api/vibe-code/",
        "/gradio_api/run/draw",
        "/monitoring",
        "/docs",
        "/assets/../../secret",
        "/gradio_api/queue/joins",
    ],
)
def test_nothing_else_is_served(path):
    assert ask(path) == (404, "There is nothing here.\n")
    assert ask(path, "POST", content_length="3")[0] == 404


def test_large_requests_are_refused_before_they_are_read():
    join = "/gradio_api/queue/join"
    assert ask(join, "POST", content_length=str(MOST_BODY)) == (200, "the page")
    assert ask(join, "POST", content_length=str(100 * 2**20)) == (
        413,
        "This is too large; files may have 8 MB.\n",
    )
    for length in ({}, {"content_length": "many"}, {"transfer_encoding": "chunked"}):
        assert ask(join, "POST", **length) == (411, "State the length of what you send.\n")


def test_no_web_socket_gets_through():
    async def app(scope, receive, send):
        pytest.fail("it got through")

    asyncio.run(Gate(app)({"type": "websocket", "path": "/"}, None, None))


def test_a_port_that_is_taken():
    with (
        listen("127.0.0.1", 0) as taken,
        pytest.raises(InputError, match=r"cannot listen on 127.0.0.1:\d+ .*choose another --port"),
    ):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="choose another --port or --host"):
        listen("no such host", 0)
    for port in (-1, 2**16):
        with pytest.raises(InputError, match=f"--port is {port}; ports go from 0 to 65535"):
            listen("127.0.0.1", port)


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"^The app needs Gradio: pip install 'flowback-nf\[app\]'\.$"):
        load_gradio()

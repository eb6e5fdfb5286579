import sys

import pytest

from flowback.cli import serve_app


def test_without_gradio_nothing_is_loaded(flowback, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out, err = flowback("app", tmp_path)
    assert (code, out) == (2, "")
    assert err == "flowback: The app needs Gradio: pip install 'flowback-nf[app]'.\n"


class Found(Exception):  # noqa: N818 - no error
    """Carries the runs out of the verb before it serves them."""


def test_the_runs_are_those_named_or_the_one_that_comes_along(flowback, monkeypatch):
    def stop(runs, device):
        raise Found(*runs)

    monkeypatch.setattr("flowback.app.server.load_gradio", lambda: None)
    monkeypatch.setattr("flowback.app.flows.Flows", stop)
    monkeypatch.setattr("flowback.checkpoint.packaged", lambda: ["digits", "fashion", "fashion-reverse"])
    for words, runs in ((["a", "b"], ("a", "b")), ([], ("fashion", "fashion-reverse"))):
        with pytest.raises(Found) as found:
            flowback("app", *words)
        assert found.value.args == runs


def test_who_can_open_the_page_is_said(monkeypatch):
    assert all(serve_app.is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(serve_app.is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"))

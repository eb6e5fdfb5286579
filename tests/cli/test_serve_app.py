import sys

import pytest

from flowback import InputError
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

    monkeypatch.setattr(serve_app, "load_gradio", lambda: None)
    monkeypatch.setattr(serve_app, "Flows", stop)
    for words, runs in ((["a", "b"], ("a", "b")), ([], ("fashion",))):
        with pytest.raises(Found) as found:
            flowback("app", *words)
        assert found.value.args == runs


def test_where_nothing_comes_along_it_asks_for_a_run(flowback, monkeypatch):
    def missing(runs, device):
        raise InputError(f"No checkpoint at {runs[0]}.")

    monkeypatch.setattr(serve_app, "load_gradio", lambda: None)
    monkeypatch.setattr(serve_app, "Flows", missing)
    assert flowback("app")[0::2] == (2, "flowback: Which flow? Give a run: flowback app runs/mini.\n")
    assert flowback("app", "x")[0::2] == (2, "flowback: No checkpoint at x.\n")


def test_who_can_open_the_page_is_said(monkeypatch):
    assert all(serve_app.is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(serve_app.is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"))

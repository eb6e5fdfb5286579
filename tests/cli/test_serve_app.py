import sys

from flowback.cli import serve_app


def test_without_gradio_nothing_is_loaded(flowback, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out, err = flowback("app", tmp_path)
    assert (code, out) == (2, "")
    assert err == "flowback: The app needs Gradio: pip install 'flowback-nf[app]'.\n"


def test_without_a_run_it_asks_for_one(flowback):
    code, _, err = flowback("app")
    assert code == 2
    assert err == "flowback: Which flow? Give a run: flowback app runs/mini.\n"


def test_who_can_open_the_page_is_said(monkeypatch):
    assert all(serve_app.is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(serve_app.is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"))

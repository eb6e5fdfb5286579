from __future__ import annotations

import logging

from flowback import progress


def test_off_a_terminal_the_log_says_how_far_it_is(caplog, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(progress, "on_terminal", lambda: False)
    with caplog.at_level(logging.INFO, "flowback"):
        assert list(progress.track("abcde", 10, "Letters", step=2)) == list("abcde")
    assert caplog.messages == [
        "Letters: 2 of 10, 0.1 images/s, 0:01:20 left.",
        "Letters: 6 of 10, 0.1 images/s, 0:00:40 left.",
    ]


def test_on_a_terminal_and_in_other_processes_it_does_not(caplog, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.INFO, "flowback"):
        assert list(progress.track("abcde", 5, "Letters")) == list("abcde")
    assert not caplog.messages

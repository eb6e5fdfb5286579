"""What the fuzz tests share: how good files are spoiled, and what must hold of whoever reads them.

A reader gives an InputError of one line, or a right result. It takes at most ``SECONDS`` and ``ROOM`` more
bytes of address space, which is far more than any of the good files needs and far less than the spoiled ones
ask for. The seed is written down here, so that every run of the suite sees the same files; FLOWBACK_FUZZ
asks for another number of them, and FLOWBACK_FUZZ_SEED for others.
"""

import contextlib
import json
import os
import resource
import zlib
from datetime import timedelta
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st

from flowback import InputError

EXAMPLES = int(os.environ.get("FLOWBACK_FUZZ", "25"))
SEED = int(os.environ.get("FLOWBACK_FUZZ_SEED", "0"))
SECONDS = 5
ROOM = 2**30


def fuzz(*strategies):
    """A test that is called with values of these strategies."""
    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=timedelta(seconds=SECONDS),
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )

    def decorate(test):
        return hypothesis.seed(SEED)(settings(hypothesis.given(*strategies)(test)))

    return decorate


@contextlib.contextmanager
def little_room():
    """No more than ``ROOM`` bytes of address space than there are; more is a MemoryError."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(read, *arguments):
    """What a reader gives; None for a refusal, which must be one sentence."""
    try:
        with little_room():
            return read(*arguments)
    except InputError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 2000
    message.encode()  # no odd bytes of a file's name, which would break what prints it
    return None


NUMBERS = [b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"99999999999", b"-1"]
"""What sizes and offsets in headers are replaced by."""


@st.composite
def spoiled(draw, contents):
    """One of the good files, with some bytes changed, lost, repeated or at another place."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        # Headers stand at the start, directories at the end; both get as much as all between.
        last = max(0, len(content) - 1)
        low, high = draw(st.sampled_from([(0, min(64, last)), (0, last), (max(0, last - 200), last)]))
        at = draw(st.integers(low, high))
        kind = draw(st.sampled_from(["change", "change", "number", "cut", "lose", "repeat", "insert"]))
        if kind == "change" and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "number":
            number = draw(st.sampled_from(NUMBERS))
            content[at : at + len(number)] = number
        elif kind == "cut":
            del content[at:]
        elif kind == "lose":
            del content[at : at + draw(st.integers(1, 600))]
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 600))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=20))
    return bytes(content)


def png_header(width, height):
    """The start of a black and white picture of any size, as far as its first data."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\1\0\0\0\0"
    checked = header + zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + checked + b"\0\0\0\x0aIDAT"


def deep(levels):
    """Lists in lists."""
    value = []
    for _ in range(levels):
        value = [value]
    return value


ODD = [
    *(None, True, False, -1, 0, 1, 2, 10**9, 10**30, -(10**400), 1.5, 1e308, float("nan"), float("inf")),
    *("", "0", "../..", "\ud800", "a\nb", "x" * 3000, "NaN", [], {}, [0], [[1, 2]], [None], {"a": 1}),
    *({"1" * 30: "\x1b[2J"}, ["train"] * 3, deep(30), deep(500)),
]


def odd_json(good):
    """A good value with some of its parts replaced, removed or added, at any depth."""
    place = st.lists(st.integers(0, 99), min_size=1, max_size=4)
    kind = st.sampled_from(["replace", "replace", "remove", "add"])
    change = st.tuples(place, kind, st.integers(0, len(ODD) - 1))
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _changed(good, changes))


def _changed(good, changes):
    value = json.loads(json.dumps(good))
    for place, kind, number in changes:
        parent, key = None, None
        inner = value
        for step in place:
            if not isinstance(inner, (dict, list)) or not inner:
                break
            parent = inner
            key = sorted(parent)[step % len(parent)] if isinstance(parent, dict) else step % len(parent)
            inner = parent[key]
        odd = json.loads(json.dumps(ODD[number]))  # new each time: it may be changed again
        if parent is None:  # nothing is left of it
            continue
        if kind == "replace":
            parent[key] = odd
        elif kind == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[ADDED[number % len(ADDED)]] = odd
        else:
            parent.insert(0, odd)
    return value


ADDED = ["", "extra", "format", "x\ud800", "a\nb"]
"""Names of what is added."""

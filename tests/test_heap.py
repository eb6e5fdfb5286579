"""Freed memory stays with the process: no page is mapped twice."""

import ctypes
import os
import platform

import pytest

from flowback import heap
from runs import run_code

CODE = """
import resource, sys, torch
from flowback import heap
if sys.argv[1] == "keep":
    assert heap.keep_freed()

def work():
    arrays = [torch.ones(2_000_000) for _ in range(10)]  # 8 MB each
    return [array + 1 for array in arrays]

for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = run_code(CODE, mode, environment=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_mapped_once():
    """Of 3 x 160 MB, 117,000 pages; a few thousand may come from elsewhere."""
    assert 5 * faults("keep") < faults("leave")


def test_thresholds_of_the_environment_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    heap.keep_freed.cache_clear()
    assert not heap.keep_freed()
    heap.keep_freed.cache_clear()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # no mallopt
    heap.keep_freed.cache_clear()
    assert not heap.keep_freed()
    heap.keep_freed.cache_clear()

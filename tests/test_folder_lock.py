"""One process at a time in a folder; a kill releases it, and the second one learns who is there."""

import errno
import fcntl
import json
import logging
import os
import platform
import subprocess
import sys

import pytest

from flowback import InputError, folder_lock
from flowback.folder_lock import LOCK_FILE

lock = folder_lock.folder_lock


def test_the_second_is_told_who_holds_it(tmp_path):
    with (
        lock(tmp_path),
        pytest.raises(
            InputError, match=rf"in use by process {os.getpid()} on {platform.node()} since \d{{4}}-.*`"
        ),
        lock(tmp_path),
    ):
        pass
    with lock(tmp_path):
        assert (tmp_path / LOCK_FILE).is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_only_the_main_process_of_a_job_locks(tmp_path):
    with lock(tmp_path), lock(tmp_path, active=False):
        pass


def test_a_kill_releases_it(tmp_path):
    """In a process of its own: the system lets go, and the name left behind is no lock."""
    holds = (
        "import sys; from pathlib import Path; from flowback.folder_lock import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {other.pid} on"), lock(tmp_path):
            pass
        other.kill()
        other.wait()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == other.pid
        with lock(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()


def test_a_forked_process_does_not_keep_it(tmp_path, monkeypatch):
    """What runs in the child after a fork: its copy of the lock's file is closed, and nothing is removed."""
    with lock(tmp_path):
        copies = {os.dup(handle) for handle in folder_lock._held}
        with monkeypatch.context() as child:
            child.setattr(folder_lock, "_held", copies)
            folder_lock._leave_locks()
            assert folder_lock._held == set()
        for handle in copies:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(handle)
        assert (tmp_path / LOCK_FILE).is_file()


def test_a_lock_whose_file_was_removed_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder may end and remove it."""
    flock, removed = fcntl.flock, []

    def late(handle, how):
        if not removed:
            removed.append(handle)
            (tmp_path / LOCK_FILE).unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock(tmp_path), pytest.raises(InputError, match="in use"), lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path):
        pass
    assert f"The file system of {tmp_path} has no locks" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "said"), [("another-machine", "was last used by process 7 on another-machine"), (None, "")]
)
def test_a_name_left_by_another_machine_is_told(tmp_path, caplog, host, said):
    """Its locks may not reach this machine; of this one, only a kill leaves a name behind."""
    left = {"process": 7, "host": host or platform.node(), "since": "2026-01-01", "command": "flowback"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(left))
    with caplog.at_level(logging.WARNING, "flowback"), lock(tmp_path):
        pass
    assert (said in caplog.text) if said else not caplog.text


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be written"), lock(tmp_path / "file" / "new"):
        pass

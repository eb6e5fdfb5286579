"""One process at a time writes into a folder: a lock that a kill releases, and that says who holds it.

The lock is the system's own, on the file ``.flowback.lock`` in the folder: flock; on Windows, a locked byte.
It ends with the process, however that ends. Between machines it holds as far as the file system passes locks
on: NFS does (version 4, or 3 with its lock service), Lustre if it is mounted with ``flock``. Where there are
no locks, a warning says so. Where locks stay on each machine, both processes get one; then the second only
finds the first one's name in the file, and warns.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import sys
import textwrap
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from flowback.errors import InputError

__all__ = ["LOCK_FILE", "folder_lock"]

log = logging.getLogger("flowback")

LOCK_FILE = ".flowback.lock"

_HELD_BY_OTHERS = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""What the system answers where another process has the lock; all else means that there are no locks."""

_held: set[int] = set()
"""Open files of this process's locks."""


@contextlib.contextmanager
def folder_lock(folder: Path, active: bool = True) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made if it is not there, and removed if it stays empty.

    Args:
        folder: where the process is going to write.
        active: False does nothing: of several processes that share a job, only the main one locks.

    Raises:
        InputError: another process holds the lock, or the folder cannot be written.
    """
    if not active:
        yield
        return
    file = folder.absolute() / LOCK_FILE
    new = [place for place in file.parents if not place.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(file)
    except OSError as error:
        _remove(new)
        raise InputError(
            f"--out {folder} cannot be written: {error.strerror}; choose another folder."
        ) from None
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:  # a forked process may come here, too; the lock is not its own
            _held.discard(handle)
            with contextlib.suppress(OSError):
                file.unlink()  # before the lock goes: afterwards the file may be somebody else's
            os.close(handle)
            _remove(new)


def _locked(file: Path) -> int:
    """The open file, locked, with the name of this process in it."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            before = _holder(handle)
            _lock(handle)
        except OSError as error:
            if error.errno in _HELD_BY_OTHERS:
                os.close(handle)
                raise InputError(
                    f"{file.parent} is in use by {_named(before)}; wait until it ends, stop it, or choose "
                    "another --out."
                ) from None
            log.warning(
                "The file system of %s has no locks (%s); do not start another command on this folder.",
                *(file.parent, error.strerror),
            )
            return handle
        if _is_still(file, handle):
            break
        os.close(handle)  # whoever held it has removed it
    if before.get("host", platform.node()) != platform.node():
        log.warning(
            "%s was last used by %s, which left no sign of its end; if it still runs, stop one of the two.",
            *(file.parent, _named(before)),
        )
    _write_holder(handle)
    return handle


def _write_holder(handle: int) -> None:
    holder = {
        "process": os.getpid(),
        "host": platform.node(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(holder).encode() + b"\n")


def _holder(handle: int) -> dict[str, object]:
    """Who wrote into the file; nothing where nobody did, or only half of it."""
    try:
        holder = json.loads(os.read(handle, 2**16))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _named(holder: dict[str, object]) -> str:
    if not holder:
        return "another process"
    command = textwrap.shorten(str(holder.get("command")), 60, placeholder=" ...")
    return (
        f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')} (`{command}`)"
    )


def _is_still(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove(folders: list[Path]) -> None:
    """Those that are empty, from the innermost out."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _lock(handle: int) -> None:
    """Take the lock, or raise OSError."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 2**30, os.SEEK_SET)  # far behind the text, which others must be able to read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        return
    try:
        import fcntl
    except ModuleNotFoundError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave_locks() -> None:
    """In a forked process, so that none outlives the process that took it."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)

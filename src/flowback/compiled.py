"""Code in C++ that is built with the machine's compiler, once, and then called.

A library lies in the cache folder, in a folder of mode 0700, under a name made of the sources, the compiler,
the processor and its own content: a file that was tampered with or cut short is built anew. Where that folder
cannot be used, each process builds a library of its own. Where there is no compiler, or FLOWBACK_NATIVE=0 is
set, :func:`load_library` returns None, and PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from flowback.files import cache_folder, file_hash

__all__ = ["load_library"]

_HEADER = Path(__file__).with_name("kernels.h")
"""Which every source may include."""

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-std=c++17")
_OPENMP = "-fopenmp"
"""Left out where the compiler refuses it, as Apple's does: one thread decodes."""
_LIMIT = 120
"""Seconds that the compiler may take."""

_log = logging.getLogger(__name__)


class _CompilerError(Exception):
    """What the compiler said."""


def load_library(source: Path, name: str, check: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL | None:
    """The library of a source; None if there is no compiler, or it fails.

    Args:
        source: a file in C++.
        name: what it is, for warnings.
        check: declares its functions; raises OSError if the library is not what the caller expects.
    """
    if os.environ.get("FLOWBACK_NATIVE") == "0":
        return None
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "")
    if not compiler:
        return None
    try:
        try:
            return _load(_compiled(source, compiler, _private_folder()), check)
        except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
            _log.warning("%s is compiled for this process alone: %s", name, error)
        with tempfile.TemporaryDirectory() as temporary:
            return _load(_compiled(source, compiler, Path(temporary)), check)  # once loaded, the file can go
    except (OSError, subprocess.TimeoutExpired, _CompilerError) as error:
        _log.warning("%s could not be compiled, PyTorch works instead: %s", name, error)
        return None


def _private_folder() -> Path:
    """The folder of the compiled library: the user's own, which nobody else can write.

    Raises:
        OSError: it cannot be made, or others can write it.
        RuntimeError: there is no cache folder, since the user has no home.
    """
    folder = cache_folder() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise OSError(f"{folder} is not a folder")
    if hasattr(os, "getuid"):  # elsewhere modes say nothing
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise OSError(f"others can write {folder}; remove it")
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    return folder


def _compiled(source: Path, compiler: list[str], folder: Path) -> Path:
    """The library's file in a folder; compiled if it is not there, or its content not what its name says."""
    version = _run([*compiler, "--version"])
    text = (
        source.read_bytes() + _HEADER.read_bytes() + version.encode() + " ".join((*_FLAGS, _OPENMP)).encode()
    )
    key = hashlib.sha256(text + _processor().encode()).hexdigest()[:16]
    for file in folder.glob(f"{source.stem}-{key}-*.so"):
        if file == folder / _file_name(source, key, file):
            return file
        file.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        compiled = Path(temporary) / "library.so"
        command = [*compiler, *_FLAGS, f"-I{_HEADER.parent}", str(source), "-o", str(compiled)]
        try:
            _run([*command, _OPENMP])
        except _CompilerError:
            _run(command)
        return compiled.replace(folder / _file_name(source, key, compiled))


def _file_name(source: Path, key: str, file: Path) -> str:
    return f"{source.stem}-{key}-{file_hash(file)[:32]}.so"


def _run(command: list[str]) -> str:
    """What a command of the compiler prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LIMIT)
    except OSError as error:
        raise _CompilerError(str(error)) from None
    if done.returncode:
        lines = done.stderr.splitlines() or [f"{command[0]} ended with code {done.returncode}"]
        raise _CompilerError(next((line for line in lines if "error" in line), lines[0]).strip())
    return done.stdout


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine() + platform.processor()


def _load(file: Path, check: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(file))
    check(loaded)
    return loaded

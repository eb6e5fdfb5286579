"""What Linux has and macOS or Windows have not: stubbed away, the package imports, trains and samples."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flowback import devices

WITHOUT = """
import ctypes, mmap, os, signal, sys
import accelerate, matplotlib.pyplot, sklearn.datasets, timm, torch, torchvision, tyro  # see to themselves

try:
    import gradio
except ModuleNotFoundError:  # then the page of the app is left out below
    gradio = None

for module in ("resource", "fcntl", "grp", "pwd", "termios"):
    sys.modules[module] = None
for module, names in {
    os: ("sched_getaffinity", "fchmod", "fork", "getuid", "geteuid", "getpgid", "killpg"),
    signal: ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM"),
    mmap: [name for name in vars(mmap) if name.startswith("MADV")],
}.items():
    for name in names:
        delattr(module, name)

def refuse(name, *arguments, load=ctypes.CDLL, **named):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    return load(name, *arguments, **named)

ctypes.CDLL = refuse
"""
IMPORT = """
import importlib, pkgutil, flowback

for module in pkgutil.walk_packages(flowback.__path__, "flowback."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
"""
TRAIN = """
from flowback.cli import main

small = "--train.steps 4 --train.save-every 2 --train.eval-every 4 --train.eval-images 8".split()
assert main(["train", "digits-mini", "--out", "run", "--train.device", "cpu", *small]) == 0
assert main(["sample", "run", "--out", "samples", "--count", "2", "--device", "cpu"]) == 0
"""


def python(code, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLOWBACK_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_module_imports_without_what_windows_lacks(tmp_path):
    python(WITHOUT + IMPORT, tmp_path)


def test_digits_train_and_sample_without_what_windows_lacks(tmp_path):
    python(WITHOUT + TRAIN, tmp_path)
    assert len(list((tmp_path / "samples").rglob("*.png"))) == 2


def test_cores_where_the_system_does_not_say_which(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert devices.cpu_cores() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert devices.cpu_cores() == 1


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_text_is_utf8_whatever_the_system_prefers(tmp_path, mode):
    text = "Fréchet ± σ"
    code = (
        "import pathlib, sys\nfrom flowback import files\n"
        f"with files.replacing(pathlib.Path('file'), {mode!r}) as file:\n"
        f"    file.write({text!a}{'.encode()' if 'b' in mode else ''})"
    )
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "file").read_bytes() == text.encode()

"""The command ``flowback``: one thin module for each verb, loaded when it is called.

A verb's module imports at its top only what its options need. What does the work is imported by the functions
that do it, so that help and refused options come at once: PyTorch alone takes seconds to import.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from flowback.cli.console import columns, discard_output, say, wrapped
from flowback.errors import InputError, Interrupted, ProcessLostError, nearest

__all__ = ["VERBS", "main"]

VERBS = {
    "demo": ("demo:run", "train on real digits without and with reverse alignment, and report"),
    "prepare": ("prepare:run", "bring a data set to the training size, once"),
    "train": ("train:run", "train a flow from a preset; the same command resumes"),
    "distil": ("distil:run", "train a student that draws a checkpoint's images in one or a few passes"),
    "sample": ("sample:run", "draw images from a checkpoint, or from a flow that comes along"),
    "plan": ("plan:run", "measure how to sample a checkpoint fastest on this device"),
    "classify": ("classify:run", "classify images with a flow's own gradient"),
    "app": ("serve_app:run", "a page in the browser: draw, read an image, interpolate, inpaint, compare"),
    "evaluate": ("evaluate:run", "quality and likelihood of a checkpoint"),
    "probe": ("probe:run", "linear probes of every block and layer"),
    "compare": ("compare:run", "two evaluation records side by side"),
    "plot": ("plot:run", "draw how runs went"),
    "info": ("info:run", "what a run or a checkpoint is, or what this machine has"),
    "cache": ("cache:run", "show or clear what is kept for later runs"),
    "presets": ("list_presets:run", "list the presets"),
    "push": ("push:run", "publish a flow with its model card on the Hugging Face Hub"),
    "reproduce": ("reproduce:run", "train and evaluate the rows of a table, and fill it in"),
    "completion": ("completion:run", "print a script for the shell's completion"),
    "import-tarflow": ("convert:run_import", "read weights of the original TARFlow or iTARFlow code"),
    "export-tarflow": ("convert:run_export", "write a checkpoint for that code"),
}
"""Each verb's function, as module:function of this package, and what it does. The options of `run` are the
class `Options` beside it, those of `run_import` the class `ImportOptions`."""

TASKS = {
    "Try it out": ("flowback demo", ("demo", "presets")),
    "Train": (
        "flowback train digits-mini --out runs/mini",
        ("prepare", "train", "distil", "plot", "reproduce"),
    ),
    "Draw images": ("flowback sample fashion --count 64", ("sample", "app", "plan")),
    "Classify": ("flowback classify fashion --images photo.png", ("classify", "probe")),
    "Measure": ("flowback evaluate runs/mini --samples 1000", ("evaluate", "compare")),
}
"""What people do: an example, and the verbs for it. All other verbs are shown after these."""

RESUMES = ("train", "distil", "prepare", "sample", "reproduce", "demo")
"""Verbs that find what an earlier call wrote, and go on with it."""
REPORTS = ("evaluate", "classify", "probe", "plan")
"""Verbs that write a report at their end; what is kept for later runs is found again."""

BAD_INPUT = 2
"""Exit code for options, files or data that the user can fix."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, or a limit on file size."""
UNUSABLE = (
    *(*FULL, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO),
)
"""Those, a missing permission, a file in the way or a disk that fails, in reading as in writing."""
READER_GONE = 141
"""Exit code of a command whose output nobody reads any more, as of one that SIGPIPE ended."""
INTERRUPTED, PROCESS_LOST, STOPPED = 75, 74, 130
"""Exit codes of a run stopped by SIGINT or SIGTERM after saving (EX_TEMPFAIL: run it again to continue), and
of one that lost a process (EX_IOERR), and of one that was stopped at once (128 and SIGINT)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        say(_overview())
        return BAD_INPUT
    if arguments[0] in ("-h", "--help"):
        say(_usage())
        return 0
    if arguments[0] == "--version":
        from flowback import __version__

        sys.stdout.write(f"flowback {__version__}\n")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        return _refuse(f"There is no verb {verb!r}; {nearest(verb, VERBS)}")
    logging.basicConfig(format="flowback: %(message)s", level=logging.WARNING)
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("flowback").setLevel(logging.INFO)
    module, function = VERBS[verb][0].split(":")
    run = getattr(importlib.import_module(f"flowback.cli.{module}"), function)
    try:
        run(arguments[1:])
        return 0
    except InputError as error:
        return _refuse(str(error))
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # once, whatever the number of processes
            sys.stderr.write(f"flowback: {stop}. Run the same command again to continue.\n")
        return INTERRUPTED
    except ProcessLostError as lost:
        sys.stderr.write(f"flowback: {lost}; run the same command again to continue.\n")
        return PROCESS_LOST
    except BrokenPipeError:
        discard_output()
        return READER_GONE
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        file, reason = error.filename or "A file", os.strerror(error.errno)
        if error.errno in FULL:
            return _refuse(f"{file} cannot be written: {reason}; make room, or choose another place.")
        return _refuse(f"{file} cannot be used: {reason}; change that, or choose another place.")
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"flowback: Stopped by Ctrl-C{_after_stop(verb)}.\n")
        return STOPPED


def _after_stop(verb: str) -> str:
    """What a verb that was stopped leaves, and how it goes on: the rest of a sentence."""
    if verb in RESUMES:
        return "; what is written is kept. Run the same command again to continue"
    return ", without a report. Run the same command again: it begins anew" if verb in REPORTS else ""


def _refuse(message: str) -> int:
    sys.stderr.write(f"flowback: {message}\n")
    return BAD_INPUT


def _overview() -> str:
    """What people do, with an example each."""
    width = max(map(len, TASKS))
    lines = [f"  {task:<{width}}  {example}" for task, (example, _) in TASKS.items()]
    return "\n".join(
        [
            *wrapped("flowback trains normalizing flows that generate images and understand them."),
            "",
            *(lines if max(map(len, lines)) <= columns() else _stacked()),
            "",
            *wrapped("flowback --help lists all verbs, flowback VERB --help the options of one."),
        ]
    )


def _stacked() -> list[str]:
    """The examples below their tasks, for narrow terminals; a command stays whole, to be copied."""
    return [line for task, (example, _) in TASKS.items() for line in (f"  {task}", f"    {example}")]


def _usage() -> str:
    """All verbs, by what they are for."""
    width = max(map(len, VERBS))
    lines = ["usage: flowback VERB [options]"]
    grouped = {verb for _, verbs in TASKS.values() for verb in verbs}
    others = ("", [verb for verb in VERBS if verb not in grouped])
    for task, (example, verbs) in [*TASKS.items(), ("Also", others)]:
        lines += ["", *wrapped(f"{task}: {example}" if example else f"{task}:", indent=2)]
        for verb in verbs:
            lines += wrapped(f"  {verb:<{width}}  {VERBS[verb][1]}", indent=width + 4)
    return "\n".join([*lines, "", *wrapped("flowback VERB --help shows the options of a verb.")])

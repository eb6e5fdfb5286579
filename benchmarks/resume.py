"""The loss of a run on two processes, killed half-way and finished by one, against that of a run left alone.

    python benchmarks/resume.py --json resume.json --plot resume.svg

Both are the command `flowback train`; the kill is SIGKILL to the launcher and all of its workers, at the
first row of metrics after ``--kill-after``. ``largest_difference`` is that of the losses at equal steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import torch
import tyro
from rich.console import Console

from flowback import checkpoint
from flowback.files import replacing
from harness import write_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PATIENCE = 600
"""Seconds after which a run that does not come to its kill is given up."""


@dataclass(frozen=True)
class Options:
    """Kill two processes and finish with one."""

    json: Path | None = None
    """The file to write."""
    plot: Path | None = None
    """The picture to write (.svg)."""
    preset: str = "digits-mini"
    """What is trained."""
    steps: int = 1500
    """Steps of each run."""
    kill_after: int = 750
    """Step after which the two processes are killed."""
    processes: int = 2
    """Processes before the kill."""


def command(out: Path, options: Options, processes: int) -> list[str]:
    """The training command."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["-m", "flowback", "train", options.preset, "--out", str(out)]
    words += ["--train.steps", str(options.steps), "--train.device", "cpu"]
    return [sys.executable, *(launcher if processes > 1 else []), *words]


def losses(out: Path) -> dict[int, float]:
    """Training loss by step, of the rows that are whole."""
    file, found = out / "metrics.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.endswith("}") and "nll" in (row := json.loads(line)):
            found[row["step"]] = row["nll"]
    return found


def kill(run: subprocess.Popen) -> None:
    """SIGKILL to a process and all that it started."""
    everyone = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    for process in everyone:
        process.kill()
    psutil.wait_procs(everyone)
    run.wait()


def killed_and_resumed(out: Path, options: Options, environment: dict[str, str]) -> dict[str, Any]:
    """Losses before and after the kill, and where it went on."""
    run = subprocess.Popen(
        command(out, options, options.processes), env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + PATIENCE
    while max(losses(out), default=0) < options.kill_after:
        if run.poll() is not None or time.monotonic() > deadline:
            sys.exit("The run ended, or took too long, before its kill; lower --kill-after.")
        time.sleep(0.05)
    kill(run)
    before = losses(out)
    resumed_at = int(checkpoint.resolve(out).name.removeprefix("step-"))
    subprocess.run(command(out, options, 1), env=environment, stdout=subprocess.DEVNULL, check=True)
    first = json.loads((out / "environment.json").read_text())
    every = (first, *first["resumed"])
    starts = [{"step": start.get("step", 0), "processes": start["processes"]} for start in every]
    return {"before": before, "after": losses(out), "resumed_at": resumed_at, "starts": starts}


def draw(path: Path, whole: dict[int, float], cut: dict[str, Any], options: Options) -> None:
    """Both curves, and the kill."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.plot([*whole.keys()], [*whole.values()], color="0.7", linewidth=4, label="one process, left alone")
    colours = (
        ("before", f"{options.processes} processes, killed", "C0"),
        ("after", "then one process", "C3"),
    )
    for name, label, colour in colours:
        points = {
            step: value for step, value in cut[name].items() if name == "before" or step > cut["resumed_at"]
        }
        axes.plot([*points.keys()], [*points.values()], color=colour, linewidth=1, label=label)
    axes.axvline(cut["resumed_at"], color="0.5", linestyle=":", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("training nll (nats/dim)")
    axes.legend(frameon=False)
    with replacing(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:])
    plt.close(figure)


def main() -> None:
    """Train, kill, finish, compare."""
    options = tyro.cli(Options, prog="resume.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            command(folder / "whole", options, 1), env=environment, stdout=subprocess.DEVNULL, check=True
        )
        whole = losses(folder / "whole")
        cut = killed_and_resumed(folder / "cut", options, environment)
    if whole.keys() != cut["after"].keys():
        sys.exit("The two runs have rows of different steps.")
    difference = max(abs(whole[step] - cut["after"][step]) for step in whole)
    last = f"{whole[options.steps]:.4f} and {cut['after'][options.steps]:.4f}"
    Console().print(
        f"Killed after step {max(cut['before'])}, gone on from step {cut['resumed_at']}; "
        f"largest difference of the losses {difference:.2g}, last losses {last}"
    )
    if options.plot:
        draw(options.plot, whole, cut, options)
    if options.json:
        rows = [{"step": step, "whole": whole[step], "cut": cut["after"][step]} for step in whole]
        more = {"resumed_at": cut["resumed_at"], "killed_after": max(cut["before"]), "starts": cut["starts"]}
        settings = {"preset": options.preset, "steps": options.steps, "processes": options.processes}
        write_rows(
            options.json,
            torch.device("cpu"),
            rows,
            settings=settings,
            **more,
            before_the_kill=cut["before"],
            largest_difference=difference,
        )


if __name__ == "__main__":
    main()

"""Training runs in processes of their own, which tests kill, stop and starve.

They are forked from a server that has imported everything, so that each is there in a moment.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ("pytest", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo", "flowback.cli.train")
CONTEXT.set_forkserver_preload([*PRELOADED])


def start(job: Callable, *arguments, log: Path, processes: int = 1) -> list[BaseProcess]:
    """Run ``job(*arguments)`` in processes that know of each other as torchrun's do.

    What process r prints goes to ``log``.r; what the job returns is the exit code.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        CONTEXT.Process(target=_process, args=(job, arguments, rank, processes, port, log))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return started


def run(job: Callable, *arguments, log: Path, processes: int = 1, limit: float = 120) -> list[int | None]:
    """Exit codes of :func:`start`'s processes; what has not ended after ``limit`` seconds is killed: None."""
    started = start(job, *arguments, log=log, processes=processes)
    for process in started:
        process.join(limit)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    return codes


def run_code(
    code: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter that finds what this one does, in its environment or another."""
    variables = dict(os.environ) if environment is None else environment
    variables = variables | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def printed(log: Path, rank: int = 0) -> str:
    """What a process printed."""
    return log.with_name(f"{log.name}.{rank}").read_text()


def _process(job: Callable, arguments: tuple, rank: int, processes: int, port: int, log: Path) -> None:
    import torch

    handle = os.open(log.with_name(f"{log.name}.{rank}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for output in (1, 2):
        os.dup2(handle, output)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        os.environ["WORLD_SIZE"] = str(processes)
    sys.exit(job(*arguments))


def tiny_config():
    """A run of a second: 12 steps, a save and a look every 4."""
    from flowback.config import DataConfig, ModelConfig, RunConfig, TrainConfig

    return RunConfig(
        model=ModelConfig(
            image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=10
        ),
        data=DataConfig(flip=True),
        train=TrainConfig(
            steps=12,
            batch_size=16,
            lr=1e-2,
            warmup_steps=3,
            ema_decay=0.9,
            log_every=4,
            eval_every=4,
            save_every=4,
            device="cpu",
        ),
    )


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of the rows of metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("nll", row.get("loss"))) for row in rows if "lr" in row]


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit: averaged weights, raw weights and the optimiser's state."""
    import torch

    from flowback import checkpoint, load

    first, second = (checkpoint.load_training_state(checkpoint.resolve(run)) for run in (one, two))
    averages = (load(run).state_dict() for run in (one, two))
    for before, after in ((first["objective"], second["objective"]), tuple(averages)):
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name
    for index, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][index][name]), (index, name)
    assert first["step"] == second["step"]


def assert_near(one: Path, two: Path, ema: float | None = None) -> None:
    """The same run but for the order of sums.

    Losses to 1e-4 and all weights but the keys' biases to 1e-3, in fp32 after 12 steps at the large rate of
    1e-2. The gradient of a key's bias is zero but for rounding, which Adam blows up to whole steps; outputs
    do not depend on it.
    """
    import torch

    from flowback import load

    compared = ("nll", "loss", "alignment", "cosine", "z2", "h2", "log_scale", "grad_norm")
    rows = ((run / "metrics.jsonl").read_text().splitlines() for run in (one, two))
    for first, second in zip(*(map(json.loads, lines) for lines in rows), strict=True):
        assert first.keys() == second.keys()
        assert first["step"] == second["step"]
        for name in first:
            if name.startswith(compared):
                assert abs(second[name] - first[name]) < 1e-4 + 1e-3 * abs(first[name]), name
    before, after = (load(run, ema=ema).state_dict() for run in (one, two))
    for name, value in before.items():
        other = after[name]
        if name.endswith("qkv.bias"):  # queries, keys, values
            value, other = (torch.cat(list(bias.chunk(3))[::2]) for bias in (value, other))
        torch.testing.assert_close(other, value, rtol=0, atol=1e-3, msg=name)


# --- jobs ---


def command(*words: str) -> int:
    """The command line."""
    from flowback.cli import main

    return main(list(words))


def limited(size: int, *words: str) -> int:
    """The command with no file above ``size`` bytes: writes fail in the middle, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return command(*words)


def unprivileged(config, before: Path, out: Path) -> int:
    """Train into ``before``, and then, as somebody who may write nothing there, into ``out``.

    Permissions do not bind root. What the second run reads, the first has read, as it may be root's alone.
    """
    from flowback import InputError
    from flowback.training import train_loop

    images = digits(config)
    train_loop(config, images, before)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        train_loop(config, images, out)
    except InputError as error:
        print(error)  # noqa: T201
        return 2
    return 0


def digits(config):
    """The images of a run."""
    from flowback.data.load import load_images

    return load_images(config.data, config.model.image_size, config.model.channels, "train")


def training(config, out: Path, *, targets=None, evaluators=(), images=None) -> int:
    """Train on the digits; 75 if a signal stopped it, 74 if another process is gone, as the command."""
    from flowback.errors import Interrupted, ProcessLostError
    from flowback.training import train_loop

    try:
        row = train_loop(config, images or digits(config), out, targets, evaluators)
    except Interrupted:
        return 75
    except ProcessLostError as lost:
        print(f"lost: {lost}")  # noqa: T201
        return 74
    print(row["step"])  # noqa: T201
    return 0


def compiled(config, out: Path) -> int:
    """Train with bodies that are traced, and run by PyTorch's own kernels: a compiler would take a minute."""
    from torch import nn
    from torch._dynamo.utils import counters

    from flowback.nn.transformer import Transformer

    Transformer.compile = lambda body: nn.Module.compile(body, backend="aot_eager")
    code = training(config, out, targets=RandomTargets())
    print(counters["stats"]["unique_graphs"])  # noqa: T201
    return code


def counting(config, out: Path) -> int:
    """Train, and print how many moments there were, in all and while saving."""
    moments = [0, 0]

    def count(saving: bool) -> None:
        moments[0] += 1
        moments[1] += saving

    images = digits(config)
    with _moments(count):
        training(config, out, images=images)
    print(*moments)  # noqa: T201
    return 0


def killed(config, out: Path, moment: int, saving: bool) -> int:
    """Train until kill -9 at a moment, of all or of those while saving."""
    left = itertools.count(moment, -1)

    def count(now: bool) -> None:
        if (now or not saving) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    images = digits(config)
    with _moments(count):
        return training(config, out, images=images)


@contextlib.contextmanager
def _moments(call: Callable[[bool], None]):
    """Call at every call and return of a function, Python's or C's, with whether it is part of a save.

    Checkpoints are written in a thread of their own, which starts while this holds.
    """
    within = threading.local()

    def profile(frame, event, argument) -> None:
        code, depth = frame.f_code, getattr(within, "depth", 0)
        if code.co_name == "save" and code.co_filename.endswith("checkpoint.py"):
            within.depth = depth = depth + {"call": 1, "return": -1}.get(event, 0)
        call(depth > 0)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


# --- what can be handed to them ---


class RandomTargets:
    """Features that depend on the image only."""

    dim = 6
    originals = None

    def __call__(self, indices, flipped, seen):
        import torch

        tokens = seen.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(seen), 4, 16)
        generator = torch.Generator().manual_seed(0)
        return torch.tanh(tokens @ torch.randn(16, self.dim, generator=generator))


class Trouble:
    """Targets that nobody aligns with: at batch ``call``, counted from 1, they send a process a signal.

    ``after`` is a file that is waited for: checkpoints are written while the training goes on.
    """

    dim = 6
    originals = None

    def __init__(self, call: int, signal: int, rank: int, after: Path | None = None) -> None:
        self.call, self.signal, self.rank, self.after = call, signal, rank, after

    def __call__(self, indices, flipped, seen):
        self.call -= 1
        if self.call == 0 and os.environ.get("RANK", "0") == str(self.rank):
            while self.after is not None and not self.after.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), self.signal)
        return seen.new_zeros(len(seen), 4, self.dim)


def encode_pickled(pickled: bytes, file: Path) -> int:
    """Encode with a flow that came as bytes: (flow, images, labels)."""
    import pickle

    import torch

    flow, images, labels = pickle.loads(pickled)
    torch.save(flow(images, labels).z.detach(), file)
    return 0


def compiled_and_plain() -> int:
    """0 if a flow compiled as one graph gives the plain one's density and gradients, in float64 to 1e-12."""
    import torch

    from flowback import Flow

    torch.manual_seed(0)
    flow = Flow(tiny_config().model).double()
    images, labels = torch.rand(3, 1, 8, 8).double(), torch.tensor([2, 0, 1])
    compiled = torch.compile(flow, backend="aot_eager", fullgraph=True)  # without slow code generation
    found = []
    for module in (flow, compiled):
        loss = module(images, labels).log_prob.sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(flow.parameters()))])
    return int(not all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*found, strict=True)))


def interrupt(step, flow):
    """Of an evaluator: stop without saving."""
    raise KeyboardInterrupt

"""Two processes that share one flow (FSDP2 on the CPU, gloo) against one that has all of it."""

import dataclasses
import functools
import json
import math

import pytest
import torch

import runs
import sharded
from flowback import Flow, InputError, StudentConfig, checkpoint
from flowback.config import AlignmentConfig, TrainConfig
from flowback.sampling.block_plan import weights_hash
from flowback.training import Evaluator, distributed, start, train_loop
from flowback.training.objective import Objective

EVALUATOR = Evaluator(6, sharded.held_out)


@pytest.fixture(scope="module")
def config():
    """Reverse alignment from the second of three blocks on, two averages, clipped gradients.

    A process holds four images at once: a step of 16 asks for features four times, or twice in each of two.
    """
    config = runs.tiny_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, blocks=3),
        alignment=AlignmentConfig(strategy="reverse", locations=((2, 1), (3, 1)), hidden=8),
        train=dataclasses.replace(
            config.train, micro_batch=4, grad_clip=0.5, ema_more=(0.5,), bad_steps=1, diagnose_every=6
        ),
    )


@pytest.fixture(scope="module")
def whole(config, digits, tmp_path_factory):
    """The run of one process; its third step is left out."""
    run = tmp_path_factory.mktemp("whole")
    train_loop(config, digits, run, sharded.Targets(4, nan=3), [EVALUATOR])
    return run


def rows(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def assert_near(one, two):
    """With both averages, the same evidence of the bad step, and nothing that speaks of parts."""
    runs.assert_near(one, two)
    runs.assert_near(one, two, ema=0.5)
    (before,), (after,) = (rows(run, "bad-steps.jsonl") for run in (one, two))
    assert before["images"] == after["images"]
    assert (before["step"], after["step"]) == (3, 3)
    for name in ("z2_1", "log_scale_max_3"):
        assert before[name] == pytest.approx(after[name], abs=1e-4)
    first, second = (checkpoint.load_training_state(checkpoint.resolve(run)) for run in (one, two))
    for one, two in zip(
        first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True
    ):
        assert {name: value.shape for name, value in one.items()} == {
            name: v.shape for name, v in two.items()
        }


def state_bytes(config, processes):
    """Held by the first process: fp32 weights, two moments and a count for each; two averages of the flow."""

    def part(p):
        return 4 * p[0].numel() * math.ceil(len(p) / processes)

    objective = Objective(config, 6)
    trained = list(objective.parameters())
    return 3 * sum(map(part, trained)) + 4 * len(trained) + 2 * sum(map(part, objective.flow.parameters()))


def test_state_and_gradients_are_exact_and_blocks_below_the_aligned_ones_are_let_go(config, tmp_path):
    """In float64, to 1e-14 of the largest gradient: the order of sums costs some units of 2e-16."""

    def case(strategy, order=0, blocks=3, layers=1, levels=None, **options):
        noise = "range" if levels else "gaussian"
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, blocks=blocks, layers=layers, noise=noise),
            alignment=dataclasses.replace(config.alignment, strategy=strategy, order=order, levels=levels),
            train=TrainConfig(**options),
        )

    cases = {
        case("none"): "0 0 0",
        case("forward", checkpoint_activations=True): "0 0 0",
        case("detach"): "0 1 1",
        case("reverse"): "0 1 1",
        case("reverse", "exact", levels=(0.0, 0.2), checkpoint_activations=True): "0 1 1",
        case("none", blocks=1, compile=True): "0",
        case("none", blocks=2, layers=(1, 3), checkpoint_activations=True): "0 0",
        case("none", blocks=2, layers=(1, 2), compile=True): "0 0",
    }
    codes = runs.run(sharded.checks, config, *cases, log=tmp_path / "log", processes=2)
    assert codes == [0, 0], runs.printed(tmp_path / "log")
    for rank in (0, 1):
        state, *lines = runs.printed(tmp_path / "log", rank).splitlines()
        assert state == "kept True 3"
        found = [line.rsplit(" ", 1) for line in lines]
        assert [gathered for gathered, _ in found] == list(cases.values())
        assert all(float(error) < 1e-14 for _, error in found), found


def test_stopped_while_sharded_and_finished_by_one(config, digits, whole, tmp_path):
    shared = dataclasses.replace(config, train=dataclasses.replace(config.train, shard=True))
    job = functools.partial(runs.training, targets=sharded.Targets(2, nan=3, stop=5), evaluators=[EVALUATOR])
    codes = runs.run(job, shared, tmp_path / "run", log=tmp_path / "log", processes=2)
    assert codes == [75, 75], runs.printed(tmp_path / "log")
    assert checkpoint.resolve(tmp_path / "run").name == "step-00000006"
    train_loop(
        shared, digits, tmp_path / "run", sharded.Targets(4), [EVALUATOR]
    )  # one process: nothing to shard
    assert_near(whole, tmp_path / "run")
    held = [row["state_memory"] for row in rows(tmp_path / "run") if "nll" in row]
    assert held == [state_bytes(config, 2), state_bytes(config, 1), state_bytes(config, 1)]


def test_stopped_alone_and_finished_sharded(config, digits, whole, tmp_path):
    """At the launcher's wish; both go on from step 4."""
    with pytest.raises(KeyboardInterrupt):
        train_loop(
            config,
            digits,
            tmp_path / "run",
            sharded.Targets(4, nan=3),
            [EVALUATOR, Evaluator(5, runs.interrupt)],
        )
    assert checkpoint.resolve(tmp_path / "run").name == "step-00000004"
    codes = runs.run(sharded.launched, config, tmp_path / "run", EVALUATOR, log=tmp_path / "log", processes=2)
    assert codes == [0, 0], runs.printed(tmp_path / "log")
    assert_near(whole, tmp_path / "run")
    held = [row["state_memory"] for row in rows(tmp_path / "run") if "nll" in row]
    assert held == [state_bytes(config, 1), state_bytes(config, 2), state_bytes(config, 2)]


def test_a_sharded_student_is_that_of_one_process(config, digits, tmp_path):
    """Its teacher, of which every process has all, is no part of what is shared out or stored."""
    torch.manual_seed(0)
    teacher = Flow(config.model)
    teacher.save_pretrained(tmp_path / "teacher")
    student = StudentConfig(
        "inverse", str(tmp_path / "teacher"), weights_hash(teacher), guidance=1.0, rms=(1.0,) * 4
    )
    config = dataclasses.replace(config, alignment=AlignmentConfig(), student=student)
    train_loop(config, digits, tmp_path / "whole")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, shard=True))
    codes = runs.run(runs.training, config, tmp_path / "run", log=tmp_path / "log", processes=2)
    assert codes == [0, 0], runs.printed(tmp_path / "log")
    runs.assert_near(tmp_path / "whole", tmp_path / "run")
    held, alone = ([row["state_memory"] for row in rows(tmp_path / run)] for run in ("run", "whole"))
    assert all(0.5 <= part / all_of_it < 0.6 for part, all_of_it in zip(held, alone, strict=True))


@pytest.mark.parametrize(
    ("variables", "engine"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM"),
    ],
)
def test_other_engines_are_refused(monkeypatch, variables, engine):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"configured for {engine}, which .* --fsdp_version 2"):
        start(TrainConfig(device="cpu"))


def test_who_shards(monkeypatch):
    assert not distributed.sharded(TrainConfig(), 2)
    assert distributed.sharded(TrainConfig(shard=True), 2)
    assert not distributed.sharded(TrainConfig(shard=True), 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert distributed.sharded(TrainConfig(), 2)
    assert start(TrainConfig(device="cpu")).num_processes == 1

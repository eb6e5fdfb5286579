import dataclasses
import sys

import pytest
import torch

from flowback.errors import InputError
from flowback.training import Evaluator, train_loop


def tracked(config, *names, **more):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, trackers=names, **more))


def events(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out / "tensorboard" / "flowback")).Reload()


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # tensorboard's own
def test_tensorboard_gets_rows_and_pictures(config, digits, tmp_path):
    picture = torch.arange(192, dtype=torch.uint8).view(3, 8, 8)
    evaluator = Evaluator(4, lambda step, flow: {"seen": float(step), "samples": picture})
    row = train_loop(tracked(config, "tensorboard"), digits, tmp_path, evaluators=[evaluator])
    assert row["seen"] == 12
    assert "samples" not in row
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("nll")] == [4, 8, 12]
    assert [event.value for event in found.Scalars("seen")] == [4, 8, 12]
    shown = found.Images("samples")
    assert [event.step for event in shown] == [4, 8, 12]
    assert (shown[0].width, shown[0].height) == (8, 8)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_resumed_run_goes_on_in_tensorboard(config, digits, tmp_path):
    """What the stopped run wrote after its checkpoint shows once."""

    def interrupt(step, flow):
        if step == 7:
            raise KeyboardInterrupt
        return {}

    config = tracked(config, "tensorboard", log_every=1)
    with pytest.raises(KeyboardInterrupt):
        train_loop(config, digits, tmp_path, evaluators=[Evaluator(1, interrupt)])
    train_loop(config, digits, tmp_path)
    assert [event.step for event in events(tmp_path).Scalars("nll")] == list(range(1, 13))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named(config, digits, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        InputError, match=rf"--train\.trackers {name} needs a package: pip install .*\[{name}\]"
    ):
        train_loop(tracked(config, name), digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()

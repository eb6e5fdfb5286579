import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import runs
from flowback import Flow, checkpoint
from flowback.config import AlignmentConfig
from flowback.errors import InputError, Interrupted
from flowback.training import Evaluator, train_loop
from flowback.training.batches import global_indices
from flowback.training.objective import Objective
from flowback.training.trainer import BadGradientError


def replaced(config, **train):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def weights(run):
    return load_file(checkpoint.resolve(run) / "model.safetensors")


class NaNTargets:
    """Features that are NaN at some steps, counted from 0."""

    dim = 6
    originals = None

    def __init__(self, steps):
        self.steps, self.step = steps, -1

    def __call__(self, indices, flipped, clean):
        self.step += 1
        return torch.full((len(clean), 4, 6), float("nan") if self.step in self.steps else 1.0)


def aligned(config):
    alignment = AlignmentConfig(strategy="detach", locations=((2, 1),), hidden=8)
    return dataclasses.replace(config, alignment=alignment)


class Kill(BaseException):
    """Stands for a kill: nothing catches it."""


def killer(step):
    def call(at, flow):
        if at == step:
            raise Kill
        return {}

    return Evaluator(1, call)


def test_loss_falls_and_the_run_explains_itself(config, digits, tmp_path):
    config = replaced(config, steps=60, log_every=10)
    row = train_loop(
        config, digits, tmp_path, evaluators=[Evaluator(20, lambda step, flow: {"seen": float(step)})]
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1] == row
    assert row["nll"] < rows[0]["nll"] - 0.1  # seeds 0: 0.43 below; noise of a batch is about 0.02
    assert [r.get("seen") for r in rows] == [None, 20, None, 40, None, 60]
    assert {"config.json", "environment.json", "README.md", "checkpoints"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert len(checkpoint.step_folders(tmp_path)) == 2
    assert checkpoint.load_config(tmp_path) == config


def test_average_is_what_load_gives(config, digits, tmp_path):
    train_loop(config, digits, tmp_path)
    state = checkpoint.load_training_state(checkpoint.resolve(tmp_path))
    loaded = Flow.from_pretrained(tmp_path).state_dict()
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, loaded[name])
        assert not torch.equal(value, state["objective"][f"flow.{name}"]), name


@pytest.mark.parametrize("strategy", ["none", "reverse"])
@pytest.mark.parametrize("at", [2, 6, 11])  # before the first save, between saves, near the end
def test_killed_and_run_again_equals_the_run_that_was_not(config, digits, targets, tmp_path, strategy, at):
    config = dataclasses.replace(
        config,
        alignment=AlignmentConfig(strategy=strategy, order="exact", locations=((1, 1), (2, 1)), hidden=8),
    )
    train_loop(config, digits, tmp_path / "whole", targets)
    with pytest.raises(Kill):
        train_loop(config, digits, tmp_path / "killed", targets, [killer(at)])
    train_loop(config, digits, tmp_path / "killed", targets)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed")
    rows = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "nll" in row] == [4, 8, 12]


def test_a_run_over_noise_levels_goes_on_where_it_was_killed(config, digits, targets, tmp_path):
    model = dataclasses.replace(config.model, noise="range")
    alignment = AlignmentConfig(
        strategy="reverse", order="exact", locations=((1, 1), (2, 1)), hidden=8, levels=(0.1, 0.2)
    )
    config = replaced(
        dataclasses.replace(config, model=model, alignment=alignment),
        steps=4, log_every=2, save_every=2, diagnose_every=2, micro_batch=8,
    )  # fmt: skip
    train_loop(config, digits, tmp_path / "whole", targets)
    with pytest.raises(Kill):
        train_loop(config, digits, tmp_path / "killed", targets, [killer(3)])
    train_loop(config, digits, tmp_path / "killed", targets)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed")
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    by_level = {f"{name}_level_{part}" for name in ("nll", "cosine") for part in (1, 2, 3)}
    assert {"grad_cosine_1", "z2_2", "nll", "alignment"} | by_level <= whole[-1].keys()
    assert min(whole[-1][f"nll_level_{part}"] for part in (1, 2, 3)) < whole[-1]["nll"]


def test_steps_none_of_whose_images_count_align_nothing(config, digits, targets, tmp_path, caplog):
    """They train as without alignment, and show none; nor does it stop, or do warnings say it is broken.

    Two images a step, in parts of one: those of low, middle and high noise are never all there.
    """
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, noise="range"))
    plain = replaced(plain, steps=3, batch_size=2, log_every=1, diagnose_every=1)
    alignment = AlignmentConfig(
        strategy="reverse", locations=((2, 1),), hidden=8, levels=(0.0, 0.0101), stop_below=1.0
    )
    train_loop(plain, digits, tmp_path / "plain")
    aligned = replaced(dataclasses.replace(plain, alignment=alignment), micro_batch=1)
    train_loop(aligned, digits, tmp_path / "aligned", targets)
    assert runs.losses(tmp_path / "aligned") == [
        (step, pytest.approx(nll, rel=1e-4)) for step, nll in runs.losses(tmp_path / "plain")
    ]
    for row in map(json.loads, (tmp_path / "aligned" / "metrics.jsonl").read_text().splitlines()):
        assert row["alignment_weight"] == 0.1
        assert not {"alignment", "cosine_2_1", "grad_alignment_2", "grad_cosine_2"} & row.keys()
        by_level = [value for name, value in row.items() if name.startswith("nll_level_")]
        assert sum(by_level) / len(by_level) == pytest.approx(row["nll"], rel=1e-5)
        assert len(by_level) == len([name for name in row if name.startswith("cosine_level_")])
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_accumulation_equals_one_batch_up_to_rounding(config, digits, tmp_path):
    """Sums in another order: 1e-4 after 12 steps in fp32.

    Outputs, not weights: the gradient of a key's bias is zero but for rounding, which Adam blows up.
    """
    train_loop(config, digits, tmp_path / "one")
    train_loop(replaced(config, micro_batch=4), digits, tmp_path / "four")
    one, four = Flow.from_pretrained(tmp_path / "one"), Flow.from_pretrained(tmp_path / "four")
    images = torch.randn(8, 1, 8, 8)
    labels = torch.arange(8)
    torch.testing.assert_close(four(images, labels).z, one(images, labels).z, rtol=0, atol=1e-4)


def test_a_signal_saves_and_the_rest_equals(config, digits, tmp_path):
    train_loop(config, digits, tmp_path / "whole")
    handler = signal.getsignal(signal.SIGTERM)
    raiser = Evaluator(1, lambda step, flow: os.kill(os.getpid(), signal.SIGTERM) or {} if step == 5 else {})
    with pytest.raises(Interrupted):
        train_loop(config, digits, tmp_path / "stopped", evaluators=[raiser])
    assert signal.getsignal(signal.SIGTERM) == handler
    assert checkpoint.resolve(tmp_path / "stopped").name == "step-00000005"
    train_loop(config, digits, tmp_path / "stopped")
    runs.assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(config, digits, tmp_path, caplog):
    train_loop(config, digits, tmp_path / "whole")
    train_loop(config, digits, tmp_path / "hurt")
    file = checkpoint.resolve(tmp_path / "hurt") / "training.pt"
    file.write_bytes(file.read_bytes()[:-100])
    train_loop(config, digits, tmp_path / "hurt")
    assert str(file) in caplog.text
    runs.assert_same_run(tmp_path / "whole", tmp_path / "hurt")


def test_non_finite_gradient_stops_with_the_step_and_keeps_the_checkpoint(config, digits, tmp_path):
    train_loop(replaced(config, steps=8), digits, tmp_path)
    before = weights(tmp_path)

    with pytest.raises(BadGradientError, match=r"Step 1: the gradient is not finite, .*bad-steps\.jsonl"):
        train_loop(aligned(config), digits, tmp_path / "nan", NaNTargets(range(100)))
    assert not checkpoint.step_folders(tmp_path / "nan")
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())


def test_bad_steps_are_left_out_with_evidence_until_there_are_too_many(config, digits, tmp_path, caplog):
    row = train_loop(replaced(aligned(config), bad_steps=2), digits, tmp_path / "two", NaNTargets({2, 9}))
    assert row["step"] == 12
    assert row["bad_steps"] == 2
    assert all(value.isfinite().all() for value in weights(tmp_path / "two").values())
    evidence = [json.loads(line) for line in (tmp_path / "two" / "bad-steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evidence] == [3, 10]
    seen = global_indices(0, len(digits), 2 * 16, 16)
    assert evidence[0]["images"] == [digits.file_name(index) for index in seen.tolist()]
    assert "Step 10 was skipped" in caplog.text
    with pytest.raises(BadGradientError, match="Step 10"):
        train_loop(replaced(aligned(config), bad_steps=1), digits, tmp_path / "one", NaNTargets({2, 9}))
    assert checkpoint.resolve(tmp_path / "one").name == "step-00000008"


def test_a_step_left_out_changes_no_weight(config, digits, tmp_path):
    """The optimiser's own count of steps stands still too."""
    few = replaced(aligned(config), steps=4, bad_steps=None)
    train_loop(few, digits, tmp_path, NaNTargets(range(100)))
    state = checkpoint.load_training_state(checkpoint.resolve(tmp_path))
    torch.manual_seed(0)
    fresh = Objective(few, 6).state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in state["objective"].items())
    assert all(float(one["step"]) == 0 for one in state["optimizer"]["state"].values())


def test_rows_with_nan_are_json_all_the_same(config, digits, tmp_path):
    train_loop(replaced(aligned(config), steps=2, bad_steps=None), digits, tmp_path, NaNTargets(range(100)))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1], parse_constant=refuse)["grad_norm"] is None


def test_resuming_with_another_setting_names_it(config, digits, tmp_path):
    train_loop(config, digits, tmp_path)
    with pytest.raises(InputError, match=r"--train.lr \(was 0.01, now 0.02\)"):
        train_loop(replaced(config, lr=2e-2), digits, tmp_path)
    train_loop(replaced(config, steps=16, log_every=2), digits, tmp_path)  # these may change
    assert checkpoint.resolve(tmp_path).name == "step-00000016"


def test_resuming_before_the_first_checkpoint_compares_too(config, digits, tmp_path):
    with pytest.raises(Kill):
        train_loop(config, digits, tmp_path, evaluators=[killer(2)])
    with pytest.raises(InputError, match=r"--train\.seed"):
        train_loop(replaced(config, seed=1), digits, tmp_path)


def test_class_count_that_does_not_fit_the_data(config, digits, tmp_path):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=7))
    with pytest.raises(InputError, match=r"num-classes is 7, but .* has 10 classes"):
        train_loop(config, digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(config, digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train_loop(config, digits, tmp_path / "file" / "run")


def test_gradients_are_compared_at_intervals(config, digits, targets, tmp_path):
    config = aligned(replaced(config, diagnose_every=6))
    train_loop(config, digits, tmp_path / "one", targets)
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if "grad_nll_1" in row]
    assert [row["step"] for row in found] == [6, 12]
    assert found[0]["grad_alignment_1"] == 0
    assert found[0]["grad_alignment_2"] > 0
    train_loop(replaced(config, diagnose_every=0), digits, tmp_path / "two", targets)
    runs.assert_same_run(tmp_path / "one", tmp_path / "two")


def test_several_averages_and_kept_checkpoints(config, digits, tmp_path):
    config = replaced(config, ema_more=(0.5, 0.99), keep_last=1, keep_every=8, steps=16)
    train_loop(config, digits, tmp_path / "whole")
    assert [folder.name[-2:] for folder in checkpoint.step_folders(tmp_path / "whole")] == ["08", "16"]
    flows = {
        decay: Flow.from_pretrained(tmp_path / "whole", ema=decay).state_dict() for decay in (0.5, 0.9, 0.99)
    }
    raw = checkpoint.load_training_state(checkpoint.resolve(tmp_path / "whole"))["objective"]
    name = "blocks.0.proj_in.weight"
    distance = {decay: float((state[name] - raw[f"flow.{name}"]).norm()) for decay, state in flows.items()}
    assert distance[0.5] < distance[0.9]
    assert torch.equal(flows[0.9][name], Flow.from_pretrained(tmp_path / "whole").state_dict()[name])
    with pytest.raises(InputError, match=r"no average with decay 0\.7; it has 0\.9, 0\.5, 0\.99"):
        Flow.from_pretrained(tmp_path / "whole", ema=0.7)
    with pytest.raises(Kill):
        train_loop(config, digits, tmp_path / "killed", evaluators=[killer(9)])
    train_loop(config, digits, tmp_path / "killed")
    for decay, state in flows.items():
        again = Flow.from_pretrained(tmp_path / "killed", ema=decay).state_dict()
        assert all(torch.equal(state[name], again[name]) for name in state), decay

"""Plans: measured, kept, and only used where they hold."""

import dataclasses
import hashlib
import math

import pytest
import torch

from flowback import BlockPlan, Flow, InputError, SampleConfig, Sampler, plan_sampling, sample
from flowback.checkpoint import save
from flowback.config import RunConfig
from flowback.sampling import block_plan as plans
from flowback.sampling.block_plan import (
    load_plan,
    make_plan,
    plan_file,
    resolve_plan,
    save_plan,
    weights_hash,
)
from flowback.sampling.sampler import noise
from sampling.flows import tame_flow

CONFIG = SampleConfig(batch_size=3, tolerance=1e-3, sampler="auto")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder, flow and plan of a small checkpoint."""
    flow, folder = tame_flow(torch.float32), tmp_path_factory.mktemp("plan") / "checkpoint"
    save(folder, RunConfig(model=flow.config), flow.state_dict())
    return folder, flow, plan_sampling(flow, CONFIG)


def test_measures_every_way(made):
    _, _, plan = made
    assert len(plan.blocks) == 2
    ways = {(m.block, m.window, m.init) for m in plan.measured}
    assert ways == {(b, w, i) for b in (1, 2) for w in (4, 8, 15) for i in ("z", "zeros")} | {
        (1, 1, "z"),
        (2, 1, "z"),
    }
    for m in plan.measured:
        assert m.seconds > 0
        assert m.seconds_per_sweep > 0
        assert all(error >= 0 for error in m.errors)
        if m.seconds < math.inf:  # not given up
            assert m.errors[-1] < 2e-3


def test_promise_is_kept_when_jacobi_wins(made, monkeypatch):
    """With sequential decoding made slow, all blocks sweep, and other noise keeps the promise too."""
    _, flow, plan = made
    timed = plans._Block.timed
    slow = lambda self, plan, n: (1e3, timed(self, plan, 1)[1]) if plan.window == 1 else timed(self, plan, n)  # noqa: E731
    monkeypatch.setattr(plans._Block, "timed", slow)
    with torch.no_grad():
        found = make_plan(Sampler(flow), torch.tensor([0, 1, 2]), noise(flow, range(3)), plan)
    assert all(block.window > 1 for block in found.blocks)
    assert 0 < found.error <= 5e-4
    other = sample(flow, [3, 4], [77, 78], denoise=False, plans=found.blocks)
    torch.testing.assert_close(other, sample(flow, [3, 4], [77, 78], denoise=False), atol=1e-3, rtol=0)


def test_tightens_where_the_error_is_too_large(made):
    """Images off by three times the tolerance of the blocks: a tenth of it keeps half of the promise."""
    z = noise(made[1], range(3))
    swept = {1: BlockPlan(8), 2: BlockPlan(8)}
    chosen, error, _ = plans._verified(lambda blocks: z + 3 * blocks[0].tolerance, swept, z, 1e-3)
    assert [block.tolerance for block in chosen] == [1e-4, 1e-4]
    assert error == pytest.approx(3e-4, rel=0.01)
    chosen, error, _ = plans._verified(lambda blocks: z + 1, swept, z, 1e-3)
    assert [block.window for block in chosen] == [1, 1]


def test_round_trip_and_damage(made, tmp_path):
    folder, _, plan = made
    save_plan(plan, plan_file(folder))
    assert load_plan(plan_file(folder)) == plan
    with pytest.raises(InputError, match="no plan"):
        load_plan(tmp_path / "sampling-plan.json")
    (tmp_path / "sampling-plan.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_plan(tmp_path / "sampling-plan.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"checkpoint": "other"}, "another checkpoint"),
        ({"device": "cuda: X"}, "device"),
        ({"batch_size": 4}, "batch size 3, not 4"),
        ({"precision": "bf16"}, "precision"),
        ({"guidance": 2.0}, "guidance"),
        ({"guidance": 2.0, "ramp": True}, "guidance"),
        ({"ramp": True}, None),  # of nothing
        ({"tolerance": 1e-4}, "promises an error"),
        ({"tolerance": 1e-2}, None),
    ],
)
def test_fits_what_it_was_made_for(made, change, reason):
    _, _, plan = made
    found = plan.misfit(dataclasses.replace(plan, **change))
    assert found is None if reason is None else reason in found


def test_a_plan_for_one_way_of_guiding_does_not_hold_for_another(made):
    _, _, plan = made
    guided = dataclasses.replace(plan, guidance=2.0)
    for change in ({"ramp": True}, {"formula": "starflow"}, {"guided_blocks": 1}):
        (name,) = change
        assert name.replace("_", " ") in guided.misfit(dataclasses.replace(guided, **change))


def test_bad_tolerance(made):
    _, flow, _ = made
    with pytest.raises(InputError, match="above 0"):
        plan_sampling(flow, CONFIG, tolerance=0.0)


def test_guidance_that_does_nothing_is_not_planned():
    with pytest.raises(InputError, match="give labels"):
        plan_sampling(tame_flow(torch.float32, num_classes=0), guidance=1.0)


def test_the_sampler_that_is_asked_for(made, tmp_path):
    """Sequential, jacobi, and auto with a plan that fits, one that does not, and none."""
    folder, flow, plan = made
    assert resolve_plan(flow, SampleConfig(), folder) == (None, None)
    swept, notice = resolve_plan(flow, SampleConfig(sampler="jacobi", window=99, tolerance=1e-2))
    assert swept == (BlockPlan(16, "z", 1e-2),) * 2  # windows no longer than the sequence
    assert notice is None
    for none in (None, tmp_path):
        blocks, notice = resolve_plan(flow, CONFIG, none)
        assert blocks is None
        assert "has no plan; `flowback plan` makes one" in notice
    save_plan(plan, plan_file(folder))
    blocks, notice = resolve_plan(flow, CONFIG, folder)
    assert blocks == plan.blocks
    assert notice.startswith("Planned: ")
    blocks, notice = resolve_plan(flow, dataclasses.replace(CONFIG, batch_size=2), folder)
    assert blocks is None
    assert "batch size 3, not 2" in notice
    blocks, notice = resolve_plan(tame_flow(torch.float32, seed=1), CONFIG, folder)
    assert blocks is None
    assert "another checkpoint" in notice


def test_the_plan_of_a_flow_that_comes_along_is_not_kept_in_the_package(made, tmp_path, monkeypatch):
    folder, flow, plan = made
    monkeypatch.setattr(plans, "PACKAGED", folder.parent)
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path))
    assert plan_file(folder).is_relative_to(tmp_path)
    save_plan(plan, plan_file(folder))
    assert resolve_plan(flow, CONFIG, folder)[0] == plan.blocks


def test_the_hash_of_weights_is_that_of_their_file(made):
    """So that figures, plans and folders of samples name the same weights, in a file or not."""
    folder, flow, _ = made
    file = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights_hash(flow) == weights_hash(Flow.from_pretrained(folder)) == file
    assert weights_hash(tame_flow(torch.float32, seed=1)) != file

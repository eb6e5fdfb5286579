"""Plans: measured, kept, and only used where they hold."""

import dataclasses
import math

import pytest
import torch

from flowback import BlockPlan, Guidance, InputError, sample
from flowback.checkpoint import save
from flowback.config import RunConfig
from flowback.sampling import block_plan as plans
from flowback.sampling.block_plan import load_plan, make_plan, plan_file, save_plan, wanted
from flowback.sampling.decoder import Engine
from flowback.sampling.sampler import Batch, noise
from sampling.flows import tame_flow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder, flow, plan and measurements of a small checkpoint."""
    flow, folder = tame_flow(torch.float32), tmp_path_factory.mktemp("plan") / "checkpoint"
    save(folder, RunConfig(model=flow.config), flow.state_dict())
    z = noise(flow, range(3))
    guidance = Guidance()
    batch = Batch(Engine(flow), torch.tensor([0, 1, 2]), guidance, guidance.scales(3, z))
    with torch.no_grad():
        plan, measured = make_plan(batch, z, wanted(folder, flow, 3, "fp32", 0.0, 1e-3))
    return folder, flow, plan, measured


def test_measures_every_way(made):
    _, _, plan, measured = made
    assert len(plan.blocks) == 2
    ways = {(m.block, m.window, m.init) for m in measured}
    assert ways == {(b, w, i) for b in (1, 2) for w in (4, 8, 15) for i in ("z", "zeros")} | {
        (1, 1, "z"),
        (2, 1, "z"),
    }
    for m in measured:
        assert m.seconds > 0
        assert m.seconds_per_sweep > 0
        assert all(error >= 0 for error in m.errors)
        if m.seconds < math.inf:  # not given up
            assert m.errors[-1] < 2e-3


def test_promise_is_kept_when_jacobi_wins(made, monkeypatch):
    """With sequential decoding made slow, all blocks sweep, and other noise keeps the promise too."""
    _, flow, plan, _ = made
    z, guidance = noise(flow, range(3)), Guidance()
    batch = Batch(Engine(flow), torch.tensor([0, 1, 2]), guidance, guidance.scales(3, z))
    timed = plans._Block.timed
    slow = lambda self, plan, n: (1e3, timed(self, plan, 1)[1]) if plan.window == 1 else timed(self, plan, n)  # noqa: E731
    monkeypatch.setattr(plans._Block, "timed", slow)
    with torch.no_grad():
        found, _ = make_plan(batch, z, plan)
    assert all(block.window > 1 for block in found.blocks)
    assert 0 < found.error <= 5e-4
    other = sample(flow, [3, 4], [77, 78], denoise=False, plans=found.blocks)
    torch.testing.assert_close(other, sample(flow, [3, 4], [77, 78], denoise=False), atol=1e-3, rtol=0)


def test_tightens_where_the_error_is_too_large(made, monkeypatch):
    """Images off by three times the tolerance of the blocks: a tenth of it keeps half of the promise."""
    _, flow, _, _ = made
    z, guidance = noise(flow, range(3)), Guidance()
    batch = Batch(Engine(flow), None, guidance, guidance.scales(3, z))
    monkeypatch.setattr(Batch, "invert", lambda self, z, blocks: [z + 3 * blocks[0].tolerance])
    chosen, error, _ = plans._verified(batch, {1: BlockPlan(8), 2: BlockPlan(8)}, [z, z], 1e-3)
    assert [block.tolerance for block in chosen] == [1e-4, 1e-4]
    assert error == pytest.approx(3e-4, rel=0.01)
    monkeypatch.setattr(Batch, "invert", lambda self, z, blocks: [z + 1])
    chosen, error, _ = plans._verified(batch, {1: BlockPlan(8), 2: BlockPlan(8)}, [z, z], 1e-3)
    assert [block.window for block in chosen] == [1, 1]


def test_round_trip_and_damage(made, tmp_path):
    folder, _, plan, measured = made
    save_plan(plan, measured, plan_file(folder))
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
        ({"tolerance": 1e-4}, "promises an error"),
        ({"tolerance": 1e-2}, None),
    ],
)
def test_fits_what_it_was_made_for(made, change, reason):
    _, _, plan, _ = made
    found = plan.misfit(dataclasses.replace(plan, **change))
    assert found is None if reason is None else reason in found


def test_bad_tolerance(made):
    folder, flow, _, _ = made
    with pytest.raises(InputError, match="above 0"):
        wanted(folder, flow, 3, "fp32", 0.0, 0.0)

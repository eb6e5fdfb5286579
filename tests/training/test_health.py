import pytest
import torch

from flowback import Flow
from flowback.training.monitoring import Guard, block_statistics

CPU = torch.device("cpu")


def verdicts(guard, norms):
    return [int(guard.judge(torch.tensor(norm), step)) for step, norm in enumerate(norms, start=1)]


def test_only_non_finite_norms_are_bad_without_a_spike_rule():
    guard = Guard(None, CPU)
    assert verdicts(guard, [1.0, float("nan"), 1e30, float("inf"), 2.0]) == [0, 1, 0, 1, 0]
    assert int(guard.bad) == 2
    assert int(guard.last) == 4


def test_a_spike_is_judged_against_the_mean_of_the_good_steps():
    guard = Guard(10.0, CPU)
    assert verdicts(guard, [1.0, 9.0, 100.0, 100.0, 5.0]) == [0, 0, 1, 1, 0]
    # 0.98 · (0.98 · 1 + 0.02 · 9) + 0.02 · 5, the spikes left out.
    assert float(guard.typical) == pytest.approx(0.98 * (0.98 + 0.18) + 0.1)


def test_the_tally_survives_a_checkpoint():
    guard, other = Guard(10.0, CPU), Guard(10.0, CPU)
    verdicts(guard, [1.0, 100.0])
    other.load_state_dict(guard.state_dict())
    assert verdicts(other, [100.0]) == [1]
    assert int(other.bad) == 2


def test_block_statistics_of_a_fresh_flow(config):
    """Output weights start at zero: a block scales all tokens but its first by exp(-bias)."""
    flow = Flow(config.model)
    for block in flow.blocks:
        torch.nn.init.zeros_(block.proj_out.bias)
    images = torch.randn(2, 1, 8, 8)
    found = block_statistics(flow, images)
    assert found["z2_1"] == pytest.approx(float(images.square().mean()))
    assert found["log_scale_max_2"] == found["log_scale_min_2"] == 0
    torch.nn.init.constant_(flow.blocks[1].proj_out.bias, -0.5)
    found = block_statistics(flow, images)
    assert found["log_scale_min_2"] == -0.5
    assert found["z2_2"] > found["z2_1"]

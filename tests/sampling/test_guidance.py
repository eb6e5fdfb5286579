"""The formulas of guidance, and where they apply."""

from types import SimpleNamespace

import pytest
import torch

from flowback import Guidance, InputError
from flowback.sampling import BlockPlan
from flowback.sampling.guidance import starflow, tarflow

C = (torch.tensor([[[0.5]]], dtype=torch.float64), torch.tensor([[[-0.2]]], dtype=torch.float64))
U = (torch.tensor([[[0.1]]], dtype=torch.float64), torch.tensor([[[0.3]]], dtype=torch.float64))
W = torch.tensor([[[2.0]]], dtype=torch.float64)


def test_tarflow_formula():
    shift, log_scale = tarflow(C, U, W)
    assert shift.item() == pytest.approx(0.5 + 2 * 0.4)
    assert log_scale.item() == pytest.approx(-0.2 + 2 * -0.5)


def test_starflow_formula():
    """Against the paper's formula in σ and μ, with σc < σu and with σc > σu (where s is 1)."""
    for c, u in ((C, U), (U, C)):
        sigma_c, sigma_u = c[1].exp(), u[1].exp()
        s = torch.clamp(sigma_c / sigma_u, max=1) ** 2
        total = 1 + W - W * s
        shift, log_scale = starflow(c, u, W)
        torch.testing.assert_close(log_scale.exp(), sigma_c / total.sqrt())
        torch.testing.assert_close(shift, ((1 + W) * c[0] - W * s * u[0]) / total)


@pytest.mark.parametrize("join", [tarflow, starflow])
def test_no_guidance_at_scale_zero(join):
    shift, log_scale = join(C, U, torch.zeros(1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(shift, C[0])
    torch.testing.assert_close(log_scale, C[1])


def test_ramp_and_scales_by_image():
    """TARFlow's evaluation: w·i/(N − 1) for token i; each image its own w, also when only some are asked."""
    guidance = Guidance([1.0, 3.0], ramp=True)
    guide = guidance.guide(guidance.scales(2, C[0]), tokens=5)
    c, u = torch.zeros(2, 2, 1, dtype=torch.float64), torch.ones(2, 2, 1, dtype=torch.float64)
    shift, _ = guide(torch.cat([c, u]), torch.cat([c, c]), 3)
    assert shift.flatten().tolist() == pytest.approx([-0.75, -1.0, -2.25, -3.0])
    some, _ = guide(torch.cat([c[:1], u[:1]]), torch.cat([c[:1], c[:1]]), 3, torch.tensor([1]))
    assert some.flatten().tolist() == pytest.approx([-2.25, -3.0])


def test_blocks_nearest_the_noise():
    assert [Guidance(1.0, blocks=2).covers(block, 4) for block in (1, 2, 3, 4)] == [False, False, True, True]
    assert [Guidance(1.0).covers(block, 2) for block in (1, 2)] == [True, True]
    assert not Guidance(0.0).covers(2, 2)
    assert not Guidance(1.0, blocks=0).covers(2, 2)


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"blocks": -1}, {"scale": float("nan")}])
def test_bad_options(bad):
    with pytest.raises(InputError):
        Guidance(**bad)


def test_a_formula_that_does_not_exist_is_not_tarflows():
    """Without the check of types that tests have, and users have not."""
    made = SimpleNamespace(formula="star", temperature=1.0, blocks=None, scale=0.0)
    with pytest.raises(
        InputError, match=r"There is no guidance formula star; did you mean starflow or tarflow"
    ):
        Guidance.__post_init__(made)
    for plan, sentence in (
        (SimpleNamespace(window=4, init="noise"), "There is no start of sweeps noise; known: z, zeros"),
        (SimpleNamespace(window=0, init="z"), "window of a block's plan is 0; it must be at least 1"),
    ):
        with pytest.raises(InputError, match=sentence):
            BlockPlan.__post_init__(plan)


def test_wrong_number_of_scales():
    with pytest.raises(InputError, match="3 guidance scales for 2 images"):
        Guidance([1.0, 2.0, 3.0]).scales(2, C[0])

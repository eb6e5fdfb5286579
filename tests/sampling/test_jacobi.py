"""Windowed Jacobi sweeps against sequential decoding, in float64."""

import pytest
import torch

from flowback import InputError
from flowback.flow import affine
from flowback.sampling.decoder import Decoder, Engine, sequential
from flowback.sampling.guidance import Guidance
from flowback.sampling.jacobi import jacobi, solve_window
from sampling.flows import labels_of, noise_of, tame_flow


@pytest.fixture(params=[True, False], ids=["unguided", "guided"])
def setting(request):
    """A function that makes a decoder, and the noise."""
    flow, batch = tame_flow(), 5
    engine, block, z = Engine(flow), flow.blocks[0], noise_of(flow, 5)
    context, guide = block.context(labels_of(flow, batch)), None
    if not request.param:
        guidance = Guidance([0.0, 0.5, 1.0, 1.5, 2.0])
        guide = guidance.guide(guidance.scales(batch, z), flow.config.tokens)
        context = torch.cat([context, block.context(None).expand(batch, -1)])
    return lambda new: engine.decoder(1, batch, context, guide, new=new), z


@pytest.mark.parametrize("init", ["z", "zeros"])
@pytest.mark.parametrize("window", [1, 4, 7, 15, 40])
def test_sweeps_to_exactness(setting, window, init):
    """Without a tolerance every window is exact, whatever the first guess; 1e-11 for rounding."""
    make, z = setting
    found = jacobi(make(2 * window), z, window, None, init)
    torch.testing.assert_close(found.x, sequential(make(1), z), atol=1e-11, rtol=1e-11)
    assert found.sweeps.max() <= window


@pytest.mark.parametrize("native", [True, False])
def test_a_guess_that_is_not_finite_harms_nothing(native):
    """Masked scores are 0 in PyTorch, and 0 times infinity is no number: every token would have it."""
    flow = tame_flow()
    engine, block, z = Engine(flow, native=native), flow.blocks[0], noise_of(flow, 2)
    context = block.context(labels_of(flow, 2))
    guess = z.clone()
    guess[0, 3:6], guess[1, 9] = torch.inf, torch.nan
    found = jacobi(engine.decoder(1, 2, context, new=32), z, 15, None, guess)
    known = sequential(engine.decoder(1, 2, context), z)
    torch.testing.assert_close(found.x, known, atol=1e-11, rtol=1e-11)


class Fragile(Decoder):
    """Predicts infinity after a token above 10, and nothing at all where any token is not finite."""

    def __init__(self):
        pass

    def step(self, x, start, images=None):
        shift = torch.where(x > 10, torch.inf, x / 2)
        finite = x.isfinite().flatten(1).all(1)[:, None, None]
        return torch.where(finite, shift, torch.nan), torch.zeros_like(x)


def test_a_sweep_that_overflows_is_not_the_end():
    """The third token's guess is 20, so the fourth becomes infinite for one sweep."""
    z = torch.tensor([2.0, 1, 20, -4, 1, 0]).double().view(1, 6, 1)
    z[0, 2] -= 2 + 20  # decoded, it is -1, and no token above 10
    expected = z.clone()
    for i in range(1, 6):
        expected[0, i] = expected[0, i - 1] / 2 + z[0, i]
    guess = torch.tensor([2.0, 1, 20, 1, 1, 1]).double().view(1, 6, 1)
    torch.testing.assert_close(jacobi(Fragile(), z, 5, 1e-6, guess).x, expected)
    truly = z.clone()
    truly[0, 2] = 20
    broken = jacobi(Fragile(), truly, 5, 1e-6, guess).x[0, :, 0]
    assert broken.isfinite().tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_error_stays_near_the_tolerance(setting, tolerance):
    """These blocks contract: the last change bounds the error, up to a factor of 2 over the windows."""
    make, z = setting
    found = jacobi(make(16), z, 8, tolerance)
    assert (found.x - sequential(make(1), z)).abs().max() < 2 * tolerance
    assert found.sweeps.max() < 8


def test_images_that_converged_leave_the_batch(setting, monkeypatch):
    """The images need different numbers of sweeps; later sweeps hold fewer of them."""
    make, z = setting
    z = z * torch.tensor([1, 0.01, 1, 0.1, 3], dtype=z.dtype).view(-1, 1, 1)
    sizes, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, x, *rest: sizes.append(len(x)) or step(self, x, *rest))
    found = jacobi(make(32), z, 15, 1e-5)
    assert sizes[0] == 5
    assert sum(sizes) == found.sweeps.sum() < 5 * found.sweeps.max()


def test_keys_and_values_are_never_stale(setting):
    """A window after one that stopped early is solved on the accepted values, not on those a sweep before."""
    make, z = setting
    decoder, x = make(16), z.clone()
    done = solve_window(decoder, z, x, 1, 8, 0, 0.1)
    assert (x[:, :8] - sequential(make(1), z)[:, :8]).abs().max() > 1e-4  # else the test shows nothing
    solve_window(decoder, z, x, 8, 16, min(int(done.min()), 7), None)
    shift, log_scale = make(15).step(x[:, :-1], 0)
    expected = affine.inverse(z[:, 8:], shift[:, 7:], log_scale[:, 7:])
    torch.testing.assert_close(x[:, 8:], expected, atol=1e-12, rtol=1e-12)


def test_windows_begin_on_the_values_that_were_accepted(setting):
    """The first token of the second window is exact given the first window as it was left."""
    make, z = setting
    x = jacobi(make(16), z, 8, 0.1).x
    shift, log_scale = make(15).step(x[:, :-1], 0)
    residual = (x[:, 1:] - affine.inverse(z[:, 1:], shift, log_scale)).abs()
    assert residual[:, 8].max() < 1e-12
    assert residual.max() > 1e-4  # else the test shows nothing


def test_stops_at_the_limit(setting):
    make, z = setting
    assert jacobi(make(32), z, 15, None, sweeps=3).sweeps.tolist() == [3.0] * 5


def test_not_a_number_does_not_pass_for_converged(setting):
    make, z = setting
    z[2, 3] = float("nan")
    found = jacobi(make(16), z, 8, 1e-3, "zeros")
    assert found.x[2, 3:].isnan().all()
    assert found.x[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"window": 2, "tolerance": 0.0}, {"window": 2, "sweeps": 0}]
)
def test_bad_options(setting, options):
    make, z = setting
    with pytest.raises(InputError):
        jacobi(make(4), z, **options)

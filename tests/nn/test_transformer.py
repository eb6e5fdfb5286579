from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowback.nn.transformer import MLP, SwiGLU, Transformer


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_swiglu_has_the_parameters_of_the_mlp_it_replaces(width):
    # its hidden width is rounded to a multiple of 8: within 2 % at width 64, 0.5 % above
    assert parameters(SwiGLU(width, 4)) == pytest.approx(parameters(MLP(width, 4)), rel=0.02)


def test_the_mlp_has_the_gradients_of_its_formula():
    mlp = MLP(32, 4).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    wanted = mlp.down(F.gelu(mlp.up(mlp.norm(x))))
    gradient = torch.randn_like(wanted)
    inputs = (x, *mlp.parameters())
    expected = torch.autograd.grad(wanted, inputs, gradient)
    found = torch.autograd.grad(mlp(x), inputs, gradient)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(mlp(x), wanted)


def test_the_mlp_can_be_differentiated_twice_and_with_frozen_weights():
    mlp = MLP(8, 2).double().requires_grad_(False)
    x = torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(mlp, x)
    (found,) = torch.autograd.grad(mlp(x).sum(), x)
    (expected,) = torch.autograd.grad(mlp.down(F.gelu(mlp.up(mlp.norm(x)))).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_mlp_under_autocast_has_gradients_of_the_weights_dtype():
    mlp = MLP(32, 4)
    x = torch.randn(2, 5, 32, requires_grad=True)
    expected = torch.autograd.grad(mlp(x).sum(), (x, *mlp.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().sum(), (x, *mlp.parameters()))
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        # bf16 has 8 bits of mantissa; sums of 10 to 128 rounded terms
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_hidden_states_are_the_outputs_of_the_layers(mlp):
    body = Transformer(32, layers=3, head_dim=16, mlp=mlp).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    y, states = body(x, hidden=(1, 3))
    assert set(states) == {1, 3}
    assert torch.equal(states[1], body.layers[0](x))
    assert torch.equal(states[3], y)
    assert torch.equal(body(x)[0], y)


def test_cached_steps_equal_the_whole_sequence():
    body = Transformer(32, layers=3, head_dim=16).double()
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    cache = body.empty_cache(2, 6, like=x)
    steps = [body(x[:, i : i + 1], cache=cache, start=i)[0] for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), body(x)[0], rtol=0, atol=1e-12)


def test_a_call_changes_neither_its_input_nor_the_module():
    body = Transformer(32, layers=2, head_dim=16)
    x = torch.randn(2, 6, 32)
    before = x.clone()
    first = body(x)[0]
    body(x[:, :1], cache=body.empty_cache(2, 6, like=x), start=0)
    assert torch.equal(x, before)
    assert torch.equal(body(x)[0], first)

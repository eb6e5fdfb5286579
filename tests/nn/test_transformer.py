from __future__ import annotations

import pytest
import torch

from flowback.nn.transformer import MLP, SwiGLU, Transformer


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_swiglu_has_the_parameters_of_the_mlp_it_replaces(width):
    # its hidden width is rounded to a multiple of 8: within 2 % at width 64, 0.5 % above
    assert parameters(SwiGLU(width, 4)) == pytest.approx(parameters(MLP(width, 4)), rel=0.02)


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

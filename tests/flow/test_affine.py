from __future__ import annotations

import torch

from flowback.flow import affine


def randoms(*shape: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(shape, dtype=torch.float64) for _ in range(3))


def test_inverse_undoes_forward():
    x, shift, log_scale = randoms(3, 4, 2)
    z = affine.forward(x, shift, log_scale)
    torch.testing.assert_close(affine.inverse(z, shift, log_scale), x, rtol=0, atol=1e-12)


def test_log_det_is_that_of_the_jacobian():
    x, shift, log_scale = randoms(1, 4, 2)
    jacobian = torch.autograd.functional.jacobian(lambda x: affine.forward(x, shift, log_scale), x)
    sign, expected = torch.linalg.slogdet(jacobian.reshape(8, 8))
    assert sign == 1
    torch.testing.assert_close(affine.log_det(log_scale)[0], expected, rtol=0, atol=1e-12)


def test_inverse_vjp_is_autograds():
    z, shift, log_scale = (value.requires_grad_() for value in randoms(2, 4, 3))
    x = affine.inverse(z, shift, log_scale)
    grad_x = torch.randn_like(x)
    expected = torch.autograd.grad(x, (z, shift, log_scale), grad_x)
    for ours, theirs in zip(affine.inverse_vjp(grad_x, x, shift, log_scale), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

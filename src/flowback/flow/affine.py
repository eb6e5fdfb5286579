"""The affine transform of one token: the only place with these formulas (TARFlow, arXiv 2412.06329, Eq. 4).

Forward (data to noise)   z = (x - shift) * exp(-log_scale)
Inverse (noise to data)   x = shift + exp(log_scale) * z
Log-determinant           log|det dz/dx| = -sum of log_scale
Bound                     log_scale = a * tanh(raw / a), of flows with a bound a
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["bounded", "bounded_slope", "forward", "inverse", "inverse_vjp", "log_det"]


def bounded(log_scale: Float[Tensor, "*s"], bound: float | None) -> Float[Tensor, "*s"]:
    """Log-scales within ±bound, nearly unchanged where they are small; None leaves them as they are."""
    return log_scale if bound is None else bound * (log_scale / bound).tanh()


def bounded_slope(log_scale: Float[Tensor, "*s"], bound: float | None) -> Float[Tensor, "*s"] | float:
    """Derivative of :func:`bounded`, by its result: 1 - tanh^2."""
    return 1.0 if bound is None else 1 - (log_scale / bound) ** 2


def forward(
    x: Float[Tensor, "*s"], shift: Float[Tensor, "*s"], log_scale: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """Noise z of the data x."""
    return (x - shift) * (-log_scale).exp()


def inverse(
    z: Float[Tensor, "*s"], shift: Float[Tensor, "*s"], log_scale: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """Data x of the noise z."""
    return shift + log_scale.exp() * z


def log_det(log_scale: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
    """log|det dz/dx| of each image, in nats."""
    return -log_scale.sum(dim=(1, 2))


def inverse_vjp(
    grad_x: Float[Tensor, "*s"],
    x: Float[Tensor, "*s"],
    shift: Float[Tensor, "*s"],
    log_scale: Float[Tensor, "*s"],
) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """Gradients of (z, shift, log_scale) from the gradient of x = inverse(z, shift, log_scale).

    Written with x, which the encode pass knows, in place of z: exp(log_scale) * z = x - shift.
    """
    return grad_x * log_scale.exp(), grad_x, grad_x * (x - shift)

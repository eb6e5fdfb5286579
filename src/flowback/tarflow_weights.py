"""Weights in the layouts of the original code: that of TARFlow, and that of iTARFlow; no arithmetic.

They are github.com/apple/ml-tarflow and github.com/apple/ml-itarflow. Their programs and ours compute the
same function from the same tensors, so that conversion renames, drops two buffers that hold no information
(the causal mask, and the prior's variance, which is 1) and takes a dimension of size 1 out of the class
tables. The way back puts it all in again, in the original order.

iTARFlow's layout has an embedding of the noise level in each block, blocks of different depths, and another
name for the layers. The first layers of all blocks may be one shared stack, whose tensors its files repeat in
every block. Here each block has layers of its own; the way back takes first layers that are equal in all
blocks for a shared stack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


_LAYER = re.compile(r"blocks\.([0-9]{1,9})\.(?:attn|head)_blocks\.([0-9]{1,9})\.")


_SHARED = re.compile(r"shared_backbone\.([0-9]{1,9})\.")


_WRAPPER = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")
"""What DistributedDataParallel and torch.compile put into names."""


_LAYER_PARTS = {
    "attention.norm": "attention.norm",
    "attention.qkv": "attention.qkv",
    "attention.proj": "attention.proj",
    "mlp.norm": "mlp.norm",
    "mlp.main.0": "mlp.up",
    "mlp.main.2": "mlp.down",
}


Noise = Literal["gaussian", "uniform"]


@dataclass(frozen=True)
class _Layout:
    """Which tensors a file of theirs holds."""

    depths: tuple[int, ...]
    """Layers of each block, shared ones included."""
    conditional: bool
    levels: bool
    """iTARFlow's: the model knows the noise level of its images."""
    shared: int = 0
    """First layers of every block that are one stack for all."""

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> _Layout:
        """That of a state dict, by its names.

        Raises:
            InputError: not theirs, or more layers than tensors.
        """
        levels = any(".time_embed." in name for name in state)
        blocks, shared = _count(_BLOCK, state), _count(_SHARED, state)
        own: dict[int, int] = {}
        for found in filter(None, map(_LAYER.match, state)):
            own[int(found[1])] = max(own.get(int(found[1]), 0), int(found[2]) + 1)
        deepest = shared + max(own.values(), default=0)
        if not blocks or not deepest:
            raise InputError(
                "this is not a state dict of TARFlow (it has no blocks.0.attn_blocks.0...); "
                "give its model file."
            )
        layers = blocks * shared + sum(own.values()) if levels else blocks * deepest
        if max(blocks, layers) > len(state):  # the names alone could fill the memory
            raise InputError(
                f"it names {blocks} blocks of {deepest} layers, but holds only {len(state)} tensors; "
                "give a complete model file of TARFlow."
            )
        # TARFlow's blocks have one depth: a layer that only some of them have is missing in the others.
        least = 0 if shared else 1
        depths = tuple(shared + own.get(t, least) if levels else deepest for t in range(blocks))
        return cls(depths, any(name.endswith("class_embed") for name in state), levels, shared)

    def names(self) -> dict[str, str | None]:
        """Their names in their order, and ours; None for buffers without information."""
        names: dict[str, str | None] = {"var": None, **_stack("", "shared_backbone", 0, range(self.shared))}
        for t, depth in enumerate(self.depths):
            block = f"blocks.{t}."
            names[block + "pos_embed"] = block + "position"
            if self.conditional:
                names[block + "class_embed"] = block + "class_table"
            names[block + "attn_mask"] = None
            names |= _linear(block + "proj_in", block + "proj_in")
            names |= _stack(block, "shared_backbone", t, range(self.shared))
            names |= _stack(block, self.layers, t, range(self.shared, depth))
            names |= _linear(block + "proj_out", block + "proj_out")
            if self.levels:
                names |= _linear(block + "time_embed.mlp.0", block + "level_embedding.up")
                names |= _linear(block + "time_embed.mlp.2", block + "level_embedding.down")
        return names

    @property
    def layers(self) -> str:
        """Their name of a block's own layers."""
        return "head_blocks" if self.levels else "attn_blocks"


def _stack(before: str, name: str, block: int, layers: range) -> dict[str, str]:
    """Names of layers of a block of ours; theirs count from 0 in each stack."""
    names: dict[str, str] = {}
    for index, layer in enumerate(layers):
        for theirs, ours in _LAYER_PARTS.items():
            names |= _linear(f"{before}{name}.{index}.{theirs}", f"blocks.{block}.body.layers.{layer}.{ours}")
    return names


def _linear(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def read_tarflow(
    file: Path,
    image_size: int,
    patch_size: int,
    noise: Noise = "gaussian",
    noise_std: float = 0.05,
    noise_range: tuple[float, float] | None = None,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model and our state dict from a file with their names; arguments as in :func:`from_tarflow`.

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
        return from_tarflow(state, image_size, patch_size, noise, noise_std, noise_range)
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
    noise: Noise = "gaussian",
    noise_std: float = 0.05,
    noise_range: tuple[float, float] | None = None,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model and our state dict from one with TARFlow's or iTARFlow's names; dtypes stay.

    Width, blocks, layers, classes and channels come from the shapes; heads are 64 wide, as theirs always are.

    Args:
        state: the original state dict; DistributedDataParallel and torch.compile may have changed its names.
        image_size: side of the images; it is not in the file.
        patch_size: side of the patches; it is not in the file.
        noise: kind of noise that a TARFlow was trained with.
        noise_std: standard deviation of the Gaussian noise it was trained with.
        noise_range: lowest and highest noise level that an iTARFlow was trained with.

    Raises:
        InputError: not such a state dict, a model without scales (`nvp=False`), blocks of different widths or
            patches, other sizes, or no range for an iTARFlow, and for no other.
    """
    state = _unwrapped(state)
    layout = _Layout.of(state)
    names = layout.names()
    _check_names(state, names)
    dtypes = {value.dtype for value in state.values()}
    if len(dtypes) > 1:
        raise InputError(
            f"it mixes {' and '.join(sorted(map(str, dtypes)))}; bring all tensors to one dtype."
        )
    config = _config(
        state, layout, image_size, patch_size, _noise_settings(layout, noise, noise_std, noise_range)
    )
    _check_shapes(state, _renamed(layout, config, _meta_state(config)))
    _check_values(state, layout, config.tokens)
    weights: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        if ours is not None:
            value = state[theirs].squeeze(1) if ours.endswith("class_table") else state[theirs]
            weights[ours] = value.clone() if "shared_backbone." in theirs else value  # no two share memory
    return config, weights


def to_tarflow(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`from_tarflow`: their names, order, buffers and shapes.

    A flow with a range of noise levels gets iTARFlow's layout, any other TARFlow's.

    Raises:
        InputError: a model that the original code cannot express.
    """
    levels = config.noise == "range"
    for option, value, needed in (
        ("position", config.position, "learned"),
        ("mlp", config.mlp, "gelu"),
        ("mlp-ratio", config.mlp_ratio, 4),
        ("qk-norm", config.qk_norm, False),
        ("head-dim", config.head_dim, _HEAD_DIM),
        ("log-scale-bound", config.log_scale_bound, None),
        ("layers", config.layers, config.layers if levels else max(config.depths)),
    ):
        if value != needed:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(
                f"The original TARFlow code has no --model.{option} {shown}, only {needed}; "
                "this model cannot be exported."
            )
    shared = _equal_layers(config, state) if levels else 0
    return _renamed(_Layout(config.depths, bool(config.num_classes), levels, shared), config, state)


def _renamed(layout: _Layout, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in a layout of theirs."""
    like = state["blocks.0.position"]
    converted = {}
    for theirs, ours in layout.names().items():
        if theirs == "var":
            converted[theirs] = like.new_ones(config.tokens, config.token_dim)
        elif ours is None:
            converted[theirs] = like.new_ones(config.tokens, config.tokens).tril()
        else:
            converted[theirs] = state[ours].unsqueeze(1) if ours.endswith("class_table") else state[ours]
    return converted


def _equal_layers(config: ModelConfig, state: Mapping[str, Tensor]) -> int:
    """How many first layers are equal in all blocks; of one block, none."""
    if config.blocks == 1:
        return 0
    for layer in range(min(config.depths)):
        first, *others = (_stack("", "", t, range(layer, layer + 1)).values() for t in range(config.blocks))
        pairs = ((one, other) for names in others for one, other in zip(first, names, strict=True))
        if not all(torch.equal(state[one], state[other]) for one, other in pairs):
            return layer
    return min(config.depths)


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without what wrappers put into its names, and with today's name of iTARFlow's layers."""
    levels = any(".time_embed." in name for name in state)
    unwrapped: dict[str, Tensor] = {}
    for wrapped, value in state.items():
        name = _WRAPPER.sub("", wrapped)
        name = name.replace(".attn_blocks.", ".head_blocks.") if levels else name
        if name in unwrapped:
            raise InputError(f"it holds {shorten(name)} twice, under different prefixes; keep one of them.")
        unwrapped[name] = value
    return unwrapped


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


def _noise_settings(
    layout: _Layout, noise: Noise, noise_std: float, noise_range: tuple[float, float] | None
) -> dict[str, Any]:
    """What the user says of the noise, for a :class:`ModelConfig`."""
    if not layout.levels:
        if noise_range is not None:
            raise InputError(
                "--noise-range is for models that are told the noise level, and this one has no time_embed; "
                "leave it out."
            )
        return {"noise": noise, "noise_std": noise_std}
    if noise_range is None:
        raise InputError(
            "the model is told the noise level of its images (it has blocks.0.time_embed...), and no file "
            "says which levels it was trained on; give them as --noise-range MIN MAX."
        )
    if noise == "uniform":
        raise InputError("the model has a range of noise levels; leave --noise uniform out.")
    return {"noise": "range", "noise_min": noise_range[0], "noise_max": noise_range[1]}


def _config(
    state: Mapping[str, Tensor], layout: _Layout, image_size: int, patch_size: int, noise: dict[str, Any]
) -> ModelConfig:
    sizes = {_block_sizes(state, f"blocks.{t}.") for t in range(len(layout.depths))}
    if len(sizes) > 1:
        raise InputError(
            "its blocks have different widths or patches; flowback reads models that have one of each."
        )
    ((tokens, width, token_dim),) = sizes
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
        blocks=len(layout.depths),
        layers=layout.depths,
        head_dim=_HEAD_DIM,
        num_classes=0 if table is None else len(table),
        **noise,
    )


def _block_sizes(state: Mapping[str, Tensor], block: str) -> tuple[int, int, int]:
    """Tokens, width, and values of a token."""
    for name in ("pos_embed", "proj_in.weight", "proj_out.weight"):
        if state[block + name].ndim != 2:
            raise InputError(f"{block}{name} is not a matrix; give an unchanged model file of TARFlow.")
    tokens, width = state[block + "pos_embed"].shape
    return tokens, width, state[block + "proj_in.weight"].shape[-1]


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


def _check_values(state: Mapping[str, Tensor], layout: _Layout, tokens: int) -> None:
    """Refuse buffers that are not what they always are, and a stack that is not the same in all blocks."""
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
    for name in _stack("", "shared_backbone", 0, range(layout.shared)):
        for t in range(len(layout.depths)):
            if not torch.equal(state[name], state[f"blocks.{t}.{name}"]):
                raise InputError(
                    f"blocks.{t}.{name} is not equal to {name}, of the stack that all blocks share; "
                    "give an unchanged model file of iTARFlow."
                )

"""Files of the original iTARFlow code: levels, uneven blocks, a shared stack, and names changed by wrappers.

The reference is that of test_tarflow_weights, which reads the layers that a file names, and the level.
"""

from __future__ import annotations

import pytest
import torch

import flowback
from flowback import Flow, InputError, ModelConfig
from flowback.cli import main
from flowback.tarflow_weights import from_tarflow, to_tarflow
from test_tarflow_weights import PATCH, SIZE, images, imported, original, reference  # noqa: F401

RANGE = ("--noise-range", "0.01", "0.5")
KINDS = {
    "uneven": {"depths": (1, 3)},
    "unconditional": {"depths": (2, 2), "classes": 0},
    "shared": {"depths": (2, 3), "shared": 2},
}


def theirs(kind="uneven", **more):
    return original(levels=True, **KINDS[kind] | more)


def converted(state, noise_range=(0.01, 0.5), **more):
    return from_tarflow(state, SIZE, PATCH, noise_range=noise_range, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_function(imported, kind, dtype):  # noqa: F811
    state = theirs(kind)
    flow = flowback.load(imported(state, *RANGE)).to(dtype)
    assert (flow.config.depths, flow.config.noise) == (KINDS[kind]["depths"], "range")
    assert (flow.config.noise_min, flow.config.noise_max) == (0.01, 0.5)
    x, levels = images().to(dtype), [0.01, 0.2, 0.5]
    labels = None if kind == "unconditional" else [4, 0, 2]
    noise = torch.tensor(levels, dtype=dtype)
    out = flow(x, labels, noise=noise)
    assert (out.z - flow(x, labels, noise=noise.flip(0)).z).abs()[::2].max() > 0.1  # the level counts
    # fp32: 1e-5 is the stated parity; float64: the angles of log t are kept in fp32, some 1e-7 of them
    tolerance = {"atol": 1e-6 if dtype == torch.float64 else 1e-5, "rtol": 0}
    for index, level in enumerate(levels):
        z, log_det = reference(state, x[index], labels[index] if labels else None, level)
        torch.testing.assert_close(out.z[index].double(), z, **tolerance)
        per_dimension = out.log_det[index].double() / flow.config.dims  # the original's unit
        torch.testing.assert_close(per_dimension, log_det, **tolerance)
    torch.testing.assert_close(flow.inverse(out.z, labels, noise=noise), x, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_file_back(imported, tmp_path, capsys, kind, dtype):  # noqa: F811
    state = theirs(kind, dtype=dtype)
    folder = imported(state, *RANGE)
    assert main(["export-tarflow", str(folder), str(tmp_path / "back.pth")]) == 0
    printed = capsys.readouterr().out
    assert (
        f"blocks of {'2' if kind == 'unconditional' else str(KINDS[kind]['depths'])[1:-1]} layers" in printed
    )
    assert "in the layout of the original iTARFlow code" in printed
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
        lambda name: name.replace(".head_blocks.", ".attn_blocks."),  # their older name
    ],
)
def test_other_names_of_the_same_tensors(renamed):
    state = theirs("shared")
    config, weights = converted(state)
    again, same = converted({renamed(name): value for name, value in state.items()})
    assert again == config
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_prefixes_of_tarflows_own_files():
    state = original()
    config, weights = from_tarflow(state, SIZE, PATCH)
    again, same = from_tarflow({f"module.{name}": value for name, value in state.items()}, SIZE, PATCH)
    assert again == config
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_a_stack_that_training_has_parted_is_written_block_by_block():
    config, weights = converted(theirs("shared"))
    weights["blocks.1.body.layers.1.mlp.up.bias"] = weights["blocks.1.body.layers.1.mlp.up.bias"] + 1
    state = to_tarflow(config, weights)
    assert "shared_backbone.0.mlp.norm.weight" in state  # the first layer is still equal
    assert "shared_backbone.1.mlp.norm.weight" not in state
    again, same = converted(state)
    assert again == config
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_a_flow_of_ours_can_be_read_by_theirs():
    size = {"image_size": 8, "channels": 1, "patch_size": 2, "width": 64, "blocks": 2, "num_classes": 3}
    flow = Flow(ModelConfig(**size, layers=(1, 2), noise="range", noise_min=0.02, noise_max=0.4))
    state = to_tarflow(flow.config, flow.state_dict())
    assert not any("shared" in name for name in state)
    config, again = from_tarflow(state, 8, 2, noise_range=(0.02, 0.4))
    assert config == flow.config
    assert all(torch.equal(value, again[name]) for name, value in flow.state_dict().items())


def refusal(state, **options):
    with pytest.raises(InputError) as caught:
        converted(state, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_range_is_needed_and_only_where_there_are_levels():
    assert "give them as --noise-range MIN MAX" in refusal(theirs(), noise_range=None)
    assert "leave --noise uniform out" in refusal(theirs(), noise="uniform")
    assert "this one has no time_embed; leave it out" in refusal(original())


def test_weights_that_do_not_fit_together():
    state = theirs()
    wide = {k: v[..., :64] if k == "blocks.1.pos_embed" else v for k, v in state.items()}
    assert "blocks have different widths or patches" in refusal(wide)
    short = {**state, "blocks.1.time_embed.mlp.0.bias": torch.ones(7)}
    assert "mlp.0.bias is (7,), but the other tensors need (512,)" in refusal(short)
    without = {k: v for k, v in state.items() if k != "blocks.0.time_embed.mlp.2.weight"}
    assert "lacks blocks.0.time_embed.mlp.2.weight;" in refusal(without)
    without = {k: v for k, v in state.items() if "blocks.0.head_blocks" not in k}
    assert "lacks blocks.0.head_blocks.0.attention.norm.weight and 11 more" in refusal(without)
    gap = {k: v for k, v in state.items() if "blocks.1.head_blocks.1." not in k}
    assert "lacks blocks.1.head_blocks.1.attention.norm.weight and 11 more" in refusal(gap)
    assert "holds blocks.0.proj_in.bias twice" in refusal(
        {**state, "module.blocks.0.proj_in.bias": state["blocks.0.proj_in.bias"]}
    )
    state, name = theirs("shared"), "blocks.1.shared_backbone.1.mlp.norm.bias"
    assert f"{name} is not equal to shared_backbone.1.mlp.norm.bias" in refusal(
        {**state, name: state[name] + 1}
    )
    assert "it names 2 blocks of 1000000001 layers, but holds only" in refusal(
        {**state, "shared_backbone.999999999.x": torch.ones(1)}
    )


def test_a_range_that_is_none(tmp_path, capsys):
    words = ["import-tarflow", "a.pth", str(tmp_path / "out"), "--image-size", "12", "--patch-size", "3"]
    for low, high in (("0", "1"), ("0.5", "0.1"), ("nan", "1")):
        assert main([*words, "--noise-range", low, high]) == 2
        assert "--noise-range takes two levels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

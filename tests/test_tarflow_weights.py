"""Files of the original TARFlow code: the same function, the same file back, and clear refusals.

The reference below reads the original names and was written from the paper's equations: no flowback, no
batched attention kernel, one image at a time, with the sums over earlier tokens written out as a mask.
"""

from __future__ import annotations

import math
import re

import pytest
import torch

import flowback
from flowback import Flow, InputError, ModelConfig
from flowback.cli import main
from flowback.tarflow_weights import from_tarflow, read_tarflow, to_tarflow, write_tarflow

SIZE, PATCH, CHANNELS, WIDTH, HEAD, BLOCKS, LAYERS = 12, 3, 3, 128, 64, 2, 2
TOKENS, DIM = (SIZE // PATCH) ** 2, CHANNELS * PATCH**2


def original(classes=5, dtype=torch.float32, seed=0, depths=(LAYERS,) * BLOCKS, levels=False, shared=0):
    """A random state dict in the original's names and order, as after training: far from the identity.

    With ``levels`` that of iTARFlow, whose first ``shared`` layers are one stack: the same tensors in every
    block.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.0, std=0.05):
        return (mean + std * torch.randn(*shape, generator=generator)).to(dtype)

    def linear(name, rows, columns, std=0.05):
        return {f"{name}.weight": draw(rows, columns, std=std), f"{name}.bias": draw(rows)}

    def norm(name):
        return {f"{name}.weight": draw(WIDTH, mean=1.0, std=0.1), f"{name}.bias": draw(WIDTH)}

    def layer(name):
        return {
            **norm(f"{name}.attention.norm"),
            **linear(f"{name}.attention.qkv", 3 * WIDTH, WIDTH),
            **linear(f"{name}.attention.proj", WIDTH, WIDTH),
            **norm(f"{name}.mlp.norm"),
            **linear(f"{name}.mlp.main.0", 4 * WIDTH, WIDTH),
            **linear(f"{name}.mlp.main.2", WIDTH, 4 * WIDTH),
        }

    stack = {name: value for j in range(shared) for name, value in layer(f"shared_backbone.{j}").items()}
    state = {"var": torch.ones(TOKENS, DIM, dtype=dtype), **stack}
    for t, depth in enumerate(depths):
        block = {"pos_embed": draw(TOKENS, WIDTH)}
        if classes:
            block["class_embed"] = draw(classes, 1, WIDTH, std=0.2)
        block["attn_mask"] = torch.ones(TOKENS, TOKENS, dtype=dtype).tril()
        block |= linear("proj_in", WIDTH, DIM, std=0.2)
        block |= stack
        for j in range(depth - shared):
            block |= layer(f"{'head' if levels else 'attn'}_blocks.{j}")
        block |= linear("proj_out", 2 * DIM, WIDTH, std=0.02)  # log-scales of some 0.3
        if levels:
            block |= linear("time_embed.mlp.0", 4 * WIDTH, WIDTH, std=0.1)
            block |= linear("time_embed.mlp.2", WIDTH, 4 * WIDTH, std=0.1)
        state |= {f"blocks.{t}.{name}": value for name, value in block.items()}
    return state


def layers_of(state, block):
    """Where the layers of a block are, the shared ones first."""
    places = [re.match(rf"({block}\.(?:shared_backbone|\w+_blocks)\.\d+)\.", name) for name in state]
    return dict.fromkeys(place[1] for place in places if place)


def reference(state, image, label, level=None):
    """Noise (N, D) of one image and the mean of its log-determinant over dimensions, in float64."""
    w = {name: value.double() for name, value in state.items()}
    rows = range(0, SIZE, PATCH)
    x = torch.stack([image[:, r : r + PATCH, c : c + PATCH].flatten() for r in rows for c in rows]).double()
    total = torch.zeros((), dtype=torch.float64)

    def affine(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, value):
        centred = value - value.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    def gelu(value):
        return value * (1 + torch.erf(value / math.sqrt(2))) / 2

    for t in range(BLOCKS):
        order = list(range(TOKENS)) if t % 2 == 0 else list(reversed(range(TOKENS)))
        name = f"blocks.{t}"
        u = x[order]
        h = affine(f"{name}.proj_in", u) + w[f"{name}.pos_embed"][order]
        if f"{name}.class_embed" in w:
            table = w[f"{name}.class_embed"][:, 0]
            h = h + (table.sum(0) / len(table) if label is None else table[label])
        if level is not None:
            angles = [
                math.log(level) * math.exp(-math.log(10_000) * k / (WIDTH // 2)) for k in range(WIDTH // 2)
            ]
            waves = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            inside = affine(f"{name}.time_embed.mlp.0", torch.tensor(waves, dtype=torch.float64))
            h = h + affine(f"{name}.time_embed.mlp.2", gelu(inside))
        for layer in layers_of(state, name):
            q, k, v = affine(f"{layer}.attention.qkv", norm(f"{layer}.attention.norm", h)).split(WIDTH, dim=1)
            gathered = []
            for start in range(0, WIDTH, HEAD):
                head = slice(start, start + HEAD)
                weights = (q[:, head] @ k[:, head].T / math.sqrt(HEAD)).exp().tril()
                gathered.append(weights / weights.sum(1, keepdim=True) @ v[:, head])
            h = h + affine(f"{layer}.attention.proj", torch.cat(gathered, dim=1))
            m = affine(f"{layer}.mlp.main.0", norm(f"{layer}.mlp.norm", h))
            h = h + affine(f"{layer}.mlp.main.2", gelu(m))
        out = affine(f"{name}.proj_out", h)
        log_scale, shift = torch.zeros_like(u), torch.zeros_like(u)
        log_scale[1:], shift[1:] = out[:-1, :DIM], out[:-1, DIM:]  # first half log-scale, second half shift
        z = (u - shift) / log_scale.exp()
        total = total - log_scale.mean()
        x = torch.empty_like(z)
        x[order] = z
    return x, total


def images(count=3):
    return torch.rand(count, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.fixture
def imported(tmp_path):
    """Import a state dict by the command; the folder."""

    def run(state, *options):
        torch.save(state, tmp_path / "original.pth")
        words = ["import-tarflow", str(tmp_path / "original.pth"), str(tmp_path / "out")]
        assert main([*words, "--image-size", str(SIZE), "--patch-size", str(PATCH), *options]) == 0
        return tmp_path / "out"

    return run


@pytest.mark.parametrize(
    ("classes", "labels"), [(0, None), (5, None), (5, [4, 0, 2])], ids=["unconditional", "mean", "labels"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_function(imported, classes, labels, dtype):
    state = original(classes)
    flow = flowback.load(imported(state)).to(dtype)
    x = images().to(dtype)
    out = flow(x, labels)
    assert (out.z - flow.tokens(x)).abs().max() > 0.5  # not the identity
    # fp32: 1e-5 is the stated parity; float64: rounding alone
    tolerance = {"atol": 1e-9 if dtype == torch.float64 else 1e-5, "rtol": 0}
    for index in range(3):
        z, log_det = reference(state, x[index], labels[index] if labels else None)
        torch.testing.assert_close(out.z[index].double(), z, **tolerance)
        per_dimension = out.log_det[index].double() / flow.config.dims  # the original's unit
        torch.testing.assert_close(per_dimension, log_det, **tolerance)
    torch.testing.assert_close(flow.inverse(out.z, labels), x, **tolerance)


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_file_back(imported, tmp_path, classes, dtype):
    state = original(classes, dtype)
    folder = imported(state)
    assert main(["export-tarflow", str(folder), str(tmp_path / "back.pth")]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name


def test_what_is_written_and_said(imported, capsys):
    folder = imported(original())
    printed = capsys.readouterr().out
    assert "2 blocks of 2 layers, width 128, 3x12x12 images, 16 tokens, 5 classes" in printed
    flow = flowback.load(folder)
    config = flow.config
    assert (config.noise, config.noise_std, config.head_dim) == ("gaussian", 0.05, 64)
    assert flow.run.data.name == "none"  # the file does not say; certainly not the default


def test_noise_is_stored(tmp_path):
    torch.save(original(), tmp_path / "a.pth")
    words = ["import-tarflow", str(tmp_path / "a.pth"), "--image-size", "12", "--patch-size", "3"]
    assert main([*words, str(tmp_path / "a"), "--noise", "uniform"]) == 0
    assert main([*words, str(tmp_path / "b"), "--noise-std", "0.2"]) == 0
    assert flowback.load(tmp_path / "a").config.noise == "uniform"
    assert flowback.load(tmp_path / "b").config.noise_std == 0.2


def test_nothing_is_overwritten(imported, tmp_path, capsys):
    folder = imported(original())
    words = ["import-tarflow", str(tmp_path / "original.pth"), str(folder), "--image-size", "12"]
    assert main([*words, "--patch-size", "3"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["export-tarflow", str(folder), str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def refusal(state, size=SIZE, patch=PATCH):
    with pytest.raises(InputError) as caught:
        from_tarflow(state, size, patch)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_other_sizes_are_refused():
    for size, patch in [(24, 3), (12, 4), (13, 3), (16, 4)]:
        text = refusal(original(), size, patch)
        assert f"--image-size {size} and --patch-size {patch} do not fit its 16 tokens of 27 values" in text


def test_other_models_are_refused():
    state = original()
    assert "this is not a state dict of TARFlow" in refusal({"weight": torch.ones(2)})
    assert "lacks blocks.1.proj_in.bias;" in refusal(
        {k: v for k, v in state.items() if k != "blocks.1.proj_in.bias"}
    )
    assert "lacks blocks.1.attn_blocks.1.mlp.norm.weight and 1 more;" in refusal(
        {k: v for k, v in state.items() if "1.attn_blocks.1.mlp.norm" not in k}
    )
    assert "has the unknown blocks.0.extra;" in refusal({**state, "blocks.0.extra": torch.ones(1)})
    assert "lacks blocks.0.class_embed" in refusal(
        {k: v for k, v in state.items() if k != "blocks.0.class_embed"}
    )
    assert "var, the prior's variance, is not 1" in refusal({**state, "var": state["var"] * 0.9})
    volume_preserving = {k: v[:DIM] if "proj_out" in k else v for k, v in state.items()}
    assert "nvp=False" in refusal(volume_preserving)
    assert "not the causal mask" in refusal({**state, "blocks.1.attn_mask": torch.ones(TOKENS, TOKENS)})
    assert "mixes torch.float16 and torch.float32" in refusal({**state, "var": state["var"].half()})
    assert "(3, 128), but the other tensors need (5, 1, 128)" in refusal(
        {**state, "blocks.1.class_embed": torch.ones(3, WIDTH)}
    )
    assert "proj_in.weight is not a matrix" in refusal({**state, "blocks.0.proj_in.weight": torch.ones(())})
    narrow = {k: v[..., :32] if "pos_embed" in k else v for k, v in state.items()}
    assert "its width 32 is not a multiple of 64" in refusal(narrow)


def test_bad_files(tmp_path):
    def refused(content):
        file = tmp_path / "a.pth"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        with pytest.raises(InputError, match=str(file)) as caught:
            read_tarflow(file, SIZE, PATCH)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in refused(None)
    assert "damaged" in refused(b"")
    assert "damaged" in refused(b"text")
    assert "does not hold only tensors" in refused(ModelConfig())
    assert "holds no state dict" in refused({"model": original()})
    assert "holds no state dict" in refused([1, 2])
    assert "not a state dict of TARFlow" in refused({})
    torch.save(original(), tmp_path / "whole.pth")
    assert "damaged" in refused((tmp_path / "whole.pth").read_bytes()[:-1000])


def test_a_flow_of_ours_can_be_read_by_theirs(tmp_path):
    flow = Flow(
        ModelConfig(image_size=8, channels=1, patch_size=2, width=64, blocks=2, layers=1, num_classes=3)
    )
    state = to_tarflow(flow.config, flow.state_dict())
    write_tarflow(tmp_path / "a.pth", state)
    config, again = read_tarflow(tmp_path / "a.pth", 8, 2, noise_std=0.05)
    assert config == flow.config
    assert all(torch.equal(value, again[name]) for name, value in flow.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        {"position": "rope"},
        {"mlp": "swiglu"},
        {"qk_norm": True},
        {"head_dim": 32},
        {"mlp_ratio": 2},
        {"log_scale_bound": 4.0},
        {"layers": (1, 2)},
    ],
)
def test_what_theirs_cannot_express(change):
    options = {
        "image_size": 8,
        "patch_size": 2,
        "width": 64,
        "blocks": 2,
        "layers": 1,
        "num_classes": 0,
        **change,
    }
    flow = Flow(ModelConfig(**options))
    ((name, value),) = change.items()
    value = "1,2" if name == "layers" else value
    with pytest.raises(InputError, match=f"no --model.{name.replace('_', '-')} {value}, only"):
        to_tarflow(flow.config, flow.state_dict())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--patch-size", "0"], "must be at least 1"),
        (["--patch-size", "3", "--noise-std", "-1"], "not be negative"),
    ],
)
def test_bad_options(tmp_path, capsys, option, message):
    assert main(["import-tarflow", "a.pth", str(tmp_path / "out"), "--image-size", "12", *option]) == 2
    assert message in capsys.readouterr().err

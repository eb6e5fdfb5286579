"""Every kind of image file, against what its pixels must become; exact unless a tolerance is stated."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from flowback.data.pixels import UnreadableImageError, decode, fit, read_image

RED, WHITE = [255, 0, 0], [255, 255, 255]


def save(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def colours(path, size=2, channels=3):
    """Rows of pixels, channels last."""
    return decode(path, size, channels).transpose(1, 2, 0).tolist()


def test_native_size_is_untouched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(pixels))
    np.testing.assert_array_equal(decode(path, 8, 3), pixels.transpose(2, 0, 1))


def test_short_side_is_resized_and_the_centre_cropped(tmp_path):
    # Columns 0-3 blue, 4-11 a grey ramp by row, 12-15 blue: the middle 8x8 square is kept.
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[..., 2] = 255
    pixels[:, 4:12] = np.arange(8)[:, None, None] * 30
    path = save(tmp_path, Image.fromarray(pixels))
    np.testing.assert_array_equal(decode(path, 8, 3), pixels[:, 4:12].transpose(2, 0, 1))
    tall = save(tmp_path, Image.fromarray(pixels.transpose(1, 0, 2)))
    np.testing.assert_array_equal(decode(tall, 8, 3), pixels[:, 4:12].transpose(2, 1, 0))


def test_down_scaling_is_antialiased(tmp_path):
    # A one-pixel checkerboard has mean 127.5; without a low-pass filter, a resize by 4 gives 0 or 255.
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    path = save(tmp_path, Image.fromarray(board))
    assert np.abs(decode(path, 8, 1).astype(int) - 127.5).max() < 4  # bicubic lobes cut off at the border


def test_very_long_image_stays_small(tmp_path):
    path = save(tmp_path, Image.new("RGB", (20_000, 1), "red"))
    assert colours(path) == [[RED, RED], [RED, RED]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr", "CMYK", "LA", "RGBA", "I;16", "I"])
def test_every_mode_gives_the_same_grey(tmp_path, mode):
    value = 255 if mode == "1" else 120
    if mode in ("I;16", "I"):
        dtype = np.uint16 if mode == "I;16" else np.int32
        image = Image.fromarray(np.full((4, 4), value * 257, dtype=dtype))
    else:
        image = Image.new("RGB", (4, 4), (value,) * 3)
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    path = save(tmp_path, image, "image.tif")
    with Image.open(path) as written:
        if mode == "YCbCr" and written.mode == "RGB":
            pytest.skip("Pillow below 13 writes such a file wrong")
        assert written.mode == mode
    # 1 for the rounding of YCbCr
    np.testing.assert_allclose(decode(path, 2, 3), np.full((3, 2, 2), value), atol=1)
    np.testing.assert_allclose(decode(path, 2, 1), np.full((1, 2, 2), value), atol=1)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    values = np.array([[0, 256, 65535], [128, 129, 32768], [65406, 65407, 500]], dtype=np.uint16)
    path = save(tmp_path, Image.fromarray(values))
    np.testing.assert_array_equal(decode(path, 3, 1)[0], np.rint(values / 257))


def test_palette_keeps_its_colours(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert colours(save(tmp_path, image)) == [[RED, RED], [RED, RED]]


@pytest.mark.parametrize("kind", ["rgba", "palette", "grey"])
def test_transparent_becomes_white(tmp_path, kind):
    if kind == "rgba":
        image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
        image.putpixel((0, 0), (*RED, 255))
        path, first = save(tmp_path, image), RED
    elif kind == "palette":
        image = Image.new("P", (2, 2), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.putpixel((0, 0), 1)
        path, first = save(tmp_path, image, transparency=bytes([0, 255])), RED
    else:
        image = Image.new("L", (2, 2), 0)
        image.putpixel((0, 0), 255)
        path, first = save(tmp_path, image, transparency=0), WHITE
    assert colours(path) == [[first, WHITE], [WHITE, WHITE]]


def test_half_transparent_is_mixed_with_white(tmp_path):
    path = save(tmp_path, Image.new("RGBA", (2, 2), (0, 0, 0, 128)))
    assert colours(path)[0][0] == [127, 127, 127]


def test_exif_orientation_is_honoured(tmp_path):
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (0, 0, 16, 8))  # blue above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    path = save(tmp_path, image, "image.jpg", exif=exif, quality=95)
    pixels = decode(path, 16, 3)
    assert pixels[2, :, 12:].min() > 240  # blue is right
    assert pixels[0, :, :4].min() > 240  # red is left


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_image(tmp_path):
    path = save(tmp_path, Image.new("RGB", (4, 4), "red"), "image.jpg", exif=b"Exif\0\0MM\0*damaged")
    assert decode(path, 4, 3)[0].min() > 240


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    path = save(tmp_path, frames[0], "image.gif", save_all=True, append_images=frames[1:])
    assert colours(path) == [[RED, RED], [RED, RED]]


def test_bright_corner_stays_where_it_is():
    """Never flips."""
    image = Image.new("L", (8, 8))
    image.putpixel((7, 0), 255)
    assert np.unravel_index(fit(image, 8, 1).argmax(), (1, 8, 8)) == (0, 0, 7)


def damaged(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = save(tmp_path, photo, "whole.jpg").read_bytes()
    png = save(tmp_path, photo, "whole.png").read_bytes()
    broken = bytearray(png)
    broken[len(png) // 2] ^= 0xFF
    return {
        "empty file": b"",
        "not an image": b"just a text",
        "damaged": whole[: len(whole) // 2],
        "damaged: ": bytes(broken),
        "damaged:": png[: len(png) // 2],
    }


@pytest.mark.parametrize("reason", ["empty file", "not an image", "damaged", "damaged: ", "damaged:"])
def test_unreadable_files_give_a_reason(tmp_path, reason):
    path = tmp_path / "bad.png"
    path.write_bytes(damaged(tmp_path)[reason])
    with pytest.raises(UnreadableImageError, match=reason):
        decode(path, 8, 3)


def test_values_without_a_range_are_unreadable(tmp_path):
    path = save(tmp_path, Image.fromarray(np.ones((4, 4), dtype=np.float32)), "float.tif")
    with pytest.raises(UnreadableImageError, match="float"):
        decode(path, 4, 1)
    path = save(tmp_path, Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)), "int.tif")
    with pytest.raises(UnreadableImageError, match="16 bits"):
        decode(path, 4, 1)


def test_missing_file(tmp_path):
    with pytest.raises(UnreadableImageError, match="no such file"):
        decode(tmp_path / "gone.png", 4, 1)


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(UnreadableImageError, match="too many pixels"):
        decode(save(tmp_path, Image.new("L", (9, 9))), 4, 1)


@pytest.mark.parametrize("side", [11, 13])
def test_large_images_are_read_or_refused_without_pillows_warning(tmp_path, monkeypatch, side):
    """Pillow warns from its limit on, and refuses from twice as many pixels; here warnings are errors."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr("flowback.data.pixels.MOST_PIXELS", 150)
    file = save(tmp_path, Image.new("L", (side, side)))
    if side**2 < 150:
        assert decode(file, 4, 1).shape == (1, 4, 4)
    else:
        with pytest.raises(UnreadableImageError, match=r"^too many pixels$"):
            decode(file, 4, 1)


def fixed(*values):
    """Numbers as ICC's 15.16 fixed point."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space, tags, pcs=b"XYZ "):
    """An ICC profile of version 2.1 with these tags."""
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02100000, b"mntr", space, pcs, b"acsp")
    head += fixed(0.9642, 1, 0.8249)  # D50
    return head.ljust(128, b"\0") + table + body


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


WHITE_POINT = {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
PRIMARIES = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))  # sRGB's, for D50


def table(levels):
    """sRGB's curve, as coarse as other writers store it."""
    x = np.linspace(0, 1, levels)
    light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I", levels) + np.rint(light * 65535).astype(">u2").tobytes()


def rgb_profile(order=(0, 1, 2), gamma=2.2, response=None):
    response, tags = response or curve(gamma), dict(WHITE_POINT)
    for channel, own in zip((b"r", b"g", b"b"), order, strict=True):
        tags |= {channel + b"XYZ": b"XYZ \0\0\0\0" + fixed(*PRIMARIES[own]), channel + b"TRC": response}
    return icc(b"RGB ", tags)


def grey_profile(gamma):
    return icc(b"GRAY", WHITE_POINT | {b"kTRC": curve(gamma)})


def cmyk_profile():
    """Black ink alone prints, from L* = 100 without it to 0; the other three are invisible."""
    identity, corners = bytes(range(256)), 8 * bytes((255, 128, 128, 0, 128, 128))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc(b"CMYK", WHITE_POINT | {b"A2B0": table + 4 * identity + corners + 3 * identity}, b"Lab ")


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BLUE = [0, 0, 255]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
def test_colours_are_brought_to_srgb(tmp_path, mode, ending):
    """A profile whose red is sRGB's blue."""
    if (ending, mode) in {("jpg", "RGBA"), ("jpg", "P"), ("webp", "P")}:
        pytest.skip("no such files")
    image = Image.new("RGB", (4, 4), "red")
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(ending, {})
    path = save(tmp_path, image, f"image.{ending}", icc_profile=rgb_profile((2, 1, 0)), **options)
    pixels, notes = read_image(path, 4, 3)
    # JPEG's red is 254; the steep end of gamma 2.2 below.
    np.testing.assert_allclose(pixels[:, 0, 0], BLUE, atol=2)
    assert notes == ()
    plain = save(tmp_path, image, f"plain.{ending}", **options)
    np.testing.assert_allclose(decode(plain, 4, 3)[:, 0, 0], RED, atol=2)
    np.testing.assert_allclose(decode(path, 4, 1), 0.114 * 255, atol=2)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey_is_brought_to_srgb(tmp_path, mode):
    """Half of the light is 188 in sRGB: its curve at 1/2 is 0.735."""
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    else:
        image = Image.new("L", (4, 4), 128).convert(mode) if mode != "1" else Image.new("1", (4, 4), 1)
    path = save(tmp_path, image, icc_profile=grey_profile(1.0))
    expected = 255 if mode == "1" else 188
    np.testing.assert_allclose(decode(path, 4, 1), expected, atol=1)
    np.testing.assert_allclose(decode(path, 4, 3), expected, atol=1)


def test_a_profile_of_colours_serves_grey_images_too(tmp_path):
    path = save(tmp_path, Image.new("L", (4, 4), 128), icc_profile=rgb_profile(gamma=1.0))
    np.testing.assert_allclose(decode(path, 4, 1), 188, atol=1)
    assert read_image(path, 4, 1)[1] == ()


def test_cmyk_is_brought_to_srgb(tmp_path):
    path = save(
        tmp_path, Image.new("CMYK", (4, 4), (200, 0, 0, 128)), "image.tif", icc_profile=cmyk_profile()
    )
    pixels, notes = read_image(path, 4, 3)
    np.testing.assert_allclose(pixels, 119, atol=2)  # L* = 50 is Y = 0.184, 0.466 on sRGB's curve
    assert notes == ()


def test_transparent_is_white_whatever_the_profile(tmp_path):
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    path = save(tmp_path, image, icc_profile=rgb_profile((2, 1, 0)))
    assert colours(path) == [[BLUE, WHITE], [WHITE, WHITE]]


def test_srgb_changes_no_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for profile in (SRGB, rgb_profile(response=table(16)), None):
        path = save(tmp_path, Image.fromarray(pixels), icc_profile=profile)
        np.testing.assert_array_equal(decode(path, 8, 3), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"not a profile"),
        ("RGB", SRGB[:300]),
        ("RGB", SRGB[:128] + bytes(len(SRGB) - 128)),
        ("RGB", grey_profile(1.0)),
        ("RGB", cmyk_profile()),
        ("CMYK", SRGB),
        ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
    ],
    ids=["text", "cut short", "no tags", "grey for colour", "inks for colour", "colour for inks", "Lab"],
)
def test_a_useless_profile_is_ignored_and_noted(tmp_path, mode, profile):
    image = Image.new("RGB", (4, 4), "red").convert(mode)
    path = save(tmp_path, image, "image.tif", icc_profile=profile)
    pixels, notes = read_image(path, 4, 3)
    assert pixels[:, 0, 0].tolist() == RED
    assert notes == ("profile",)


@pytest.mark.parametrize("ending", ["gif", "webp", "apng", "tif", "avif"])
def test_animations_and_pages_are_noted(tmp_path, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    kind = {"apng": "PNG"}.get(ending)
    options = {"webp": {"lossless": True}, "avif": {"quality": 100}}.get(ending, {})
    path = save(
        tmp_path, frames[0], f"two.{ending}", format=kind, save_all=True, append_images=frames[1:], **options
    )
    pixels, notes = read_image(path, 16, 3)
    np.testing.assert_allclose(pixels[:, 8, 8], RED, atol=4)  # AVIF's YUV
    assert notes == ("animation",)
    assert read_image(path.read_bytes(), 16, 3)[1] == ("animation",)
    path = save(tmp_path, frames[0], f"one.{ending}", format=kind, **options)
    assert read_image(path, 16, 3)[1] == ()


def test_previews_in_a_photograph_are_no_animation(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = save(tmp_path, frames[0], "photo.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert read_image(path, 16, 3)[1] == ()


def test_damage_behind_the_first_frame_does_not_cost_it(tmp_path):
    frames = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))
        for seed in (0, 1)
    ]
    path = save(tmp_path, frames[0], "two.gif", save_all=True, append_images=frames[1:])
    whole, content = decode(path, 64, 3), path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    np.testing.assert_array_equal(decode(path, 64, 3), whole)

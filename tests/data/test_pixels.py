"""Every kind of image file, against what its pixels must become; exact unless a tolerance is stated."""

import numpy as np
import pytest
from PIL import Image

from flowback.data.pixels import UnreadableImageError, decode, fit

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

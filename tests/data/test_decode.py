"""Decoding of image files."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffusion_lab.data.decode import Decoder, Files

from .helpers import RNG, save


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def plain(h: int, w: int, channels: int = 3, **options) -> Decoder:
    return Decoder((channels, h, w), **options)


def test_pixels_come_out_channels_first_and_untouched():
    pixels = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    out = plain(5, 7, resize="none", center=False)(encoded(Image.fromarray(pixels)), "x")
    assert np.array_equal(out, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_every_mode_is_converted_to_the_configured_channels(mode, channels):
    level = 180
    if mode.startswith("I"):
        image = Image.fromarray(np.full((9, 6), level * 257, np.uint16 if ";" in mode else np.int32))
    else:
        image = Image.new("RGB", (6, 9), (level,) * 3)
        image = image.quantize() if mode == "P" else image.convert(mode)
    format = "TIFF" if mode in ("CMYK", "YCbCr", "I") else "PNG"
    out = plain(8, 8, channels)(encoded(image, format), "x")
    assert out.shape == (channels, 8, 8)
    if mode != "1":  # dithered
        assert np.abs(out.astype(int) - level).max() <= 2


def test_transparency_is_composited_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert plain(4, 4)(encoded(clear), "x").min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert plain(4, 4)(encoded(palette, transparency=0), "x").min() == 255
    assert plain(4, 4)(encoded(palette), "x")[:, 0, 0].tolist() == [10, 20, 30]


def test_sixteen_bits_are_rounded_not_clipped():
    values = np.array([[0, 128, 129, 65535], [257, 1000, 30000, 65000]], np.uint16)
    out = plain(2, 4, 1, resize="none")(encoded(Image.fromarray(values)), "x")
    assert np.array_equal(out[0], np.rint(values / 257))


def test_the_camera_s_orientation_is_applied():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255  # bright on top
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the top becomes the right
    out = plain(6, 4, resize="none")(encoded(Image.fromarray(pixels), exif=exif), "x")
    assert out.shape == (3, 6, 4)
    assert out[:, :, -1].min() == 255
    assert out[:, :, :-1].max() == 0


def test_shorter_keeps_the_aspect_and_crops_the_center():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :], (16, 64))
    out = plain(16, 16, 1)(encoded(Image.fromarray(np.ascontiguousarray(ramp))), "x")
    assert out[0, 0].tolist() == list(range(24, 40))
    exact = plain(16, 16, 1, resize="exact", filter="box")(encoded(Image.fromarray(np.ascontiguousarray(ramp))), "x")
    assert np.abs(exact[0, 0] - (np.arange(16) * 4 + 1.5)).max() <= 0.5


@pytest.mark.parametrize(("h", "w"), [(7, 300), (300, 7), (33, 32), (31, 17), (1, 1)])
def test_any_size_covers_any_target(h, w):
    data = encoded(Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)))
    assert plain(12, 20)(data, "x").shape == (3, 12, 20)


def test_boxes_are_cropped_before_the_resize():
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[57:185, 25:153] = 200
    data = encoded(Image.fromarray(pixels))
    assert plain(64, 64, box=(57, 25, 128, 128))(data, "x").min() == 200
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[39:179, 19:159] = 100
    data = encoded(Image.fromarray(pixels))
    assert plain(64, 64, box=140, resize="exact")(data, "x").min() == 100
    assert plain(64, 64, box=142, resize="exact")(data, "x").min() < 100


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"resize": "none"}, r"a/b.png is 5×6, too small for a crop of 8×8: .*resize=shorter"),
        ({"resize": "none", "center": False}, r"a/b.png is 5×6, but data.image_size=\[8,8\].*resize=exact"),
        ({"box": (0, 0, 6, 6)}, "a/b.png is 5×6, too small for a crop of 6×6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        plain(8, 8, **options)(encoded(Image.new("RGB", (6, 5))), "a/b.png")


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(Image.new("RGB", (64, 64)), "JPEG")[:300]])
def test_broken_files_are_named(data):
    with pytest.raises(ValueError, match=r"a/b.png cannot be read as an image \(.*\): repair or remove it") as caught:
        plain(8, 8)(data, "a/b.png")
    assert "\n" not in str(caught.value)


def test_options_are_checked():
    for options, allowed in (
        ({"filter": "cubic"}, "bicubic"),
        ({"resize": "fit"}, "shorter"),
        ({"box": (1, 2, 3)}, "top"),
    ):
        with pytest.raises(ValueError, match=allowed):
            plain(8, 8, **options)
    with pytest.raises(ValueError, match=r"data\.channels=4"):
        plain(8, 8, 4)


def test_folders_are_searched_in_order_without_hidden_files(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.png", "c/d/e/x.webp", ".cache/y.png", "b/.hidden.png"):
        save(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("")
    assert Files(tmp_path).names == ["a.png", "b/1.jpg", "b/2.PNG", "c/d/e/x.webp"]


def test_archives_read_like_folders(tmp_path):
    for name in ("b/1.png", "a.png"):
        save(tmp_path / "in" / name)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("b/1.png", "a.png"):
            archive.write(tmp_path / "in" / name, name)
        archive.writestr("__MACOSX/._a.png", b"")
    folder, zipped = Files(tmp_path / "in"), Files(tmp_path / "x.zip")
    assert zipped.names == folder.names == ["a.png", "b/1.png"]
    assert [zipped.read(name) for name in zipped.names] == [folder.read(name) for name in folder.names]


def test_empty_folders_name_the_suffixes(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} contains no images: accepted are \.png \.jpg"):
        Files(tmp_path)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"x\.txt is neither a folder nor a \.zip file"):
        Files(tmp_path / "x.txt")

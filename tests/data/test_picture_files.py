"""Pictures as people have them: upright, in sRGB, on white, or named with the reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from mixed_pictures import bomb, damaged, encoded, oddities, scene
from PIL import Image, ImageCms

from lib import picture_files
from lib.picture_files import NoPictureError, PictureError, fit_picture, read_picture


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation):
    upright = scene(1, 20, 30)
    # What a camera stores for each orientation, from the table of the EXIF standard.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    levels, remarks = read_picture(encoded(np.ascontiguousarray(stored), exif=exif))
    assert np.array_equal(levels, upright)
    assert remarks == ([picture_files.TURNED] if orientation > 1 else [])


@pytest.mark.parametrize("level", [0, 100, 255])
@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparent_parts_are_composed_on_white(level, alpha):
    picture = np.full((4, 4, 4), level, np.uint8)
    picture[..., 3] = alpha
    levels, remarks = read_picture(encoded(picture))
    assert np.abs(levels - (level * alpha + 255 * (255 - alpha)) / 255).max() <= 1
    assert remarks == ([picture_files.COMPOSED] if alpha < 255 else [])


def test_a_transparent_colour_of_a_palette_is_white():
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) % 2)
    picture.putpalette([200, 0, 0, 0, 0, 200])
    levels, remarks = read_picture(encoded(picture, transparency=0))
    assert levels[0, 0].tolist() == [255, 255, 255] and levels[0, 1].tolist() == [0, 0, 200]
    assert remarks == [picture_files.COMPOSED]


def test_a_colour_profile_is_applied():
    """A profile that is sRGB with its red and blue primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = profile.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")
    profile = profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    levels, remarks = read_picture(encoded(red, icc_profile=bytes(profile)))
    assert np.abs(levels[0, 0].astype(int) - [0, 0, 255]).max() <= 3
    assert remarks == [picture_files.PROFILE]


def test_16_bits_become_the_upper_8():
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    levels, remarks = read_picture(encoded(deep))
    assert np.array_equal(levels[..., 1], deep >> 8) and remarks == [picture_files.SIXTEEN]


def test_the_first_of_several_frames_is_taken():
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (30, 200)]
    levels, remarks = read_picture(
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    )
    assert (levels == 30).all() and remarks == [picture_files.ANIMATED]


def test_a_profile_that_cannot_be_used_is_left_out_and_said():
    for name in ("strange_profile.png", "broken_profile.png"):
        _, remarks = read_picture(oddities()[name])
        assert remarks == [picture_files.BAD_PROFILE], name


@pytest.mark.parametrize("channels", [1, 3])
def test_every_odd_picture_is_read(channels):
    for name, content in oddities().items():
        levels, _ = read_picture(content, channels)
        assert levels.dtype == np.uint8 and levels.shape[2] == channels, name
        assert levels.std() > 5 or name == "tiny.png", f"{name} shows something"


def test_grey_is_the_luma_of_the_colours():
    picture = scene(2)
    levels, _ = read_picture(encoded(picture), 1)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    assert np.abs(levels[..., 0] - luma).max() <= 1


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path):
    reasons = {
        "zero.jpg": "it is empty",
        "cut_off.jpg": "damaged .*truncated",
        "cut_off.png": "damaged",
        "text.png": "no picture is recognized",
        "bomb.png": "it claims .*pixels",
        "floats.tiff": "floating-point",
    }
    assert reasons.keys() == damaged().keys()
    for name, content in damaged().items():
        (tmp_path / name).write_bytes(content)
        for source in (content, tmp_path / name):
            with pytest.raises(PictureError, match=reasons[name]):
                read_picture(source)
    with pytest.raises(NoPictureError):
        read_picture(b"text")
    with pytest.raises(PictureError, match="it is not a file"):
        read_picture(tmp_path)


def test_a_bomb_is_refused_before_it_takes_memory():
    with pytest.raises(PictureError, match="12000x12000"):
        read_picture(bomb(12_000, 12_000))


def test_bytes_cut_anywhere_never_give_anything_but_a_picture_or_an_error():
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = encoded(scene(3), format)
        for length in range(0, len(whole), max(1, len(whole) // 40)):
            try:
                levels, _ = read_picture(whole[:length])
            except PictureError:
                continue
            assert levels.shape == (40, 56, 3)


def test_no_format_that_starts_programs_is_read():
    buffer = io.BytesIO()
    Image.fromarray(scene(4)).save(buffer, "EPS")
    with pytest.raises(NoPictureError):
        read_picture(buffer.getvalue())


def test_crop_keeps_the_middle_and_the_proportions():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255
    (image,) = fit_picture(picture, 10, 10, "crop")
    assert (image[:, 1:-1] > 250).all() and (image > 230).all(), "the filter sees the neighbours"
    (image,) = fit_picture(picture, 10, 30, "resize")
    assert (image[:, 12:18] > 250).all() and (image[:, :8] < 5).all()


def test_pad_keeps_everything_with_black_around():
    picture = np.full((20, 40, 1), 200, np.uint8)
    (image,) = fit_picture(picture, 16, 16, "pad")
    assert image.shape == (16, 16, 1)
    assert (image[4:12] == 200).all() and (image[:4] == 0).all() and (image[12:] == 0).all()


def test_patches_are_the_pixels_themselves():
    picture = scene(5, 70, 100)
    patches = fit_picture(picture, 32, 24, "patches")
    assert len(patches) == 2 * 4
    assert np.array_equal(patches[5], picture[32:64, 24:48])
    with pytest.raises(PictureError, match="fewer than a patch"):
        fit_picture(picture, 71, 24, "patches")


def test_scaling_down_is_antialiased():
    fine = np.zeros((64, 64, 1), np.uint8)
    fine[:, ::2] = 255
    for fit in ("crop", "resize", "pad"):
        (image,) = fit_picture(fine, 16, 16, fit)
        assert np.abs(image.astype(int) - 127.5).max() < 20, (
            "stripes become grey, not other stripes"
        )


def test_a_picture_of_the_images_size_is_not_touched():
    picture = scene(6, 32, 32)
    for fit in ("crop", "resize", "pad", "patches"):
        assert np.array_equal(fit_picture(picture, 32, 32, fit)[0], picture)

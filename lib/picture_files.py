"""Reads picture files as people have them: any format, orientation, colour space and depth, with
what was done to them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

FITS = ("crop", "resize", "pad", "patches")
MOST_PIXELS = 2**27  # of one picture: 400 MB of colours
MOST_BYTES = 2**30  # of one file
# Neither formats that start other programs (EPS), nor those that any bytes may seem to be (TGA).
FORMATS = (
    *("PNG", "JPEG", "MPO", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "PPM", "ICO", "ICNS"),
    *("JPEG2000", "PCX", "QOI", "SGI", "DDS", "XBM", "XPM", "PSD", "SPIDER", "IM", "MSP", "SUN"),
)
ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
ANIMATED = "several frames: the first is taken"
COMPOSED = "transparent parts: composed on white"
TURNED = "turned upright as its EXIF says"
PROFILE = "colour profile: converted to sRGB"
BAD_PROFILE = "unreadable colour profile: left out"
SIXTEEN = "16 bits a channel: the upper 8 are taken"
CMYK = "printing colours (CMYK): converted"


class PictureError(ValueError):
    """A file that cannot be read as a picture; the message says why in some words."""


class NoPictureError(PictureError):
    """A file in which nothing is recognized."""


def read_picture(source: str | Path | bytes, channels: int = 3) -> tuple[np.ndarray, list[str]]:
    """One picture, upright, in sRGB or its luma, composed on white.

    Arguments:
        source: The path of a file, or a file's content.
        channels: 3, or 1 for a grey picture.

    Returns:
        The levels, uint8 [H, W, channels], and what was done beside plain decoding, some words for
        each kind (constants of this module).

    Raises:
        NoPictureError: if no format is recognized.
        PictureError: if it is empty, damaged, cut off, too large, or of a kind that has no 8-bit
            colours.
    """
    content = source if isinstance(source, bytes) else _content(Path(source))
    if not content:
        raise PictureError("it is empty")
    remarks: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and of sizes that are checked here
            with _opened(content) as picture:
                return _levels(picture, channels, remarks), remarks
    except PictureError:
        raise
    except MemoryError:
        raise PictureError("it does not fit into memory") from None
    except Exception as error:  # damaged bytes make decoders fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PictureError(f"damaged ({reason})") from None


def fit_picture(pixels: np.ndarray, height: int, width: int, fit: str) -> list[np.ndarray]:
    """Images [height, width, C] of a picture [H, W, C], antialiased (Lanczos).

    Arguments:
        fit: "crop" scales until both sides are covered and cuts off the rest at both ends; "resize"
            changes the proportions; "pad" scales until the picture is inside, with black around
            it; "patches" cuts the unscaled picture into as many images as there is room for.

    Raises:
        PictureError: if it is smaller than one patch.
    """
    if fit == "patches":
        rows, columns = pixels.shape[0] // height, pixels.shape[1] // width
        if not rows * columns:
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise PictureError(f"{size} pixels are fewer than a patch of {width}x{height}")
        cut = pixels[: rows * height, : columns * width]
        patches = cut.reshape(rows, height, columns, width, -1).swapaxes(1, 2)
        return list(patches.reshape(rows * columns, height, width, -1))
    if pixels.shape[:2] == (height, width):
        return [pixels]
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    how = {"crop": ImageOps.fit, "pad": ImageOps.pad}.get(fit)
    if how:
        fitted = how(picture, (width, height), Image.Resampling.LANCZOS)
    else:
        fitted = picture.resize((width, height), Image.Resampling.LANCZOS)
    return [np.asarray(fitted).reshape(height, width, -1)]


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise PictureError("it is not a file")
        if path.stat().st_size > MOST_BYTES:
            raise PictureError(f"it has more than {MOST_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise PictureError(error.strerror or str(error)) from None


def _opened(content: bytes) -> Image.Image:
    Image.init()
    try:
        picture = Image.open(io.BytesIO(content), formats=[f for f in FORMATS if f in Image.OPEN])
    except Image.UnidentifiedImageError:
        raise NoPictureError("no picture is recognized in it") from None
    except Image.DecompressionBombError:
        raise PictureError(f"it claims more than {MOST_PIXELS} pixels") from None
    if picture.width * picture.height > MOST_PIXELS:
        size = f"{picture.width}x{picture.height}"
        raise PictureError(f"it claims {size} pixels, more than {MOST_PIXELS}")
    return picture


def _levels(picture: Image.Image, channels: int, remarks: list[str]) -> np.ndarray:
    if getattr(picture, "n_frames", 1) > 1:
        picture.seek(0)
        if picture.format != "MPO":  # a photograph beside its previews
            remarks.append(ANIMATED)
    profile = picture.info.get("icc_profile")
    picture.load()
    picture = _upright(picture, remarks)
    if picture.mode.startswith("I;16") or picture.mode == "I" and picture.format == "PNG":
        remarks.append(SIXTEEN)
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        kind = "floating-point" if picture.mode == "F" else "32-bit"
        raise PictureError(f"it has {kind} pixels; save it with 8 bits a channel")
    alpha = None
    if picture.mode in ALPHA or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB")
    if picture.mode in ("P", "1"):
        picture = picture.convert("RGB" if picture.mode == "P" else "L")
    if picture.mode == "CMYK":
        remarks.append(CMYK)
    if profile:
        picture = _in_srgb(picture, profile, remarks)
    if picture.mode != "L":
        picture = picture.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] < 255:
        remarks.append(COMPOSED)
        picture = Image.composite(picture, Image.new(picture.mode, picture.size, "white"), alpha)
    levels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return levels.reshape(picture.height, picture.width, channels)


def _upright(picture: Image.Image, remarks: list[str]) -> Image.Image:
    try:
        orientation = picture.getexif().get(0x0112, 1)
        turned = ImageOps.exif_transpose(picture) if orientation in range(2, 9) else picture
    except Exception:  # damaged metadata of a whole picture
        return picture
    if turned is not picture:
        remarks.append(TURNED)
        turned.format = picture.format
    return turned


def _in_srgb(picture: Image.Image, profile: bytes, remarks: list[str]) -> Image.Image:
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(given).lower():
            return picture
        converted = ImageCms.profileToProfile(
            picture, given, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        remarks.append(BAD_PROFILE)
        return picture
    remarks.append(PROFILE)
    return converted

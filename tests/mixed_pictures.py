"""A folder as people have them: pictures of many formats, sizes and colour spaces, some damaged,
some no pictures at all."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms


def scene(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """A smooth picture [H, W, 3], each seed another one."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of a few dozen bytes that claims to be enormous."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header),
        chunk(b"IDAT", zlib.compress(b"\0" * 100)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def oddities() -> dict[str, bytes]:
    """Whole pictures of every odd kind, each with another scene."""
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    clear = np.dstack([scene(901), np.full((40, 56), 128, np.uint8)])
    frames = [Image.fromarray(scene(seed)) for seed in (902, 903)]
    deep = (scene(904)[..., 0].astype(np.uint16) << 8) + 77
    return {
        "turned.jpg": encoded(scene(905), "JPEG", exif=turned),
        "strange_profile.png": encoded(scene(906), icc_profile=wide.tobytes()),
        "broken_profile.png": encoded(scene(907), icc_profile=b"no profile"),
        "16_bits.png": encoded(deep),
        "palette.png": encoded(Image.fromarray(scene(908)).quantize(16)),
        "cmyk.jpg": encoded(Image.fromarray(scene(909)).convert("CMYK"), "JPEG"),
        "clear.png": encoded(clear),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "progressive.jpg": encoded(scene(910), "JPEG", progressive=True, quality=90),
        "grey.png": encoded(Image.fromarray(scene(911)).convert("L")),
        "one_bit.png": encoded(Image.fromarray(scene(912)).convert("1")),
        "really_a_png.jpg": encoded(scene(913)),
        "without_suffix": encoded(scene(914)),
        "name with spaces, ünïcode & 'quotes'.png": encoded(scene(915)),
        "line\nbreak.png": encoded(scene(916)),
        os.fsdecode(b"no_utf8_\xff\xfe.png"): encoded(scene(917)),
        "-dash.png": encoded(scene(918)),
        "tiny.png": encoded(scene(919, 3, 2)),
        "large.webp": encoded(scene(920, 300, 900), "WEBP"),
        "SHOUTED.PNG": encoded(scene(921)),
        "old.bmp": encoded(scene(922), "BMP"),
        "lossless.tiff": encoded(scene(923), "TIFF"),
    }


def damaged() -> dict[str, bytes]:
    """What is called a picture and is none."""
    jpeg, png = encoded(scene(930), "JPEG", quality=95), encoded(scene(931))
    return {
        "zero.jpg": b"",
        "cut_off.jpg": jpeg[: len(jpeg) // 2],
        "cut_off.png": png[: len(png) // 2],
        "text.png": b"I am no picture",
        "bomb.png": bomb(),
        "floats.tiff": encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
    }


def others() -> dict[str, bytes]:
    """What nobody takes for a picture."""
    return {"notes.txt": b"of the journey", "labels.json": b"{}", "empty": b"", ".DS_Store": b"1"}


def write_mixed_folder(folder: Path, plain: int = 300) -> dict[str, int]:
    """Writes `plain` ordinary pictures of several formats and sizes in subfolders, ten of them
    twice, and all oddities; returns how many of each kind there are."""
    rng = np.random.default_rng(0)
    files = {}
    formats = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "bmp"))
    for number in range(plain):
        format, suffix = formats[number % 4]
        height, width = rng.integers(33, 90, 2)
        name = f"album {number % 3}/{number}.{suffix}"
        files[name] = encoded(scene(number, int(height), int(width)), format)
    copies = {
        f"copies/{number}": files[f"album {number % 3}/{number}.png"] for number in range(0, 40, 4)
    }
    odd, broken, rest = oddities(), damaged(), others()
    for part in (files, copies, odd, broken, rest):
        for name, content in part.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return {
        "pictures": len(files) + len(copies) + len(odd),
        "duplicates": len(copies),
        "damaged": len(broken),
        "no_pictures": len(rest) - 1,  # hidden files are not looked at
    }

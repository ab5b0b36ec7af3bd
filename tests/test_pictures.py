"""Pictures: cells are in their places, what is written comes back, what is unreadable is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.pictures import load_image, save_grid, save_image, save_rates, save_table


def flat(*colour: int, count: int = 1) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(count, 3, 16, 16)


def pixels(path, *colour: int) -> torch.Tensor:
    """Where a picture has a colour: [H, W]."""
    picture = Image.open(path)
    values = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return (
        values.view(picture.height, picture.width, 3) == torch.tensor(colour, dtype=torch.uint8)
    ).all(2)


def test_a_table_shows_every_cell_enlarged_in_its_place(tmp_path):
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    rows = [[flat(*red), flat(*green, count=4)], [flat(*blue), flat(*green, count=4)]]
    path = save_table(
        rows, tmp_path / "new/table.png", row_labels=["a", "b"], column_labels=["c", "d"], columns=2
    )
    areas = [pixels(path, *colour) for colour in (red, green, blue)]
    assert [area.sum().item() for area in areas] == [64 * 64, 8 * 64 * 64, 64 * 64], (
        "16 pixels become 64"
    )
    centres = [torch.nonzero(area).double().mean(0) for area in areas]
    assert centres[0][0] < centres[2][0] and abs(centres[0][1] - centres[2][1]) < 1, (
        "red above blue"
    )
    assert centres[0][1] < centres[1][1], "left of green"
    labels = ~pixels(path, 255, 255, 255) & ~torch.stack(areas).any(0)
    plain = save_table(rows, tmp_path / "plain.png", columns=2)
    unlabelled = ~pixels(plain, 255, 255, 255)
    assert labels.sum() > 20 and unlabelled.sum() == sum(area.sum() for area in areas)
    assert not labels[:, torch.nonzero(areas[0])[:, 1].min() :][
        : torch.nonzero(areas[2])[:, 0].max()
    ].any()


def test_pictures_come_back_as_they_were_written(tmp_path):
    image = torch.randint(
        0, 256, (3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(load_image(save_image(image, tmp_path / "image.png"), (3, 4, 6)), image)
    assert load_image(tmp_path / "image.png", (3, 8, 8), "pad")[:, 0].sum() == 0
    assert load_image(tmp_path / "image.png", (3, 8, 8)).shape == (3, 8, 8)
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "absent.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a picture"):
            load_image(tmp_path / name, (3, 4, 6))


def test_the_plot_of_rates_has_a_bar_for_each_layer(tmp_path):
    path = save_rates(
        [0.5, 0.25, 0.1, 0.0], tmp_path / "rates.png", [(4, 4), (4, 4), (8, 8), (8, 8)]
    )
    blue, orange = pixels(path, 31, 119, 180), pixels(path, 255, 127, 14)
    first, second = (blue[:, columns].sum() for columns in halves(blue))
    assert first > second > 0 and orange.sum() > 0
    again = save_rates(
        [0.5, 0.25, 0.1, 0.0], tmp_path / "again.png", [(4, 4), (4, 4), (8, 8), (8, 8)]
    )
    assert path.read_bytes() == again.read_bytes()
    assert save_rates([0.0], tmp_path / "nothing.png", [(1, 1)]).is_file()
    assert save_rates([0.5, 0.25], tmp_path / "dimensions.png").is_file()


def halves(area: torch.Tensor) -> tuple[slice, slice]:
    """The columns of the two blue bars, which touch at neither side; the legend lies above the
    bars' feet."""
    foot = area[int(torch.nonzero(area)[:, 0].max()) - 2]
    columns = torch.nonzero(foot).flatten()
    gap = int((columns[1:] - columns[:-1]).argmax())
    return slice(int(columns[0]), int(columns[gap]) + 1), slice(
        int(columns[gap + 1]), int(columns[-1]) + 1
    )


def test_a_picture_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = save_image(flat(1, 2, 3)[0], tmp_path / "image.png")
    before = path.read_bytes()

    def fails(picture, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="the disk is full"):
        save_image(flat(3, 2, 1)[0], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_grids_of_small_images_are_enlarged(tmp_path):
    path = save_grid(flat(9, 8, 7, count=6), tmp_path / "grid.png", columns=3)
    assert pixels(path, 9, 8, 7).sum() == 6 * 64 * 64
    assert Image.open(path).size == (4 * (3 * 17 + 1), 4 * (2 * 17 + 1))


def test_grey_of_16_bits_keeps_its_upper_8(tmp_path):
    grey = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2570 + 5
    Image.fromarray(grey).save(tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as picture:
        assert picture.mode.startswith("I")
    image = load_image(tmp_path / "grey.png", (3, 4, 6))
    assert torch.equal(image, torch.from_numpy((grey // 256).astype(np.uint8)).expand(3, 4, 6))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (np.float32, "it has floating-point pixels; save it with 8 bits a channel"),
        (np.int32, "it has 32-bit pixels; save it with 8 bits a channel"),
    ],
)
def test_pixels_that_have_no_8_bits_are_refused(kind, message, tmp_path):
    Image.fromarray(np.full((4, 6), 3, kind)).save(tmp_path / "deep.tiff")
    with pytest.raises(ValueError, match=f"deep.tiff cannot be read as a picture: {message}"):
        load_image(tmp_path / "deep.tiff", (3, 4, 6))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png cannot be read as a picture: it is not a file"):
        load_image(tmp_path / "pipe.png", (3, 4, 6))


def test_grey_images_are_grey_pictures(tmp_path):
    image = torch.arange(0, 240, 10, dtype=torch.uint8).view(1, 4, 6)
    assert Image.open(save_image(image, tmp_path / "image.png")).mode == "L"
    assert torch.equal(load_image(tmp_path / "image.png", (1, 4, 6)), image)
    assert torch.equal(load_image(tmp_path / "image.png", (3, 4, 6)), image.expand(3, -1, -1))
    grid = save_grid(image.expand(4, -1, -1, -1), tmp_path / "grid.png", columns=2)
    levels = np.asarray(Image.open(grid))
    assert (levels == levels[..., :1]).all() and np.isin(image.numpy(), levels).all()

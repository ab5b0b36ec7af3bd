"""Samples, interpolations, neighbourhoods and their pictures: what must be equal is, and what must
differ does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import SMALL_SDN
from PIL import Image

from lib.DensityVAE import DensityVAE
from lib.evaluation import pictures
from lib.pictures import load_image, save_grid, save_image, save_rates, save_table
from lib.synthesis import encode, interpolate, neighborhood, reconstruct, sample_images

DEPTH = SMALL_SDN["depth"]


@pytest.fixture(scope="module")
def model() -> DensityVAE:
    """A small model whose prior depends on the layers above, so that what is drawn shows."""
    torch.manual_seed(0)
    model = DensityVAE((8, 12), **SMALL_SDN).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        model.h.normal_()
    return model


@pytest.fixture(scope="module")
def images(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, *model.image_shape), dtype=torch.uint8, generator=generator)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to one level, which another batch size may round differently."""
    return a.shape == b.shape and (a.int() - b.int()).abs().max() <= 1


@pytest.mark.parametrize("output", ["most_probable", "sample"])
def test_samples_are_reproducible_and_do_not_depend_on_the_batch_size(model, output):
    draw = dict(temperature=0.9, seed=3, output=output)
    samples = sample_images(model, 6, batch=6, **draw)
    assert samples.dtype == torch.uint8 and samples.shape == (6, 3, 8, 12)
    assert torch.equal(samples, sample_images(model, 6, batch=6, **draw))
    assert close(samples, sample_images(model, 6, batch=4, **draw))
    assert close(samples[:2], sample_images(model, 2, batch=1, **draw)), (
        "fewer samples are the first ones"
    )
    assert not close(samples, sample_images(model, 6, batch=6, **draw | dict(seed=4)))
    assert not close(samples, sample_images(model, 6, batch=6, **draw | dict(temperature=0.2)))


def test_reconstructions_are_decoded_encodings_and_depend_on_the_index(model, images):
    latents = encode(model, images, [5, 9], seed=2, batch=1)
    assert [tuple(z.shape) for z in latents] == [(2, *shape) for shape in model.latent_shapes]
    observation = model.observation
    with torch.no_grad():
        decoded = observation.to_uint8(observation.most_probable(model.decode(latents)))
    assert close(decoded, reconstruct(model, images, seed=2, batch=2, indices=[5, 9]))
    assert not close(decoded, reconstruct(model, images, seed=2, batch=2))
    assert close(
        reconstruct(model, images, seed=2, batch=1), reconstruct(model, images, seed=2, batch=2)
    )


def test_an_interpolation_of_all_layers_leads_from_one_reconstruction_to_the_other(model, images):
    latents = encode(model, images, [0, 1], seed=2, batch=2)
    ends = [[z[i : i + 1] for z in latents] for i in (0, 1)]
    every = dict(layers=DEPTH, temperature=1.0, frames=5, seed=2)
    frames = interpolate(model, *ends, batch=5, **every)
    reconstructions = reconstruct(model, images, seed=2, batch=2)
    assert close(frames[[0, -1]], reconstructions) and not close(frames[:1], frames[-1:])
    with torch.no_grad():
        middle = model.decode([(a + b) / 2 for a, b in zip(*ends, strict=True)])
        middle = model.observation.to_uint8(model.observation.most_probable(middle))
    assert close(frames[2:3], middle)
    assert close(frames, interpolate(model, *ends, batch=2, **every))


def test_an_interpolation_of_some_layers_changes_with_these_alone(model, images):
    latents = encode(model, images, [0, 1], seed=2, batch=2)
    ends = [[z[i : i + 1] for z in latents] for i in (0, 1)]
    some = dict(layers=1, frames=3, batch=3)
    still = interpolate(model, ends[0], ends[0], temperature=1.0, seed=2, **some)
    assert close(still[:1], still[1:2]) and close(still[:1], still[2:]), (
        "the layers below have the same noise"
    )
    moving = interpolate(model, *ends, temperature=1.0, seed=2, **some)
    assert close(moving[0], still[0]) and not close(moving[0], moving[2])
    changed = [ends[1][0], *ends[0][1:]]
    assert close(moving, interpolate(model, ends[0], changed, temperature=1.0, seed=2, **some)), (
        "lower ones unused"
    )
    assert not close(moving, interpolate(model, *ends, temperature=1.0, seed=3, **some))
    at_zero = [interpolate(model, *ends, temperature=0.0, seed=seed, **some) for seed in (2, 3)]
    assert torch.equal(*at_zero)


def test_a_neighborhood_keeps_the_top_layers_and_draws_the_others(model, images):
    latents = encode(model, images[:1], [7], seed=2, batch=1)
    around = dict(index=7, layers=1, temperature=1.0, count=8, seed=2)
    drawn = neighborhood(model, latents, batch=8, **around)
    assert close(drawn, neighborhood(model, latents, batch=3, **around))
    assert not any(close(drawn[i], drawn[j]) for i in range(8) for j in range(i))
    assert close(drawn[:4], neighborhood(model, latents, batch=8, **around | dict(count=4)))
    for change in (dict(index=8), dict(seed=3)):
        assert not close(drawn, neighborhood(model, latents, batch=8, **around | change))
    everything = neighborhood(model, latents, batch=8, **around | dict(layers=DEPTH))
    centre = reconstruct(model, images[:1], seed=2, batch=1, indices=[7])
    assert close(everything, centre.expand(8, -1, -1, -1))
    cold = neighborhood(model, latents, batch=8, **around | dict(temperature=0.0))
    assert close(cold, cold[:1].expand(8, -1, -1, -1))


@pytest.mark.parametrize("layers", [0, DEPTH + 1])
def test_layers_that_a_model_lacks_are_refused(model, images, layers):
    latents = encode(model, images[:1], [0], seed=0, batch=1)
    common = dict(layers=layers, temperature=1.0, seed=0, batch=1)
    with pytest.raises(ValueError, match=f"layers must be 1 ... {DEPTH}"):
        interpolate(model, latents, latents, frames=2, **common)
    with pytest.raises(ValueError, match=f"layers must be 1 ... {DEPTH}"):
        neighborhood(model, latents, index=0, count=1, **common)
    with pytest.raises(ValueError, match="frames must be at least 2"):
        interpolate(model, latents, latents, frames=1, **common | dict(layers=1))


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
    with pytest.raises(ValueError, match="image.png has 6x4 pixels; the model's images have 8x8"):
        load_image(tmp_path / "image.png", (3, 8, 8))
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


def test_nearest_training_images_of_copies_are_found(model, tmp_path):
    """Samples that are training images, one of them flipped, are caught; in 5 bits as well."""
    generator = torch.Generator().manual_seed(5)
    training = torch.randint(
        0, 256, (20, *model.image_shape), dtype=torch.uint8, generator=generator
    )
    queries = {"first": training[[3, 4]], "second": training[[11]].flip(-1)}
    batches = [(training[:13], torch.arange(13)), (training[13:], torch.arange(13, 20))]
    seen = []
    common = dict(neighbours=2, mirror=True, progress=seen.append)
    result = pictures.overfitting(model, queries, batches, tmp_path, **common)
    nearest = [of_query[0] for of_query in result["neighbours"]]
    assert [(n["index"], n["mse"], n["mirrored"]) for n in nearest] == [
        (3, 0, False),
        (4, 0, False),
        (11, 0, True),
    ]
    assert all(of_query[1]["mse"] > 0 for of_query in result["neighbours"])
    assert result["searched"] == 20 and sum(seen) == 20 and result["nearest_mse"] == 0
    assert [picture["file"] for picture in result["pictures"]] == [
        "nearest_first.png",
        "nearest_second.png",
    ]
    assert all((tmp_path / picture["file"]).is_file() for picture in result["pictures"])

    five_bits = DensityVAE((8, 12), **SMALL_SDN | dict(nbits=5))
    shown = five_bits.observation.to_uint8(five_bits.observation.encode(training[[3]]))
    assert not torch.equal(shown, training[[3]])
    result = pictures.overfitting(five_bits, {"q": shown}, batches, tmp_path, **common)
    assert result["neighbours"][0][0] == {"index": 3, "mse": 0, "mirrored": False}


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

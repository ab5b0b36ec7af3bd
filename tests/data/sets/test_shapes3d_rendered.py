"""Our own 3D-Shapes: the ray casting against independent computations, the pictures, and the file
that is written."""

import colorsys
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data import scenes
from data.convert.shapes3d import main as shapes3d_main
from data.errors import DataError
from data.scenes import SCENES, all_labels, validation_scenes
from data.sets import shapes3d_rendered
from data.sets.shapes3d import Shapes3D
from data.sets.shapes3d_rendered import GEOMETRIES, LEVELS, Shapes3DRendered, geometry_weights
from data.shapes3d_raycast import SHAPES, SUBSAMPLES, Room, camera, floor_light, interval, normals

FLOOR, WALL, OBJECT, WHITE = range(4)


def render(arguments):
    shapes3d_main(["render", *arguments])


@pytest.fixture(scope="module")
def dataset():
    return Shapes3DRendered()


@pytest.fixture(scope="module")
def weights():
    """[8 scales, 4 shapes, 15 orientations, 4 materials, 64, 64] in [0, 1]."""
    return geometry_weights().reshape(8, 4, 15, 4, 64, 64) / (LEVELS - 1)


def inside(shape, points):
    """Whether points [..., 3] are in a shape of scale 1, by its definition."""
    x, y, z = np.moveaxis(points, -1, 0)
    if shape == "cube":
        return (abs(x) < 0.5) & (abs(y) < 0.5) & (z > 0) & (z < 1)
    if shape == "cylinder":
        return (x**2 + y**2 < 0.25) & (z > 0) & (z < 1)
    if shape == "sphere":
        return x**2 + y**2 + (z - 0.58) ** 2 < 0.58**2
    return x**2 + y**2 + (z - z.clip(0.37, 1.25 - 0.37)) ** 2 < 0.37**2


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_enter_and_leave_where_a_search_says(shape):
    rng = np.random.default_rng(0)
    origin = rng.normal(size=(1000, 3))
    origin *= 3 / np.sqrt((origin**2).sum(1, keepdims=True))
    direction = rng.uniform([-0.8, -0.8, -0.1], [0.8, 0.8, 1.3], (1000, 3)) - origin
    steps = np.arange(0, 2, 0.0005)
    found = np.stack(
        [inside(shape, o + steps[:, None] * d) for o, d in zip(origin, direction, strict=True)]
    )
    enter, leave = interval(shape, origin.T, direction.T)
    hit, sought = enter < leave, found.any(1)
    assert sought.sum() > 300 and (~sought).sum() > 100
    assert not (sought & ~hit).any() and (hit & ~sought).sum() <= 5, (
        "a search misses what is shorter than its step"
    )
    first, last = steps[found.argmax(1)], steps[len(steps) - 1 - found[:, ::-1].argmax(1)]
    np.testing.assert_allclose(enter[sought], first[sought], atol=0.0006)
    np.testing.assert_allclose(leave[sought], last[sought], atol=0.0006)


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_point_outwards(shape):
    rng = np.random.default_rng(1)
    target = rng.uniform([-0.3, -0.3, 0.1], [0.3, 0.3, 0.9], (2000, 3)).T
    direction = rng.normal(size=(3, 2000))
    enter, leave = interval(shape, target - 5 * direction, direction)
    hit = enter < leave
    assert hit.sum() > 1000
    points, direction = (target + (enter - 5) * direction)[:, hit], direction[:, hit]
    normal = normals(shape, points)
    np.testing.assert_allclose((normal**2).sum(0), 1, atol=1e-6)
    assert (
        inside(shape, (points - 1e-3 * normal).T).all()
        and not inside(shape, (points + 1e-3 * normal).T).any()
    )
    assert ((direction * normal).sum(0) < 0.3 * np.sqrt((direction**2).sum(0))).all(), (
        "what is seen faces the eye"
    )


def test_shadows_lie_where_the_lamp_does_not_reach():
    for shape in SHAPES:
        lamp, sky = floor_light(shape)
        assert min(lamp.min(), sky.min()) >= 0 and max(lamp.max(), sky.max()) == 1
        for light in (lamp, sky):
            border = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
            assert (border == 1).all(), "no step where the map ends"
            assert light[78:82, 78:82].max() < 0.1, "under the object"
        # The lamp is at positive x and y: the shadow lies at negative ones.
        shadow = np.argwhere(lamp < 0.5) - 79.5
        assert shadow[:, 1].mean() < -8 and shadow.mean() < 0
        np.testing.assert_allclose(sky, sky[::-1, ::-1], atol=0.12)


def test_the_object_casts_a_shadow(weights):
    """Against the empty room: nowhere brighter, much the same far away, half as bright where the
    lamp is hidden."""
    for shape, k, orientation in [(0, 0, -30), (1, 7, 0), (2, 14, 30), (3, 7, 0)]:
        empty = Room(*camera(orientation)).empty_pixels
        kinds = weights[6, shape, k]
        only_floor = (kinds[OBJECT] == 0) & (kinds[WALL] == 0)
        share = kinds[FLOOR][only_floor] / empty[FLOOR][only_floor]
        assert share.max() < 1.001 and (share < 0.6).sum() > 8 and (share > 0.98).mean() > 0.3
        np.testing.assert_allclose(kinds[:, 63], empty[:, 63], atol=0.02)


def test_coverage_of_pixels_against_a_march(weights):
    """The object's silhouette in some geometries: pixels that no, all, or some of the subsamples'
    rays hit."""
    for scale, shape, orientation in [(0, 0, 0), (7, 1, 7), (4, 2, 11), (6, 3, 14), (7, 0, 10)]:
        eye, direction = camera(-30 + orientation * 60 / 14)
        rays = (
            direction[:, SUBSAMPLES // 2 :: SUBSAMPLES, SUBSAMPLES // 2 :: SUBSAMPLES]
            .reshape(3, -1)
            .T
        )
        size = 0.75 + scale * 0.5 / 7
        lengths = np.arange(3.0, 7, 0.02)
        hit = np.array(
            [inside(SHAPES[shape], (eye + lengths[:, None] * ray) / size).any() for ray in rays]
        )
        hit = hit.reshape(64, 64)
        kinds = weights[scale, shape, orientation]
        covered, background = kinds[OBJECT] > 0, kinds[FLOOR] + kinds[WALL] > 0
        assert covered[hit].mean() > 0.99 and (covered & background)[hit != covered].mean() > 0.95
        assert not hit[~covered].any()
        edge = covered & background
        assert 30 < edge.sum() < 150, "edges are anti-aliased: a seam one to two pixels wide"


def test_pixels_are_mixtures_of_the_materials(weights):
    total = weights.sum(3)
    assert weights.min() >= 0 and total.max() <= 1 + 2 / LEVELS
    assert total.min() > 0.01 and total.mean() > 0.5, "nothing is left black"
    assert (weights[:, :, :, WALL, 0] > 0.2).all() and (weights[:, :, :, FLOOR, 63] > 0.2).all()
    assert ((weights[:, :, :, WHITE] > 0) <= (weights[:, :, :, OBJECT] > 0)).all()


def test_objects_grow_with_their_scale_and_stand_in_the_middle(weights):
    area = (weights[:, :, :, OBJECT] > 0).sum((-2, -1))
    assert (np.diff(area, axis=0) > 0).all() and area.min() > 60 and area.max() < 1400
    mass = weights[:, :, :, OBJECT]
    columns = (mass.sum(-2) * np.arange(64)).sum(-1) / mass.sum((-2, -1))
    rows = (mass.sum(-1) * np.arange(64)).sum(-1) / mass.sum((-2, -1))
    assert abs(columns - 31.5).max() < 4 and rows.min() > 24 and rows.max() < 42


def test_the_corner_moves_with_the_orientation():
    """The wall is darkest where the two meet: to the left at -30 degrees, in the middle at 0."""
    corners = []
    for orientation in (-30, -15, 0, 15, 30):
        room = Room(*camera(orientation))
        wall = room.empty_pixels[WALL]
        assert (wall[0] > 0.2).all() and (wall[45:] == 0).all(), "the wall is above the floor"
        corners.append(wall[10].argmin())
    assert (np.diff(corners) > 5).all() and abs(corners[2] - 31.5) <= 1


def test_items_are_the_products_of_colours_and_weights(dataset, weights):
    rng = np.random.default_rng(2)
    for _ in range(50):
        factors = [int(rng.integers(size)) for size in dataset.factor_sizes]
        colours = [
            np.rint(255 * np.array(colorsys.hsv_to_rgb(hue / 10, 0.9, 1))) for hue in factors[:3]
        ]
        light = weights[tuple(factors[3:])].astype(float)
        expected = sum(
            light[i] * colour[:, None, None] for i, colour in enumerate([*colours, np.full(3, 255)])
        )
        (scene,) = dataset.index_of(torch.tensor([factors])).tolist()
        item = dataset[scene]
        assert item.dtype == torch.uint8 and item.shape == (3, 64, 64)
        assert np.abs(item.numpy() - expected).max() < 1.1


def test_hues_of_the_materials(dataset):
    """The hue of a pixel that shows one material is the factor's."""
    for hues in [(0, 3, 6), (9, 5, 1), (2, 2, 2), (7, 8, 4)]:
        image = dataset.images(torch.tensor([[*hues, 5, 0, 7]]))[0].numpy() / 255
        for hue, (row, column) in zip(hues, [(60, 32), (3, 20), (40, 30)], strict=True):
            found, saturation, _ = colorsys.rgb_to_hsv(*image[:, row, column])
            assert abs((found - hue / 10 + 0.5) % 1 - 0.5) < 0.01 and saturation > 0.6


def test_a_hue_changes_its_material_only(dataset, weights):
    kinds = weights[3, 1, 4]
    base = torch.tensor([[1, 4, 7, 3, 1, 4]])
    before = dataset.images(base)[0]
    for material in (FLOOR, WALL, OBJECT):
        changed = base.clone()
        changed[0, material] = 9
        differs = (dataset.images(changed)[0] != before).any(0).numpy()
        assert differs.sum() > 200 and (kinds[material][differs] > 0).all()


def test_all_pictures_differ(dataset):
    geometries = dataset._images(torch.arange(GEOMETRIES)).flatten(1)
    assert len(geometries.unique(dim=0)) == GEOMETRIES
    hues = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 4, 3), (9, 9, 9)]
    seen = set()
    for floor, wall, thing in hues:
        start = (floor * 100 + wall * 10 + thing) * GEOMETRIES
        seen |= {
            image.numpy().tobytes()
            for image in dataset._images(torch.arange(start, start + GEOMETRIES))
        }
    assert len(seen) == len(hues) * GEOMETRIES
    drawn = torch.randperm(SCENES, generator=torch.Generator().manual_seed(0))[:5000]
    assert len({hash(image.numpy().tobytes()) for image in dataset._images(drawn)}) == 5000
    # Neighbours differ visibly, not by a rounding.
    grid = geometries.view(8, 4, 15, -1).int()
    for axis in range(3):
        assert (grid.diff(dim=axis).abs() > 8).sum(-1).min() > 40


def test_batches_equal_items_and_do_not_depend_on_the_rest(dataset):
    scenes = torch.randint(SCENES, (300,), generator=torch.Generator().manual_seed(3))
    images = dataset.images(dataset.factors(scenes))
    assert images.dtype == torch.uint8 and images.shape == (300, 3, 64, 64)
    assert torch.equal(images, torch.stack([dataset[scene] for scene in scenes.tolist()]))
    assert dataset.images(torch.empty(0, 6, dtype=torch.int64)).shape == (0, 3, 64, 64)
    dataset[17].zero_()
    assert dataset[17].any()


def test_validation(dataset):
    validation, listed = Shapes3DRendered("validation"), validation_scenes().tolist()
    assert len(dataset) == SCENES and len(validation) == len(listed)
    assert torch.equal(validation[11], dataset[listed[11]])
    with pytest.raises(IndexError):
        validation[10_000]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers(method, dataset):
    subset = torch.utils.data.Subset(dataset, range(0, SCENES, 4001))
    loader = DataLoader(subset, batch_size=32, num_workers=2, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), torch.stack(list(subset)))


def test_pickling(dataset):
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[123_456], dataset[123_456])


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


@pytest.mark.parametrize("compression", [[], ["--compression", "gzip"], ["--compression", "lzf"]])
def test_the_file_is_read_back_identically(
    compression, dataset, h5py, tmp_path, monkeypatch, capsys
):
    path, labels = tmp_path / "new/rendered.h5", all_labels()
    render([str(path), "--first", "1000", *compression])
    assert f"{path}: 1000 images, {path.stat().st_size} bytes" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with h5py.File(path) as file:
        assert sorted(file) == ["images", "labels"]
        assert file["images"].shape == (1000, 64, 64, 3) and file["images"].dtype == np.uint8
        assert file["labels"].dtype == np.float64 and np.array_equal(file["labels"], labels[:1000])
    monkeypatch.setattr(scenes, "SCENES", 1000)
    monkeypatch.setattr(scenes, "all_labels", lambda: labels[:1000])
    stored = Shapes3D(path)
    assert all(torch.equal(stored[scene], dataset[scene]) for scene in range(1000))


def test_a_part_is_no_data_set(h5py, tmp_path):
    render([str(tmp_path / "x.h5"), "--first", "10"])
    with pytest.raises(
        DataError, match=r"images is uint8 \[10, 64, 64, 3\] instead of uint8 \[480000, 64, 64, 3\]"
    ):
        Shapes3D(tmp_path / "x.h5")


def test_nothing_is_overwritten_nor_left_half_written(h5py, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.h5"

    def fails(*messages):
        with pytest.raises(SystemExit) as stop:
            render([str(path), "--first", "1000"])
        assert stop.value.code == 2
        *_, line = capsys.readouterr().err.strip().splitlines()
        for message in ("data.convert.shapes3d: error: ", *messages):
            assert message in line

    path.write_text("precious")
    fails(f"{path} exists")
    assert path.read_text() == "precious"
    path.unlink()

    def interrupted(count):
        assert {file.name for file in tmp_path.iterdir()} <= {"x.partial.h5", ".lock"}
        yield np.zeros((480, 64, 64, 3), np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes3d_rendered, "blocks", interrupted)
    fails("interrupted")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        shapes3d_rendered, "blocks", lambda count: iter([np.zeros((480, 64, 64, 3), np.uint8)] * 3)
    )
    with pytest.raises(Exception):  # noqa: B017
        render([str(path), "--first", "1000"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", ["0", "-1", "480001", "many"])
def test_a_wrong_number_of_scenes(first, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        render([str(tmp_path / "x.h5"), "--first", first])
    assert stop.value.code == 2 and "--first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

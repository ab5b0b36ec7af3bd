"""Nearest training images: exactly what integer arithmetic on every pair gives, however the images
arrive."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from lib.evaluation import nearest
from lib.evaluation.nearest import Neighbours, nearest_images

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


def random_images(count: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def batches_of(images: Tensor, size: int, order: Tensor | None = None, padding: int = 0):
    """Batches as a loader makes them, the last one filled up with image 0 at index -1."""
    order = torch.arange(len(images)) if order is None else order
    order = torch.cat([order, torch.full((padding,), -1)])
    return [(images[indices.clamp(min=0)], indices) for indices in order.split(size)]


def brute_force(
    queries: Tensor, images: Tensor, count: int, mirror: bool
) -> tuple[list, list, list]:
    """Indices, squared distances and which were mirrored, by sorting tuples of exact Python
    integers."""
    found = []
    for query in queries.long():
        pairs = []
        for index, image in enumerate(images.long()):
            as_is = (query - image).pow(2).sum().item()
            flipped = (query - image.flip(-1)).pow(2).sum().item() if mirror else as_is
            pairs.append((min(as_is, flipped), index, flipped < as_is))
        found.append(sorted(pairs)[:count])
    return tuple([[pair[part] for pair in row] for row in found] for part in (1, 0, 2))


def assert_exact(
    result: Neighbours, queries: Tensor, images: Tensor, count: int, mirror: bool
) -> None:
    indices, distances, mirrored = brute_force(queries, images, count, mirror)
    assert result.indices.tolist() == indices
    assert result.mirrored.tolist() == mirrored
    dimensions = queries[0].numel()
    assert result.mse.tolist() == [[distance / dimensions for distance in row] for row in distances]
    as_compared = torch.where(
        result.mirrored[..., None, None, None],
        images.flip(-1)[result.indices],
        images[result.indices],
    )
    assert torch.equal(result.images, as_compared)
    assert result.searched == len(images)
    types = [result.indices.dtype, result.mse.dtype, result.mirrored.dtype, result.images.dtype]
    assert types == [torch.int64, torch.float64, torch.bool, torch.uint8]


def assert_same(actual: Neighbours, expected: Neighbours) -> None:
    for name in ("indices", "mse", "mirrored", "images"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.searched == expected.searched


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("side", [1, 5, 19, 32], ids="side {}".format)
def test_agrees_with_integer_arithmetic_on_every_pair(side, mirror, device):
    queries, images = random_images(4, side, seed=1), random_images(50, side)
    batches = batches_of(images, 8, padding=6)
    result = nearest_images(queries, batches, count=7, device=device, mirror=mirror)
    assert_exact(result, queries, images, 7, mirror)
    if mirror and side > 1:
        assert result.mirrored.any() and not result.mirrored.all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_extreme_levels_at_256_are_exact(precision, device):
    """Sums that float32 could not hold over a whole image, and neighbours that differ in a single
    level."""
    shape = (1, 3, 256, 256)
    black, white = torch.zeros(shape, dtype=torch.uint8), torch.full(shape, 255, dtype=torch.uint8)
    almost_black, almost_white = black.clone(), white.clone()
    almost_black[0, 2, 255, 255] = 1
    almost_white[0, 0, 0, 0] = 254
    noise = random_images(2, 256)
    near_noise = noise[:1] ^ (noise[1:] % 128 == 0)
    images = torch.cat(
        [white, almost_white, black, almost_black, noise, near_noise, 255 * (noise[:1] % 2)]
    )
    queries = torch.cat([images[:5], (255 - noise[:1])])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast(device, dtype=torch.bfloat16):
            result = nearest_images(queries, batches_of(images, 3), count=8, device=device)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_exact(result, queries, images, 8, mirror=False)
    assert result.mse[0, 0] == 0 and result.mse[0, -1] == 255**2
    assert result.mse[0, 1] == 1 / (3 * 256 * 256)


def test_centred_levels_survive_the_shortest_format_of_a_matrix_product():
    levels = torch.arange(256, dtype=torch.uint8).repeat(1, nearest.BLOCK // 256)
    centred = nearest._centred_blocks(levels)
    assert torch.equal(centred.flatten(), levels.flatten().float() - 128)
    assert torch.equal(centred.bfloat16().float(), centred)
    assert nearest.BLOCK * centred.abs().max() ** 2 <= 2**24


def test_depends_neither_on_batch_size_nor_order_nor_chunks(monkeypatch):
    queries, images = random_images(9, 20, seed=1), random_images(70, 20) // 64 * 64
    images[40:60] = images[10:30]
    expected = nearest_images(queries, batches_of(images, 70), count=6, device="cpu", mirror=True)
    assert_exact(expected, queries, images, 6, mirror=True)
    for size, rows, workspace, seed in [
        (1, 256, 2**18, 1),
        (7, 4, 1, 2),
        (33, 5, 2**12, 3),
        (70, 3, 2**14, 4),
    ]:
        monkeypatch.setattr(nearest, "ROWS", rows)
        monkeypatch.setattr(nearest, "CPU_WORKSPACE", workspace)
        order = torch.randperm(70, generator=torch.Generator().manual_seed(seed))
        batches = iter(batches_of(images, size, order, padding=3))
        assert_same(nearest_images(queries, batches, count=6, device="cpu", mirror=True), expected)


def test_of_equally_near_images_the_lowest_index_comes_first():
    image = random_images(1, 8)
    images = torch.cat([image, image.flip(-1), image, image + 1, image, image]).clone()
    order = torch.tensor([5, 3, 4, 1, 2, 0])
    plain = nearest_images(image, batches_of(images, 2, order), count=3, device="cpu")
    assert plain.indices.tolist() == [[0, 2, 4]]
    mirrored = nearest_images(
        image, batches_of(images, 2, order), count=5, device="cpu", mirror=True
    )
    assert mirrored.indices.tolist() == [[0, 1, 2, 4, 5]]
    assert mirrored.mirrored.tolist() == [[False, True, False, False, False]]
    symmetric = torch.cat([image, image.flip(-1)], dim=-1)[..., 4:12]
    found = nearest_images(
        symmetric, [(symmetric, torch.tensor([3]))], count=1, device="cpu", mirror=True
    )
    assert not found.mirrored.any(), "an image is preferred to its mirror image"


def test_finds_an_image_in_the_set_and_its_mirror_image_only_when_asked():
    images = random_images(40, 16)
    itself = nearest_images(images[[17]], batches_of(images, 16), count=2, device="cpu")
    assert (itself.indices[0, 0], itself.mse[0, 0], itself.mirrored[0, 0]) == (17, 0, False)
    assert itself.mse[0, 1] > 0

    query = images[[17]].flip(-1)
    without = nearest_images(query, batches_of(images, 16), count=1, device="cpu")
    assert without.mse[0, 0] > 0
    found = nearest_images(query, batches_of(images, 16), count=2, device="cpu", mirror=True)
    assert (found.indices[0, 0], found.mse[0, 0], found.mirrored[0, 0]) == (17, 0, True)
    assert torch.equal(found.images[0, 0], query[0]), "shown as compared"
    assert found.indices[0, 1] != 17, "an image counts once"


def test_prepare_is_applied_to_the_training_images_alone():
    images, queries = random_images(30, 12), random_images(3, 12, seed=1)
    for mirror in (False, True):
        result = nearest_images(
            queries,
            batches_of(images, 8),
            count=4,
            device="cpu",
            mirror=mirror,
            prepare=lambda x: x // 32 * 32,
        )
        assert_exact(result, queries, images // 32 * 32, 4, mirror)


def test_padding_and_empty_batches_do_not_count_and_progress_tells_what_does():
    images = random_images(10, 6)
    batches = [
        (images[:4], torch.tensor([0, 1, -1, 3], dtype=torch.int32)),
        (images[:2], torch.tensor([-1, -1])),
        (images[:0], torch.arange(0)),
        (images[4:], torch.arange(4, 10)),
    ]
    progress = []
    result = nearest_images(
        images[[2, 3]], batches, count=9, device="cpu", progress=progress.append
    )
    assert result.searched == 9 and sum(progress) == 9 and 0 not in progress
    assert sorted(result.indices[0].tolist()) == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert result.indices[1, 0] == 3


def test_lets_go_of_batches_that_hold_a_neighbour():
    images = random_images(12, 8)
    passed = []

    def batches():
        for index, image in enumerate(images.split(1)):
            batch = image.clone()
            passed.append(weakref.ref(batch))
            yield batch, torch.tensor([index])
            del batch
            assert not any(reference() is not None for reference in passed[:-1])

    result = nearest_images(images[:2], batches(), count=12, device="cpu")
    assert torch.equal(result.images[0, 0], images[0])


IMAGES = random_images(5, 4)
INDICES = torch.arange(5)
ONE_BATCH = [(IMAGES, INDICES)]


@pytest.mark.parametrize(
    ("queries", "batches", "options", "message"),
    [
        (
            IMAGES.float(),
            ONE_BATCH,
            {},
            r"queries must be uint8 \[N, 1 or 3, H, W\], got torch.float32 \[5, 3, 4, 4\]",
        ),
        (
            IMAGES[0],
            ONE_BATCH,
            {},
            r"queries must be uint8 \[N, 1 or 3, H, W\], got torch.uint8 \[3, 4, 4\]",
        ),
        (IMAGES[:, :2], ONE_BATCH, {}, r"queries must be .*, got torch.uint8 \[5, 2, 4, 4\]"),
        (IMAGES[:0], ONE_BATCH, {}, "queries must not be empty"),
        (IMAGES[..., :0], ONE_BATCH, {}, "queries must not be empty"),
        (IMAGES, ONE_BATCH, {"count": 0}, "count must be at least 1, got 0"),
        (IMAGES, ONE_BATCH, {"count": 6}, "the 6 nearest of 5 training images"),
        (IMAGES, [], {}, "the 2 nearest of 0 training images"),
        (IMAGES, [(IMAGES, torch.full((5,), -1))], {}, "the 2 nearest of 0 training images"),
        (IMAGES, [(IMAGES.int(), INDICES)], {}, "training images must be uint8"),
        (
            IMAGES,
            [(random_images(5, 8), INDICES)],
            {},
            r"images must be uint8 \[N, 3, 4, 4\], .*\[5, 3, 8, 8\]",
        ),
        (IMAGES, [(IMAGES, torch.tensor([0, 1, 2, 3, 3]))], {}, "came twice"),
        (IMAGES, ONE_BATCH * 2, {}, "came twice"),
        (IMAGES, [(IMAGES, INDICES + 2**60)], {}, "indices must be below"),
    ],
)
def test_wrong_arguments_are_refused(queries, batches, options, message):
    with pytest.raises(ValueError, match=message):
        nearest_images(queries, batches, **{"count": 2, "device": "cpu"} | options)


def test_the_largest_admitted_index_is_told_from_its_neighbours():
    queries = random_images(1, 4)
    limit = 2 ** (62 - (queries[0].numel() * 255**2).bit_length())
    far = torch.where(queries < 128, 255, 0).to(torch.uint8)
    batch = (torch.cat([queries, far, far]), torch.tensor([limit - 1, limit - 2, limit - 3]))
    result = nearest_images(queries, [batch], count=3, device="cpu", mirror=True)
    assert result.indices.tolist() == [[limit - 1, limit - 3, limit - 2]]
    with pytest.raises(ValueError, match=f"below {limit}"):
        nearest_images(queries, [(queries, torch.tensor([limit]))], count=1, device="cpu")


def test_grey_oblong_images():
    images = torch.randint(256, (20, 1, 5, 9), dtype=torch.uint8)
    queries = images[:3].flip(-1)
    result = nearest_images(queries, batches_of(images, 7), count=4, device="cpu", mirror=True)
    assert_exact(result, queries, images, 4, mirror=True)
    assert result.images.shape == (3, 4, 1, 5, 9)
    with pytest.raises(ValueError, match=r"must be uint8 \[N, 1, 5, 9\]"):
        nearest_images(queries, batches_of(images.repeat(1, 3, 1, 1), 7), count=4, device="cpu")

"""Ray casting of the 480 geometries of 3D-Shapes: a corner of a room with an object of 4 shapes, 8
sizes, 15 views.

Nothing here has a colour. A pixel of a geometry is given by four weights, so that any colours of
the three materials
make an image: pixel = floor weight * floor colour + wall weight * wall colour + object weight *
object colour + white. A weight is the mean, over the pixel's subsamples, of the light that the
material sends to the camera.

The room: z points up, the floor is z = 0, the walls are x = -WALL and y = -WALL, the object stands
on the origin. The camera circles around the object, at equal distances from the walls at 0 degrees.
The lamp belongs to the room.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy import ndarray

from .scenes import SIZE, factor_values

SUBSAMPLES = 6  # on each side of a pixel
SHAPES = ("cube", "cylinder", "sphere", "pill")
SCALES, _, ORIENTATIONS = (values.tolist() for values in factor_values()[3:])
MATERIALS = ("floor", "wall", "object", "white")

WALL = 1.75
EYE_DISTANCE, EYE_ELEVATION, TARGET_HEIGHT = 4.6, np.radians(21), 0.55
FIELD_OF_VIEW = np.radians(42)
LAMP = np.array([0.4, 3.2, 4.2])
LAMP_RADIUS = 0.22  # as seen from the object, relative to the distance
AMBIENT, DIFFUSE = 0.48, 0.43
CREASE, CREASE_WIDTH = (
    0.35,
    0.4,
)  # how much darker it is where floor and walls meet, and how far that reaches
GLOSS, GLOSS_EXPONENT = 0.35, 30
HALF_WIDTH, HEIGHT = 0.5, 1.0  # of cube and cylinder
SPHERE_RADIUS = 0.58
PILL_RADIUS, PILL_HEIGHT = 0.37, 1.25
WIDTHS = {"cube": HALF_WIDTH, "cylinder": HALF_WIDTH, "sphere": SPHERE_RADIUS, "pill": PILL_RADIUS}
HEIGHTS = {"cube": HEIGHT, "cylinder": HEIGHT, "sphere": 2 * SPHERE_RADIUS, "pill": PILL_HEIGHT}
BEVEL = 0.07  # how far the normals of cube and cylinder turn before an edge

MAP_SIZE, MAP_EXTENT = (
    160,
    1.7,
)  # the floor around the object, |x| and |y| below the extent at scale 1


def interval(shape: str, origin: ndarray, direction: ndarray) -> tuple[ndarray, ndarray]:
    """Where rays enter and leave a shape of scale 1: distances in lengths of `direction`, entry >
    exit if they miss.

    Arguments:
        shape: One of `SHAPES`.
        origin, direction: [3, ...], broadcast against each other; no direction is parallel to an
            axis.
    """
    if shape == "cube":
        return _common(
            *(_slab(origin[i], direction[i], -HALF_WIDTH, HALF_WIDTH) for i in (0, 1)),
            _slab(origin[2], direction[2], 0, HEIGHT),
        )
    if shape == "cylinder":
        return _common(
            _round(origin[:2], direction[:2], HALF_WIDTH), _slab(origin[2], direction[2], 0, HEIGHT)
        )
    if shape == "sphere":
        return _ball(origin, direction, SPHERE_RADIUS, SPHERE_RADIUS)
    tube = _common(
        _round(origin[:2], direction[:2], PILL_RADIUS),
        _slab(origin[2], direction[2], PILL_RADIUS, PILL_HEIGHT - PILL_RADIUS),
    )
    ends = [
        _ball(origin, direction, PILL_RADIUS, z) for z in (PILL_RADIUS, PILL_HEIGHT - PILL_RADIUS)
    ]
    hits = [(enter <= leave, enter, leave) for enter, leave in (tube, *ends)]
    enter = reduce(np.minimum, [np.where(hit, enter, np.inf) for hit, enter, _ in hits])
    leave = reduce(np.maximum, [np.where(hit, leave, -np.inf) for hit, _, leave in hits])
    return enter, leave


def normals(shape: str, points: ndarray) -> ndarray:
    """Unit normals at points [3, N] of a shape's surface: away from the nearest point of a smaller
    core inside it."""
    x, y, z = points
    if shape == "cube":
        inner = HALF_WIDTH - BEVEL
        away = np.stack(
            [
                x - x.clip(-inner, inner),
                y - y.clip(-inner, inner),
                z - z.clip(BEVEL, HEIGHT - BEVEL),
            ]
        )
    elif shape == "cylinder":
        radius = np.hypot(x, y)
        outside = 1 - (HALF_WIDTH - BEVEL) / np.maximum(radius, HALF_WIDTH - BEVEL)
        away = np.stack([x * outside, y * outside, z - z.clip(BEVEL, HEIGHT - BEVEL)])
    elif shape == "sphere":
        away = np.stack([x, y, z - SPHERE_RADIUS])
    else:
        away = np.stack([x, y, z - z.clip(PILL_RADIUS, PILL_HEIGHT - PILL_RADIUS)])
    return _unit(away)


def _slab(origin: ndarray, direction: ndarray, low: float, high: float) -> tuple[ndarray, ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (low - origin) / direction, (high - origin) / direction
    return np.minimum(first, second), np.maximum(first, second)


def _round(origin: ndarray, direction: ndarray, radius: float) -> tuple[ndarray, ndarray]:
    """The points at most `radius` from 0 in as many dimensions as given: an endless cylinder or a
    ball."""
    a, b = _dot(direction, direction), _dot(origin, direction)
    discriminant = b**2 - a * (_dot(origin, origin) - radius**2)
    root = np.sqrt(np.maximum(discriminant, 0))
    miss = discriminant < 0
    return np.where(miss, np.inf, (-b - root) / a), np.where(miss, -np.inf, (root - b) / a)


def _ball(
    origin: ndarray, direction: ndarray, radius: float, height: float
) -> tuple[ndarray, ndarray]:
    centre = np.array([0, 0, height], origin.dtype).reshape(3, *[1] * (origin.ndim - 1))
    return _round(origin - centre, direction, radius)


def _common(*intervals: tuple[ndarray, ndarray]) -> tuple[ndarray, ndarray]:
    enter, leave = zip(*intervals, strict=True)
    return reduce(np.maximum, enter), reduce(np.minimum, leave)


def floor_light(shape: str) -> ndarray:
    """What the object leaves of the lamp's and of the surrounding light: [2, MAP_SIZE, MAP_SIZE]
    over (x, y)."""
    cells = (np.arange(MAP_SIZE, dtype=np.float32) + 0.5) * (2 * MAP_EXTENT / MAP_SIZE) - MAP_EXTENT
    x, y = np.meshgrid(cells, cells, indexing="ij")
    origin = np.stack([x, y, np.zeros_like(x)]).reshape(3, -1)
    towards_lamp = LAMP / np.linalg.norm(LAMP)
    side = np.cross(towards_lamp, [0, 0, 1])
    side /= np.linalg.norm(side)
    above = np.cross(side, towards_lamp)
    radius, angle = _spiral(48)
    disc = LAMP_RADIUS * radius
    lamp = (
        towards_lamp + np.outer(disc * np.cos(angle), side) + np.outer(disc * np.sin(angle), above)
    )
    # Lambert's cosine: directions above equally distributed points of the unit disc.
    radius, angle = _spiral(96)
    sky = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.sqrt(1 - radius**2)], axis=1)
    light = np.stack([_visible(shape, origin, lamp), _visible(shape, origin, sky)])
    fade = np.clip(3 - 3 * np.hypot(x, y) / cells[-1], 0, 1).ravel()  # no step where the map ends
    return (1 - fade * (1 - light)).reshape(2, MAP_SIZE, MAP_SIZE)


def _spiral(count: int) -> tuple[ndarray, ndarray]:
    """Polar coordinates of points that fill the unit disc evenly."""
    numbers = np.arange(count) + 0.5
    return np.sqrt(numbers / count), numbers * (np.pi * (3 - np.sqrt(5)))


def _visible(shape: str, origin: ndarray, directions: ndarray) -> ndarray:
    """The share of the directions in which nothing is in the way, for origins [3, N]: [N]."""
    free = np.zeros(origin.shape[1], np.float32)
    for direction in directions.astype(np.float32):
        enter, leave = interval(shape, origin, direction[:, None])
        free += leave <= np.maximum(enter, 0)
    return free / len(directions)


def camera(orientation: float) -> tuple[ndarray, ndarray]:
    """The eye [3] and, for each subsample of an image, the direction of sight [3, S, S];
    orientation in degrees."""
    azimuth = np.radians(45 + orientation)
    outward = np.array([np.cos(azimuth), np.sin(azimuth), 0])
    eye = EYE_DISTANCE * (
        np.cos(EYE_ELEVATION) * outward + np.sin(EYE_ELEVATION) * np.array([0, 0, 1])
    )
    eye[2] += TARGET_HEIGHT
    forward = np.array([0, 0, TARGET_HEIGHT]) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    count = SIZE * SUBSAMPLES
    steps = ((np.arange(count) + 0.5) / count * 2 - 1) * np.tan(FIELD_OF_VIEW / 2)
    direction = (
        forward[:, None, None] + right[:, None, None] * steps - up[:, None, None] * steps[:, None]
    )
    return eye.astype(np.float32), direction.astype(np.float32)


def all_weights() -> ndarray:
    """The weights of all geometries in [0, 1]: float32 [8 scales, 4 shapes, 15 orientations, 4
    materials, 64, 64].

    The four weights of a pixel add up to at most 1.
    """
    weights = np.empty(
        (len(SCALES), len(SHAPES), len(ORIENTATIONS), len(MATERIALS), SIZE, SIZE), np.float32
    )
    lights = {shape: floor_light(shape) for shape in SHAPES}
    for k, orientation in enumerate(ORIENTATIONS):
        eye, direction = camera(orientation)
        room = Room(eye, direction)
        for j, shape in enumerate(SHAPES):
            for i, scale in enumerate(SCALES):
                weights[i, j, k] = room.with_object(shape, scale, lights[shape])
    return weights


class Room:
    """The room without an object, seen by a camera, and what is needed to put one into it.

    Arguments:
        eye, direction: As `camera` returns them.
    """

    def __init__(self, eye: ndarray, direction: ndarray):
        self.eye, self.direction = eye, direction
        corner = direction[:, 0, 0]
        self._view = (
            direction.mean((1, 2)),
            direction[:, -1, 0] - corner,
            direction[:, 0, -1] - corner,
        )
        distances = np.stack(
            [(low - eye[i]) / direction[i] for i, low in enumerate((-WALL, -WALL, 0))]
        )
        distances[distances <= 0] = np.inf  # behind the camera
        surface = distances.argmin(0)  # 0, 1: a wall; 2: the floor
        points = eye[:, None, None] + distances.min(0) * direction
        normal = np.moveaxis(np.eye(3, dtype=np.float32)[surface], -1, 0)
        # The nearer another surface, the less of the surrounding light arrives.
        gaps = points + np.array([WALL, WALL, 0], np.float32)[:, None, None] + 9 * normal
        self.ambient = AMBIENT * (1 - CREASE * np.exp(-gaps / CREASE_WIDTH)).prod(0)
        self.diffuse = DIFFUSE * lambert(points, normal)
        self.floor, self.floor_points = surface == 2, points[:2]
        light = np.minimum(self.ambient + self.diffuse, 1)
        self.empty = np.zeros((len(MATERIALS), *light.shape), np.float32)
        self.empty[0], self.empty[1] = light * self.floor, light * ~self.floor
        self.empty_pixels = _pixels(self.empty)

    def with_object(self, shape: str, scale: float, light: ndarray) -> ndarray:
        """The weights [4, 64, 64] with an object in the room; light: as `floor_light` returns
        it."""
        pixels = self.empty_pixels.copy()
        whole = self._frame(MAP_EXTENT * scale, HEIGHTS[shape] * scale)
        samples = _cut(self.empty, _fine(whole)).copy()
        self._darken_floor(samples[0], _fine(whole), scale, light)
        self._draw(samples, whole, shape, scale)
        _cut(pixels, whole)[:] = _pixels(samples)
        return pixels

    def _darken_floor(
        self, floor: ndarray, window: tuple[slice, slice], scale: float, light: ndarray
    ) -> None:
        """Puts the object's shadow onto a window of subsamples of the floor's weight."""
        position = (
            _cut(self.floor_points, window) * (MAP_SIZE / (2 * MAP_EXTENT * scale)) + MAP_SIZE / 2
        )
        cells = position.clip(0, MAP_SIZE - 1).astype(
            np.int32
        )  # at its border the map changes nothing
        lamp, sky = light.reshape(2, -1).take(cells[0] * MAP_SIZE + cells[1], axis=1)
        floor[:] = (
            np.minimum(self.diffuse[window] * lamp + self.ambient[window] * sky, 1)
            * self.floor[window]
        )

    def _draw(self, samples: ndarray, whole: tuple[slice, slice], shape: str, scale: float) -> None:
        """Puts the object in front of what a window's subsamples show."""
        near = self._frame(WIDTHS[shape] * scale, HEIGHTS[shape] * scale)
        inner = tuple(
            slice(a.start - b.start, a.stop - b.start) for a, b in zip(near, whole, strict=True)
        )
        part = _cut(samples, _fine(inner))
        eye, direction = self.eye[:, None, None] / scale, _cut(self.direction, _fine(near)) / scale
        enter, leave = interval(shape, eye, direction)
        rows, columns = np.nonzero(enter < leave)
        points = eye[:, 0] + enter[rows, columns] * direction[:, rows, columns]  # at scale 1
        part[:2, rows, columns] = 0
        part[2:, rows, columns] = object_light(
            points, points * scale, normals(shape, points), self.eye
        )

    def _frame(self, width: float, height: float) -> tuple[slice, slice]:
        """Rows and columns of the pixels that may show |x|, |y| <= width, 0 <= z <= height."""
        corners = np.stack(np.meshgrid([-width, width], [-width, width], [0, height])).reshape(
            3, -1
        )
        seen = corners - self.eye[:, None]
        forward, down, right = self._view
        depth = forward @ seen / (forward @ forward)
        slices = []
        for axis in (down, right):
            position = (axis @ seen / (axis @ axis) / depth + 0.5) * SIZE
            slices.append(
                slice(max(0, int(position.min()) - 1), min(SIZE, int(position.max()) + 2))
            )
        return tuple(slices)


def lambert(points: ndarray, normal: ndarray) -> ndarray:
    """The lamp's light on surfaces, the cosine over the distance: [...] for points and unit normals
    [3, ...]."""
    towards = LAMP.astype(np.float32).reshape(3, *[1] * (points.ndim - 1)) - points
    cosine_by_distance = np.maximum(_dot(towards, normal), 0) / _dot(towards, towards)
    return cosine_by_distance * np.float32(np.linalg.norm(LAMP))


def object_light(points: ndarray, room_points: ndarray, normal: ndarray, eye: ndarray) -> ndarray:
    """The object's weight and the white of its highlight: [2, N].

    Arguments:
        points, room_points: [3, N] at scale 1, and where they are in the room.
        normal: [3, N], of length 1.
        eye: [3].
    """
    contact = 1 - 0.45 * np.exp(-points[2] / 0.2) * (1 - np.maximum(normal[2], 0))
    ambient = AMBIENT * (0.84 + 0.16 * normal[2]) * contact
    light = np.minimum(ambient + DIFFUSE * lambert(room_points, normal), 1)
    towards = [
        _unit(position.astype(np.float32)[:, None] - room_points) for position in (LAMP, eye)
    ]
    highlight = (
        GLOSS * np.maximum(_dot(_unit(towards[0] + towards[1]), normal), 0) ** GLOSS_EXPONENT
    )
    return np.stack([light * (1 - highlight), highlight])


def _unit(vectors: ndarray) -> ndarray:
    return vectors / np.sqrt(_dot(vectors, vectors))


def _dot(first: ndarray, second: ndarray) -> ndarray:
    """Of vectors whose components are the first dimension."""
    return sum(first[i] * second[i] for i in range(len(first)))


def _cut(images: ndarray, window: tuple[slice, slice]) -> ndarray:
    """A view of a window of [C, H, W]."""
    return images[(slice(None), *window)]


def _fine(window: tuple[slice, slice]) -> tuple[slice, slice]:
    """The subsamples of a window of pixels."""
    return tuple(slice(part.start * SUBSAMPLES, part.stop * SUBSAMPLES) for part in window)


def _pixels(samples: ndarray) -> ndarray:
    """Means over the subsamples of each pixel."""
    count, height, width = samples.shape
    rows = samples.reshape(count, height // SUBSAMPLES, SUBSAMPLES, width).mean(2)
    return rows.reshape(count, height // SUBSAMPLES, width // SUBSAMPLES, SUBSAMPLES).mean(3)

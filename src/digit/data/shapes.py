"""The built-in data set: shaded 3D scenes of ten toy shapes, a pure function of (seed, index, size).

Nothing is downloaded or stored: a scene is sphere-traced (Hart 1996) in float32 with four samples per pixel. Its
parameters come from Philox(seed, index), independent of other scenes and of the size, so 64 and 256 pixels show the
same scene. Pixel arrays only use + - * / sqrt, which IEEE 754 rounds exactly, so they are the same on every CPU; a
scene's parameters may differ in the 16th digit.

Axes: x right, y up, z towards the camera; ground y = 0. A point or direction is a tuple (x, y, z) of arrays (n,).
"""

import colorsys
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from digit.data.solids import CLASSES, SHAPES, Shape, length
from digit.data.source import ImageSource
from digit.errors import DigitError

Points = tuple[Any, Any, Any]
VERSION = 1  # part of the fingerprint; goes up when the pixels of a scene change
SAMPLES = 2  # samples along each side of a pixel
MARCH_STEPS, SHADOW_STEPS = 64, 20
HIT = 2e-3  # distance at which a ray counts as on the surface, in object units (a shape is about 2 across)
MIN_SIZE, MAX_SIZE = 16, 1024


# --- parameters of one scene ------------------------------------------------------------------------------------------


def _linear(hue: float, saturation: float, value: float) -> np.ndarray:
    """Colour in linear light, (3, 1) float32; display value = sqrt(linear)."""
    return np.square(np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32))[:, None]


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Object to world: roll about z, then pitch about x, then yaw about y; radians, (3, 3) float64."""
    (cy, sy), (cp, sp), (cr, sr) = ((math.cos(angle), math.sin(angle)) for angle in (yaw, pitch, roll))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_y @ about_x @ about_z


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that decides an image, except its size. Lengths in object units, colours (3, 1) float32 linear."""

    shape: Shape
    rotation: np.ndarray  # (3, 3) object to world
    height: float  # of the object's origin above the ground
    elevation: float  # of the camera, radians
    distance: float  # camera to the object's origin
    focal: float
    centre: tuple[float, float]  # where the object's origin lands, frame coordinates -1..1, x right, y up
    window: tuple[float, float, float, float]  # left, right, bottom, top of the object, frame coordinates
    light: tuple[float, float, float]  # unit vector towards the light
    colour: np.ndarray
    ground: np.ndarray
    tiles: np.ndarray  # the ground's second colour; equal to the first on a plain ground
    tile_size: float
    tile_angle: float
    horizon: np.ndarray
    zenith: np.ndarray
    gloss: float  # strength of the highlight, 0..1


@lru_cache(maxsize=4096)
def _classes_of_ten(seed: int, block: int) -> tuple[int, ...]:
    """The classes of scenes 10 block .. 10 block + 9: each once, shuffled, so no stride selects one class only."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, block, 10])))
    return tuple(np.argsort(rng.random(len(SHAPES))).tolist())


def class_of(seed: int, index: int) -> int:
    """Label 0..9 of scene `index` of the set `seed`; every aligned block of ten holds each class once."""
    return _classes_of_ten(seed, index // len(SHAPES))[index % len(SHAPES)]


def sample_scene(seed: int, index: int) -> Scene:
    """Samples the parameters of scene `index` of the set `seed`."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(rng.random())

    shape = SHAPES[class_of(seed, index)]
    pose = math.radians(shape.poses[int(rng.random() * len(shape.poses))])
    wobble = math.radians(shape.wobble)
    yaw = math.radians(between(-shape.yaw, shape.yaw))
    rotation = _rotation(yaw, between(-wobble, wobble) - pose, between(-wobble, wobble))
    elevation, distance = math.radians(between(16, 36)), between(4.5, 6.5)
    fill, right, up = between(1.12, 1.5), between(-1, 1), between(-1, 1)
    focal, centre, window = _frame(shape, rotation, elevation, distance, fill, right, up)
    side = -1.0 if rng.random() < 0.5 else 1.0
    azimuth, altitude = math.radians(side * between(25, 75)), math.radians(between(38, 62))
    light = (math.sin(azimuth) * math.cos(altitude), math.sin(altitude), math.cos(azimuth) * math.cos(altitude))
    hue, sky = between(0, 1), between(0, 1)
    ground_hue, ground_saturation, ground_value = hue + between(0.3, 0.7), between(0.1, 0.4), between(0.55, 0.9)
    ground = _linear(ground_hue, ground_saturation, ground_value)
    checked = rng.random() < 0.45
    tiles = _linear(ground_hue, ground_saturation, ground_value * between(0.62, 0.8)) if checked else ground
    return Scene(
        shape=shape, rotation=rotation, height=_rest_height(shape, rotation), elevation=elevation, distance=distance,
        focal=focal, centre=centre, window=window, light=light, ground=ground, tiles=tiles,
        colour=_linear(hue, between(0.6, 0.92), between(0.8, 1.0)), gloss=between(0.15, 0.75),
        tile_size=between(0.7, 1.2), tile_angle=between(0, math.pi / 2),
        horizon=_linear(sky, between(0.03, 0.15), between(0.88, 0.98)),
        zenith=_linear(sky + between(-0.08, 0.08), between(0.3, 0.6), between(0.55, 0.85)),
    )  # fmt: skip


def _rest_height(shape: Shape, rotation: np.ndarray) -> float:
    """Height of the origin at which the lowest point of the turned hull touches the ground."""
    return float(-(shape.hull @ rotation[1]).min()) + shape.margin


def _frame(shape: Shape, rotation: np.ndarray, elevation: float, distance: float, fill: float, right: float, up: float):
    """Focal length at which the larger extent of the object is `fill` (of a frame 2 wide), and its position.

    right, up in -1..1 move it within a fifth of the remaining space.
    """
    x, y, z = rotation @ shape.hull.T  # (K,) each
    depth = distance - y * math.sin(elevation) - z * math.cos(elevation)
    u, v = x / depth, (y * math.cos(elevation) - z * math.sin(elevation)) / depth
    grow = shape.margin / depth
    box = np.array([(u - grow).min(), (u + grow).max(), (v - grow).min(), (v + grow).max()])
    focal = fill / max(box[1] - box[0], box[3] - box[2])
    room = 0.2 * (2.0 - fill)
    centre_x = right * room - focal * (box[0] + box[1]) / 2
    centre_y = up * room - focal * (box[2] + box[3]) / 2
    window = box * focal + np.array([centre_x, centre_x, centre_y, centre_y])
    return float(focal), (float(centre_x), float(centre_y)), tuple(window.tolist())


# --- tracing ----------------------------------------------------------------------------------------------------------


def _dot(a: Points, b: Points) -> Any:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _along(origin: Points, direction: Points, t: Any) -> Points:
    x, y, z = (o + d * t for o, d in zip(origin, direction, strict=True))
    return x, y, z


def _pick(points: Points, where: np.ndarray) -> Points:
    x, y, z = (axis[where] if isinstance(axis, np.ndarray) else axis for axis in points)
    return x, y, z


def _to_object(scene: Scene, vector: Points) -> Points:
    columns = scene.rotation.T.tolist()
    return tuple(vector[0] * row[0] + vector[1] * row[1] + vector[2] * row[2] for row in columns)


def _rays(scene: Scene, size: int) -> Points:
    """Unit directions of the rays through a grid of size x size samples, each (size, size) float32."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0
    right = ((grid - scene.centre[0]) * (1 / scene.focal))[None, :]  # (1, S)
    up = ((-grid - scene.centre[1]) * (1 / scene.focal))[:, None]  # (S, 1), the first row is the top
    sine, cosine = math.sin(scene.elevation), math.cos(scene.elevation)
    y, z = up * cosine - sine, -up * sine - cosine
    scale = 1.0 / np.sqrt(right * right + y * y + z * z)
    return right * scale, y * scale, z * scale


def _camera(scene: Scene) -> tuple[float, float, float]:
    back, above = scene.distance * math.cos(scene.elevation), scene.distance * math.sin(scene.elevation)
    return 0.0, scene.height + above, back


def _enter_sphere(origin: Points, direction: Points, radius: float) -> tuple[Any, Any, Any]:
    """Where rays meet the sphere about the origin: (entry, exit, met)."""
    middle = -_dot(origin, direction)
    inside = radius * radius - (_dot(origin, origin) - middle * middle)
    half = np.sqrt(np.maximum(inside, 0.0))
    return middle - half, middle + half, inside > 0


def _march(distance: Callable, origin: Points, direction: Points, near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """First t in near..far at which origin + t direction is within HIT of the surface, inf if there is none."""
    found = np.full(near.shape, np.inf, dtype=np.float32)
    alive, t = np.arange(near.size), near
    for step in range(MARCH_STEPS):
        gap = distance(*_along(origin, direction, t))
        if step % 3 == 2:  # dropping finished rays costs about as much as a step, so only do it at every third
            hit = gap < HIT
            found[alive[hit]] = t[hit]
            keep = ~hit & (t < far)
            alive, t, gap, far, direction = alive[keep], t[keep], gap[keep], far[keep], _pick(direction, keep)
            if alive.size == 0:
                break
        t = t + gap
    return found


def _soft_shadow(distance: Callable, start: Points, light: Points, near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """Visible share of a lamp about 7 degrees across, 0..1: the smallest ratio of gap to distance along the ray."""
    seen, t = np.ones(near.shape, dtype=np.float32), np.maximum(near, 0.02)
    for _ in range(SHADOW_STEPS):
        gap = distance(*_along(start, light, t))
        seen = np.minimum(seen, 8.0 * gap / t)
        t = np.minimum(t + np.minimum(np.maximum(gap, 0.04), 0.4), far)
    seen = np.maximum(seen, 0.0)
    return seen * seen * (3.0 - 2.0 * seen)


# --- shading ----------------------------------------------------------------------------------------------------------


def _sky(scene: Scene, up: Any) -> np.ndarray:
    blend = np.maximum(up, 0.0) * 2.2
    blend = blend / (0.35 + blend)
    return scene.horizon + (scene.zenith - scene.horizon) * blend  # (3, n)


def _checker(a: Any, b: Any, width: Any) -> Any:
    """Share of the second tile colour under a box of `width` tiles about (a, b), 0..1."""

    def wave(x: Any) -> Any:  # mean over the box of a square wave of +-1 with period 2: a triangle's difference
        low, high = (np.abs(side - 2.0 * np.floor(side * 0.5) - 1.0) for side in (x - width * 0.5, x + width * 0.5))
        return (low - high) / width

    return 0.5 - 0.5 * wave(a) * wave(b)


def _ground_colour(scene: Scene, x: Any, z: Any, t: Any, spread: Any) -> np.ndarray:
    """Albedo of the ground at (x, 0, z), filtered over the footprint `spread` of a sample."""
    if scene.tiles is scene.ground:
        return scene.ground
    sine, cosine = math.sin(scene.tile_angle) / scene.tile_size, math.cos(scene.tile_angle) / scene.tile_size
    width = np.minimum(spread / scene.tile_size + 0.02, 8.0)
    return scene.ground + (scene.tiles - scene.ground) * _checker(x * cosine - z * sine, x * sine + z * cosine, width)


def _ground(scene: Scene, rays: Points, size: int) -> np.ndarray:
    """Colours (3, n) of rays that go down to the ground, with the object's shadow and contact darkening."""
    camera = _camera(scene)
    t = -camera[1] / rays[1]
    x, z = rays[0] * t, camera[2] + rays[2] * t
    spread = t * (2.0 / size / scene.focal) * (0.5 - 0.5 / rays[1])
    start = _to_object(scene, (x, np.float32(-scene.height), z))
    light = _to_object(scene, scene.light)
    radius = scene.shape.radius
    near, far, _ = _enter_sphere(start, light, radius * 1.25)
    seen, open_sky = np.ones_like(t), np.ones_like(t)
    darkened = np.flatnonzero(far > np.maximum(near, 0.02))
    if darkened.size:
        points = _pick(start, darkened)
        seen[darkened] = _soft_shadow(scene.shape.distance, points, light, near[darkened], far[darkened])
    close = np.flatnonzero(_dot(start, start) < (radius + 0.8) ** 2)
    if close.size:
        gap = np.maximum(scene.shape.distance(*_pick(start, close)), 0.0) * 1.25
        open_sky[close] = np.minimum(0.25 + 1.5 * gap / (0.6 + gap), 1.0)
    albedo = _ground_colour(scene, x, z, t, spread)
    colour = albedo * (0.40 * open_sky + (0.72 * max(scene.light[1], 0.6)) * seen)
    fog = t * t * (1 / 500)
    return colour + (scene.horizon - colour) * (fog * fog / (1.0 + fog * fog))


def _object(scene: Scene, points: Points, rays: Points) -> np.ndarray:
    """Colours (3, n) at object-space surface points seen along object-space rays: sky, bounce, lamp, highlight, rim."""
    distance = scene.shape.distance
    normal = _normal(distance, points)
    up, light = _to_object(scene, (0.0, 1.0, 0.0)), _to_object(scene, scene.light)
    facing, lit = -_dot(normal, rays), _dot(normal, light)
    skyward = 0.5 + 0.5 * _dot(normal, up)
    open_sky = np.minimum(0.45 + 2.2 * np.maximum(distance(*_along(points, normal, 0.25)), 0.0), 1.0)
    clearance = np.minimum(np.maximum(_dot(points, up) + scene.height, 0.0) * 1.6 + 0.45, 1.0)
    lamp = np.maximum(lit * 0.9 + 0.1, 0.0)
    if not scene.shape.convex:
        lamp = lamp * _self_shadow(distance, points, normal, light)
    ambient = (scene.ground * 0.30 + (0.34 - 0.30 * scene.ground) * skyward) * (open_sky * clearance)
    colour = scene.colour * (ambient + 0.80 * lamp)
    half = tuple(a - b for a, b in zip(light, rays, strict=True))
    shine = np.maximum(_dot(normal, half), 0.0) / length(*half)
    for _ in range(5):  # shine ** 32
        shine = shine * shine
    rim = np.maximum(1.0 - facing, 0.0)
    rim = rim * rim * rim
    return colour + scene.gloss * (shine * lamp * 0.8 + rim * 0.25 * skyward * scene.horizon)


def _normal(distance: Callable, points: Points) -> Points:
    """Unit gradient by differences at the corners of a tetrahedron: four evaluations instead of six."""
    step, total = 6e-3, [0.0, 0.0, 0.0]
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        value = distance(*(axis + step * sign for axis, sign in zip(points, corner, strict=True)))
        total = [axis + value * sign for axis, sign in zip(total, corner, strict=True)]
    scale = 1.0 / np.maximum(length(*total), 1e-9)
    return tuple(axis * scale for axis in total)


def _self_shadow(distance: Callable, points: Points, normal: Points, light: Points) -> np.ndarray:
    """Soft shadow of the shape on itself from five samples towards the light, 0..1."""
    start, seen = _along(points, normal, 0.03), 1.0
    for t in (0.1, 0.2, 0.35, 0.55, 0.8):
        seen = np.minimum(seen, 0.35 + 6.0 * distance(*_along(start, light, t)) / t)
    return np.maximum(seen, 0.0)


# --- images -----------------------------------------------------------------------------------------------------------


def _window(scene: Scene, size: int) -> tuple[slice, slice]:
    """Rows and columns of the samples that may show the object."""
    left, right, bottom, top = scene.window
    low_x, high_x = (math.floor((x + 1) * size / 2) for x in (left, right))
    low_y, high_y = (math.floor((1 - y) * size / 2) for y in (top, bottom))
    return slice(max(low_y - 1, 0), min(high_y + 2, size)), slice(max(low_x - 1, 0), min(high_x + 2, size))


def _trace(scene: Scene, rays: Points, image: np.ndarray) -> np.ndarray:
    """Renders the object into image (3, S, S); returns the mask (S, S) of the samples it covers."""
    size = image.shape[-1]
    covered, (rows, columns) = np.zeros((size, size), dtype=bool), _window(scene, size)
    directions = _to_object(scene, tuple(axis[rows, columns].reshape(-1) for axis in rays))
    camera = _camera(scene)
    origin = _to_object(scene, (camera[0], camera[1] - scene.height, camera[2]))
    near, far, met = _enter_sphere(origin, directions, scene.shape.radius)
    met = np.flatnonzero(met)
    directions = _pick(directions, met)
    t = _march(scene.shape.distance, origin, directions, near[met], far[met])
    hit = np.isfinite(t)
    directions = _pick(directions, hit)
    local = np.zeros(near.size, dtype=bool)
    local[met[hit]] = True
    covered[rows, columns] = local.reshape(rows.stop - rows.start, columns.stop - columns.start)
    image[:, covered] = _object(scene, _along(origin, directions, t[hit]), directions)
    return covered


def render_scene(seed: int, index: int, size: int = 64) -> tuple[np.ndarray, int]:
    """Renders scene `index` of the set `seed`.

    Returns (uint8 (size, size, 3) RGB, label 0..9). Raises DigitError for a size outside 16..1024.
    """
    _check_size(size)
    scene, side = sample_scene(seed, index), size * SAMPLES
    rays = _rays(scene, side)
    image = np.empty((3, side, side), dtype=np.float32)
    covered = _trace(scene, rays, image)
    down = ~covered & (rays[1] < -1e-3)
    above = ~covered & ~down
    image[:, down] = _ground(scene, _pick(rays, down), side)
    image[:, above] = _sky(scene, rays[1][above])
    mean = image.reshape(3, size, SAMPLES, size, SAMPLES)
    mean = (mean[:, :, 0, :, 0] + mean[:, :, 0, :, 1] + mean[:, :, 1, :, 0] + mean[:, :, 1, :, 1]) * 0.25
    pixels = np.sqrt(np.minimum(mean, 1.0)) * 255.0 + 0.5
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0)), class_of(seed, index)


def render_batch(seed: int, indices: Iterable[int], size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Renders several scenes: (uint8 (B, size, size, 3), int64 labels (B,)), each as by `render_scene`."""
    scenes = [render_scene(seed, int(index), size) for index in indices]
    images = np.stack([image for image, _ in scenes]) if scenes else np.zeros((0, size, size, 3), dtype=np.uint8)
    return images, np.array([label for _, label in scenes], dtype=np.int64)


def _check_size(size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise DigitError(f"shapes: size is {size}, wanted {MIN_SIZE} to {MAX_SIZE} pixels")


class ShapesSource(ImageSource):
    """The built-in data set as an ImageSource: `num` balanced scenes of `size` x `size` pixels in ten classes.

    Scenes are rendered when read; the latest few hundred stay in memory. `start` is the first scene's index (a
    validation set is ShapesSource(start=num of the training set)). Picklable; raises DigitError for bad sizes.
    """

    name = "shapes"
    CACHE = 512  # scenes kept, 6 MiB at 64 px

    def __init__(self, num: int = 16_000, size: int = 64, seed: int = 0, start: int = 0):
        _check_size(size)
        for field, value, least in (("num", num, 1), ("seed", seed, 0), ("start", start, 0)):
            if value < least:
                raise DigitError(f"shapes: {field} is {value}, wanted at least {least}")
        self.num, self.size, self.seed, self.start = num, size, seed, start
        self.classes = list(CLASSES)
        self.fingerprint = hashlib.sha256(f"shapes|{VERSION}|{num}|{size}|{seed}|{start}".encode()).hexdigest()
        self._cache: OrderedDict[int, tuple[np.ndarray, int]] = OrderedDict()

    def __len__(self) -> int:
        return self.num

    def _scene(self, index: int) -> int:
        if not 0 <= index < self.num:
            raise IndexError(f"shapes: no scene {index} among {self.num}")
        return self.start + index

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Scene `index` as (PIL RGB size x size, label)."""
        scene = self._scene(index)
        rendered = self._cache.get(scene)  # one look-up: several threads may read
        if rendered is None:
            rendered = self._cache[scene] = render_scene(self.seed, scene, self.size)
            if len(self._cache) > self.CACHE:
                self._cache.popitem(last=False)
        return Image.fromarray(rendered[0]), rendered[1]

    def key(self, index: int) -> str:
        """Name of the scene, such as shapes/star/000007."""
        scene = self._scene(index)
        return f"{self.name}/{CLASSES[class_of(self.seed, scene)]}/{scene:06d}"

    def labels(self) -> np.ndarray:
        """Labels (num,) int64, without rendering."""
        return np.array([class_of(self.seed, self.start + index) for index in range(self.num)], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}  # a worker renders its own scenes

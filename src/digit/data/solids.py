"""Ten toy solids as signed distance bounds (for sphere tracing, Hart 1996), and how they stand on the ground.

A distance is a function of object-space coordinates x, y, z (arrays of one shape): positive outside, gradient at most
1, so that a step of that length never enters the solid. Solids are about two units across and face +z.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# --- ten signed distance bounds: positive outside, gradient at most 1 -------------------------------------------------


def length(*parts: Any) -> Any:
    total = parts[0] * parts[0]
    for part in parts[1:]:
        total = total + part * part
    return np.sqrt(total)


def _smooth_max(a: Any, b: Any, width: float) -> Any:
    """max(a, b) with the crease rounded over `width`; the gradient stays a mean of the two, so the bound holds."""
    overlap = np.maximum(width - np.abs(a - b), 0.0)
    return np.maximum(a, b) + overlap * overlap * (0.25 / width)


def _rounded(edge: float, *sides: Any) -> Any:
    """Box-like solid from the signed distances to its pairs of sides, with edges of radius `edge`."""
    inside = sides[0]
    for side in sides[1:]:
        inside = np.maximum(inside, side)
    return length(*(np.maximum(side + edge, 0.0) for side in sides)) + np.minimum(inside + edge, 0.0) - edge


def _sphere(x: Any, y: Any, z: Any) -> Any:
    return length(x, y, z) - 1.0


def _cube(x: Any, y: Any, z: Any) -> Any:
    return _rounded(0.06, np.abs(x) - 0.75, np.abs(y) - 0.75, np.abs(z) - 0.75)


def _cylinder(x: Any, y: Any, z: Any) -> Any:
    return _rounded(0.06, length(x, z) - 0.6, np.abs(y) - 0.95)


def _cone(x: Any, y: Any, z: Any) -> Any:
    side = (length(x, z) * 2.0 + (y - 1.0) * 0.85) * (1 / math.hypot(2.0, 0.85))  # apex y = 1, base radius 0.85 at -1
    return _smooth_max(side, -1.0 - y, 0.08)


def _torus(x: Any, y: Any, z: Any) -> Any:
    return length(length(x, y) - 0.72, z) - 0.3


def _pyramid(x: Any, y: Any, z: Any) -> Any:
    side = (_smooth_max(np.abs(x), np.abs(z), 0.04) * 1.6 + (y - 0.9) * 0.9) * (1 / math.hypot(1.6, 0.9))
    return _smooth_max(side, -0.7 - y, 0.05)  # apex y = 0.9, base 1.8 x 1.8 at y = -0.7


def _octahedron(x: Any, y: Any, z: Any) -> Any:
    soft = 4e-4  # |x| as sqrt(x^2 + soft): rounds the edges
    total = np.sqrt(x * x + soft) * 1.6 + np.sqrt(y * y + soft) + np.sqrt(z * z + soft) * 1.6
    return (total - 1.2) * (1 / math.hypot(1.6, 1.0, 1.6))  # 2.4 high, 1.5 wide


STAR_OUTER, STAR_INNER = 1.05, 0.46


def _star(x: Any, y: Any, z: Any) -> Any:
    u = np.abs(x)
    nx, ny = math.cos(0.2 * math.pi), -math.sin(0.2 * math.pi)
    for _ in range(2):  # fold into the wedge of 36 degrees beside the upper tip
        beyond = np.maximum(u * nx + y * ny, 0.0) * 2.0
        u, y = np.abs(u - beyond * nx), y - beyond * ny
    notch_x, notch_y = STAR_INNER * math.sin(0.2 * math.pi), STAR_INNER * math.cos(0.2 * math.pi)
    edge = math.hypot(notch_x, STAR_OUTER - notch_y)
    outline = (u * (STAR_OUTER - notch_y) + (y - STAR_OUTER) * notch_x) * (1 / edge)
    return _rounded(0.08, outline, np.abs(z) - 0.26)


def _heart(x: Any, y: Any, z: Any) -> Any:
    half, mid = 0.58, 0.29 * math.sqrt(2)  # a square on its corner and a circle of radius `half` on each upper side
    u, v = np.abs(x), y + 0.2
    along, across = (u + v) * math.sqrt(0.5), (v - u) * math.sqrt(0.5)
    square = _rounded(0.01, np.abs(along) - half, np.abs(across) - half)
    outline = np.minimum(square, length(u - mid, v - mid) - half)
    return _rounded(0.16, outline, np.abs(z) - 0.32)


def _cross(x: Any, y: Any, z: Any) -> Any:
    u, v, w = np.abs(x), np.abs(y), np.abs(z)
    largest, least = np.maximum(np.maximum(u, v), w), np.minimum(np.minimum(u, v), w)
    return _rounded(0.06, largest - 0.95, u + v + w - largest - least - 0.28, least - 0.28)


# --- shapes, with the points that decide how they stand and how large they appear -------------------------------------


def _ring(radius: float, height: float, count: int = 24, plane: str = "xz") -> list[tuple[float, float, float]]:
    angles = [2 * math.pi * k / count for k in range(count)]
    flat = [(radius * math.sin(angle), radius * math.cos(angle)) for angle in angles]  # starts at the upper tip
    return [(a, height, b) if plane == "xz" else (a, b, height) for a, b in flat]


def _corners(half: float, heights: tuple[float, ...]) -> list[tuple[float, float, float]]:
    return [(x, y, z) for x in (-half, half) for y in heights for z in (-half, half)]


def _arm_ends(reach: float, half: float) -> list[tuple[float, float, float]]:
    ends = [(x, y, z) for x in (-reach, reach) for y in (-half, half) for z in (-half, half)]
    return [*ends, *[(y, x, z) for x, y, z in ends], *[(y, z, x) for x, y, z in ends]]


def _heart_outline(z: float) -> list[tuple[float, float, float]]:
    mid = 0.29 * math.sqrt(2)
    right = [(mid + x, mid + y - 0.2, z) for x, y, _ in _ring(0.58, 0, plane="xy")]
    return [*right, *[(-x, y, z) for x, y, _ in right], (0.0, -0.58 * math.sqrt(2) - 0.2, z)]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One class: a signed distance bound, and points whose hull, grown by `margin`, contains the solid."""

    name: str
    distance: Callable[[Any, Any, Any], Any]
    hull: np.ndarray  # (K, 3) float64
    margin: float = 0.0
    yaw: float = 180.0  # degrees either side of facing the camera
    poses: tuple[float, ...] = (0.0,)  # degrees of tilt back from upright; a scene samples one
    wobble: float = 6.0  # degrees of random tilt in either direction
    convex: bool = True  # a convex solid casts no shadow on its lit side

    @property
    def radius(self) -> float:
        """Radius of a sphere about the origin that contains the solid."""
        return float(np.sqrt((self.hull**2).sum(1)).max()) + self.margin


def _shape(name: str, distance: Callable, hull: list, **fields: Any) -> Shape:
    return Shape(name=name, distance=distance, hull=np.asarray(hull, dtype=np.float64), **fields)


_AXES = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, -1, 0), (0, 0, -1)]
SHAPES = (
    _shape("sphere", _sphere, [(0, 0, 0)], margin=1.0),
    _shape("cube", _cube, _corners(0.69, (-0.69, 0.69)), margin=0.06, wobble=0.0),
    _shape("cylinder", _cylinder, _ring(0.54, 0.89) + _ring(0.54, -0.89), margin=0.06, poses=(0.0, 90.0), wobble=0.0),
    _shape("cone", _cone, [(0, 0.97, 0), *_ring(0.84, -1.0)]),
    _shape("torus", _torus, _ring(0.72, 0.0, plane="xy"), margin=0.3, yaw=50.0, poses=(0.0, 25.0, 90.0), convex=False),
    _shape("pyramid", _pyramid, [(0, 0.88, 0), *_corners(0.88, (-0.7,))], yaw=30.0, wobble=0.0),
    _shape("octahedron", _octahedron, [(x * 0.73, y * 1.14, z * 0.73) for x, y, z in _AXES]),
    _shape(
        "star",
        _star,
        _ring(1.02, 0.2, 5, "xy") + _ring(1.02, -0.2, 5, "xy"),
        yaw=48.0,
        poses=(0.0, 12.0),
        convex=False,
    ),
    _shape("heart", _heart, _heart_outline(0.2) + _heart_outline(-0.2), yaw=48.0, poses=(0.0, 12.0), convex=False),
    _shape("cross", _cross, _arm_ends(0.89, 0.22), margin=0.06, poses=(0.0, 35.0, 45.0), convex=False),
)
CLASSES = [shape.name for shape in SHAPES]

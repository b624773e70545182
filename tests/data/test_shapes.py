"""The embedded data set: determinism, balance, honest distances, and scenes that sit where they should."""

import pickle
import time

import numpy as np
import pytest

from digit.data.shapes import CLASSES, ShapesSource, class_of, render_batch, render_scene, sample_scene
from digit.data.solids import SHAPES
from digit.data.source import ImageSource
from digit.errors import DigitError


def test_scene_is_a_pure_function_of_seed_and_index():
    images, labels = render_batch(3, range(40, 60), 64)
    assert images.shape == (20, 64, 64, 3) and images.dtype == np.uint8
    for row in (19, 0, 7):
        image, label = render_scene(3, 40 + row, 64)
        assert np.array_equal(image, images[row]) and label == labels[row]
    assert not np.array_equal(render_scene(4, 40)[0], images[0])
    assert len({image.tobytes() for image in images}) == 20


def test_classes_are_balanced_and_distinct():
    source = ShapesSource(num=50, size=32)
    assert len(set(CLASSES)) == 10 and source.classes == CLASSES
    assert np.bincount(source.labels()).tolist() == [5] * 10
    assert [source.read(i)[1] for i in range(12)] == source.labels()[:12].tolist()


@pytest.mark.parametrize("stride", [2, 5, 9, 10, 20, 100])
def test_no_stride_meets_one_class_only(stride):
    counts = np.bincount(ShapesSource(num=200 * stride).labels()[::stride], minlength=10)
    assert counts.min() > 6, "a limit spreads evenly over the source: 20 of each expected"


@pytest.mark.parametrize("size", [32, 128])
def test_size_changes_the_sampling_and_not_the_scene(size):
    reference = render_scene(0, 7, 64)[0].astype(float)
    other = render_scene(0, 7, size)[0].astype(float)
    side = min(size, 64)
    a, b = (x.reshape(side, x.shape[0] // side, side, x.shape[0] // side, 3).mean((1, 3)) for x in (reference, other))
    assert np.abs(a - b).mean() < 3  # of 255: only edges differ


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_distances_are_bounds(shape):
    """|d(p) - d(q)| <= |p - q|, which makes a step of length d safe, and the hull really holds the solid."""
    rng = np.random.default_rng(0)
    p = rng.uniform(-1.5, 1.5, (3, 20000))
    q = p + rng.normal(0, 0.1, p.shape)
    change = np.abs(shape.distance(*p) - shape.distance(*q))
    assert (change <= np.sqrt(((p - q) ** 2).sum(0)) + 1e-9).all()
    inside = p[:, shape.distance(*p) <= 0]
    assert 0.01 < inside.shape[1] / p.shape[1] < 0.5
    assert np.sqrt((inside**2).sum(0)).max() <= shape.radius + 1e-6
    support = (shape.hull @ rng.normal(size=(3, 64))).max(0)
    assert np.isfinite(support).all()


@pytest.mark.parametrize("label", range(10))
def test_objects_stand_on_the_ground_inside_the_frame(label):
    rng = np.random.default_rng(label)
    for index in (index for index in range(200) if class_of(0, index) == label):
        scene = sample_scene(0, index)
        world = rng.uniform(-1.3, 1.3, (3, 20000))
        for low, high, occupied in ((-0.3, -0.05, False), (0.0, 0.08, True)):  # below the ground; just above it
            world[1] = rng.uniform(low, high, 20000) - scene.height
            assert (scene.shape.distance(*(scene.rotation.T @ world)) <= 0).any() == occupied
        left, right, bottom, top = scene.window
        assert -1 < left < right < 1 and -1 < bottom < top < 1
        assert 0.55 < max(right - left, top - bottom) / 2 < 0.76


def test_pictures_are_neither_flat_nor_blown_out():
    images, _ = render_batch(0, range(30), 32)
    assert (images.reshape(30, -1).std(1) > 15).all()
    assert (images.reshape(30, -1).mean(1) > 50).all() and (images.reshape(30, -1).mean(1) < 235).all()


def test_source_follows_the_protocol():
    source = ShapesSource(num=20, size=48, seed=5)
    assert isinstance(source, ImageSource) and len(source) == 20
    image, label = source.read(13)
    assert (image.mode, image.size, label) == ("RGB", (48, 48), source.labels()[13])
    assert source.key(13) == f"shapes/{CLASSES[label]}/000013" and source.raw(13) is None
    assert source.subset([13]).read(0)[0].tobytes() == image.tobytes()
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint and again.read(13)[0].tobytes() == image.tobytes()
    fields = {"num": 20, "size": 48, "seed": 5}
    others = [ShapesSource(**fields | change) for change in ({"num": 21}, {"size": 49}, {"seed": 6}, {"start": 1})]
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_start_continues_the_same_set():
    whole, later = ShapesSource(num=20, size=32), ShapesSource(num=2, size=32, start=11)
    assert later.read(1)[0].tobytes() == whole.read(12)[0].tobytes() and later.key(1) == whole.key(12)
    assert later.labels().tolist() == whole.labels()[11:13].tolist()


@pytest.mark.parametrize("fields", [{"num": 0}, {"size": 8}, {"size": 5000}, {"seed": -1}, {"start": -1}])
def test_bad_settings_are_refused(fields):
    with pytest.raises(DigitError, match=next(iter(fields))):
        ShapesSource(**fields)


def test_reading_outside_is_an_index_error():
    with pytest.raises(IndexError):
        ShapesSource(num=3).read(3)


def test_rendering_is_not_slow():
    seconds = []
    for _ in range(6):  # the fastest of several: another process on the same core slows some of them down
        start = time.thread_time()
        render_batch(0, range(20))
        seconds.append(time.thread_time() - start)
    assert 20 / min(seconds) > 40, "about 230 scenes a second on one free core"

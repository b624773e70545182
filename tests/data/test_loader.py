"""CropLoader and CachedCrops: order, restart, workers, broken files, and batches that depend on (seed, step) alone."""

import multiprocessing
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from digit.data.images import open_source
from digit.data.loader import CachedCrops, CropLoader, on_device
from digit.data.preprocess import PreprocessConfig, crop_image
from digit.errors import DigitError

CFG = PreprocessConfig(image_size=16)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FIELDS = ("images", "labels", "indices", "crops", "ok")


def make_folder(root, num=12, bad=()):
    rng = np.random.default_rng(0)
    for number in range(num):
        path = root / f"{'abc'[number % 3]}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (20 + number % 5, 18 + number % 7, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
        if number in bad:
            path.write_bytes(path.read_bytes()[:100])
    return open_source(root)


def everything(loader):
    batches = list(loader)
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS}


def assert_same(first, second):
    for name in FIELDS:
        assert torch.equal(first[name], second[name]), name


def test_rows_are_in_order_and_are_crop_image(tmp_path):
    source = make_folder(tmp_path)
    rows = everything(CropLoader(source, CFG, indices=[7, 2, 5], crops_per_image=3, seed=4, batch_size=4))
    assert rows["indices"].tolist() == [7, 7, 7, 2, 2, 2, 5, 5, 5] and rows["crops"].tolist() == [0, 1, 2] * 3
    assert rows["images"].shape == (9, 3, 16, 16) and rows["images"].dtype == torch.uint8 and rows["ok"].all()
    for row in range(9):
        index, crop = int(rows["indices"][row]), int(rows["crops"][row])
        image, label = source.read(index)
        wanted = crop_image(image, CFG, seed=4, index=index, crop=crop)
        np.testing.assert_array_equal(rows["images"][row].permute(1, 2, 0).numpy(), wanted)
        assert rows["labels"][row] == label


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_batches_on_a_device_are_the_same(tmp_path, device):
    loader = CropLoader(make_folder(tmp_path, bad=(4,)), CFG, batch_size=5, max_bad_fraction=0.5)
    moved = list(on_device(loader, device))
    assert all(batch.images.device.type == device and batch.labels.device.type == "cpu" for batch in moved)
    for batch, wanted in zip(moved, loader, strict=True):
        assert all(torch.equal(getattr(batch, name).cpu(), getattr(wanted, name)) for name in FIELDS)


def test_batch_size_start_and_workers_change_nothing(tmp_path):
    source = make_folder(tmp_path, bad=(4,))
    options = {"crops_per_image": 2, "seed": 1, "max_bad_fraction": 0.5}
    whole = everything(CropLoader(source, CFG, batch_size=24, **options))
    assert_same(whole, everything(CropLoader(source, CFG, batch_size=5, **options)))
    before = torch.get_rng_state()
    workers = CropLoader(source, CFG, batch_size=5, num_workers=2, **options)
    assert_same(whole, everything(workers))
    assert torch.equal(before, torch.get_rng_state()) and len(workers.bad) == 1
    later = CropLoader(source, CFG, batch_size=5, start_row=7, **options)
    assert len(later) == 4 and later.num_rows == 24
    assert_same({name: values[7:] for name, values in whole.items()}, everything(later))
    assert list(CropLoader(source, CFG, start_row=24, **options)) == []


def test_signals_to_the_worker_processes_stop_nothing(tmp_path):
    loader = CropLoader(make_folder(tmp_path), CFG, batch_size=1, num_workers=2)
    batches = iter(loader)
    next(batches)
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    for name in ("TERM", "INT", "USR1"):  # as a batch system sends them; from their parent they would be told apart
        subprocess.run(["kill", f"-{name}", *workers], check=True)
    assert len(workers) == 2 and len(list(batches)) == 11


def test_broken_files_are_marked_named_and_counted(tmp_path):
    source = make_folder(tmp_path, bad=(3,))
    loader = CropLoader(source, CFG, crops_per_image=2, batch_size=5, max_bad_fraction=0.1)
    rows = everything(loader)
    [(key, reason)] = loader.bad
    assert key.endswith("03.png") and "03.png" in reason
    broken = next(i for i in range(12) if source.key(i) == key)
    assert rows["indices"][~rows["ok"]].tolist() == [broken, broken]
    assert rows["images"][~rows["ok"]].sum() == 0 and rows["labels"][~rows["ok"]].tolist() == [0, 0]
    everything(loader)
    assert len(loader.bad) == 1


def test_too_many_broken_files_end_the_run(tmp_path):
    source = make_folder(tmp_path, bad=(3, 4))
    with pytest.raises(DigitError, match=r"2 of 12 images unreadable, more than max_bad_fraction 0\.1: see"):
        everything(CropLoader(source, CFG, max_bad_fraction=0.1))
    with pytest.raises(DigitError, match="max_bad_fraction"):
        CachedCrops(source, CFG, max_bad_fraction=0.1)


def test_all_broken_is_said_whatever_the_fraction(tmp_path):
    source = make_folder(tmp_path, num=3, bad=(0, 1, 2))
    for make in (lambda: everything(CropLoader(source, CFG, max_bad_fraction=1.0)),
                 lambda: CachedCrops(source, CFG, max_bad_fraction=1.0)):  # fmt: skip
        with pytest.raises(DigitError, match="none of the 3 images can be read"):
            make()


def test_too_thin_a_picture_is_a_broken_file(tmp_path):
    source = make_folder(tmp_path, num=2)
    Image.new("L", (500_000, 1)).save(tmp_path / "a" / "thin.png")
    loader = CropLoader(open_source(tmp_path), PreprocessConfig(image_size=256), max_bad_fraction=0.5)
    assert everything(loader)["ok"].tolist() == [True, False, True] and "thin.png" in loader.bad[0][1]
    assert len(source) == 2


def test_wrong_numbers_are_refused(tmp_path):
    with pytest.raises(DigitError, match="batch_size 0"):
        CropLoader(make_folder(tmp_path, num=2), CFG, batch_size=0)


# ---------------------------------------------------------------- CachedCrops


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    source = make_folder(tmp_path)
    crops, again, other = (CachedCrops(source, CFG, seed=seed) for seed in (3, 3, 4))
    images, labels = crops.batch(5, 8)
    assert images.shape == (8, 3, 16, 16) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    again.batch(0, 8)
    assert torch.equal(images, again.batch(5, 8)[0]) and torch.equal(labels, again.batch(5, 8)[1])
    assert not torch.equal(images, other.batch(5, 8)[0])


def test_an_epoch_sees_every_image_once_with_fresh_crops(tmp_path):
    source = make_folder(tmp_path)
    crops = CachedCrops(source, CFG, seed=1)
    for epoch in range(2):
        images = torch.cat([crops.batch(epoch * 3 + step, 4)[0] for step in range(3)])
        wanted = [crop_image(source.read(i)[0], CFG, seed=1, index=i, crop=epoch) for i in range(12)]
        got = sorted(image.permute(1, 2, 0).numpy().tobytes() for image in images)
        assert got == sorted(crop.tobytes() for crop in wanted)
    order = [crops.batch(step, 12)[1].tolist() for step in range(3)]
    assert order[0] != order[1] != order[2] and sorted(order[0]) == sorted(order[1])


@pytest.mark.parametrize("budget", [0, 3000])
def test_past_the_budget_the_batches_are_the_same(tmp_path, budget):
    source = make_folder(tmp_path, bad=(2, 7))
    options = {"seed": 2, "max_bad_fraction": 0.5, "indices": range(1, 12)}
    cached = CachedCrops(source, CFG, **options)
    lazy = CachedCrops(source, CFG, budget_bytes=budget, **options)
    assert cached.num_cached == len(cached) == 11 and lazy.num_cached < 11
    for step in (0, 1, 2, 9, 1):
        for first, second in zip(cached.batch(step, 7), lazy.batch(step, 7), strict=True):
            assert torch.equal(first, second)
    lazy.close()


def test_a_batch_may_be_larger_than_the_source(tmp_path):
    images, labels = CachedCrops(make_folder(tmp_path, num=2), CFG).batch(0, 7)
    assert len(images) == 7 and sorted(labels[:2].tolist()) == sorted(labels[2:4].tolist())


def test_real_photographs(shared):
    source = open_source(shared / "data/grocery", limit=20)
    rows = everything(CropLoader(source, PreprocessConfig(image_size=64), batch_size=8))
    assert rows["ok"].all() and rows["images"].float().std() > 30 and len(set(rows["labels"].tolist())) > 15

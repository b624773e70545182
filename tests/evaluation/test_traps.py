"""`digit evaluate`: every warning, raised and not raised, and the content of samples.json and class folders."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from toy_measure import SIZE, FakeNetwork, pictures, run, sample_folder, save_folder, warned

from digit.errors import DigitError
from digit.evaluation import traps
from digit.evaluation.image_set import open_images
from digit.evaluation.samples import EvaluateConfig, statistics_npz


@pytest.fixture
def cfg(tmp_path):
    return EvaluateConfig(cache=str(tmp_path / "cache"), kernel_subset_size=20, kernel_subsets=5)


def test_a_clean_comparison_warns_of_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(traps, "FEW", 30)
    cfg = EvaluateConfig(protocol="clean", cache=str(tmp_path / "cache"))
    assert run(pictures(40), pictures(40, seed=1), cfg)["warnings"] == []


def test_few_singular_and_unequal_numbers(cfg):
    result = run(pictures(12), pictures(40, seed=1), cfg)
    assert warned(result, "12 samples for 12 features: the covariance is singular")
    assert warned(result, "40 reference images: below 10,000")
    assert warned(result, "12 samples against 40 reference images")


def test_jpeg_is_told_by_content_not_by_name(cfg, tmp_path):
    images, reference = pictures(20), pictures(20, seed=1)
    disguised = tmp_path / "s"
    save_folder(disguised, images, ".jpg")
    for path in disguised.iterdir():
        path.rename(path.with_suffix(".png"))
    assert warned(run(disguised, reference, cfg), "20 of 20 samples are JPEG")
    assert warned(run(images, disguised, cfg), "20 of 20 reference images are JPEG")
    named = tmp_path / "t"
    save_folder(named, images)
    for path in named.iterdir():
        path.rename(path.with_suffix(".jpg"))
    assert not warned(run(named, reference, cfg), "JPEG")
    large = save_folder(tmp_path / "large", pictures(20, size=64)[:, :, :40], ".jpg")
    assert not warned(run(images, large, cfg), "JPEG"), "a reference that is resized loses nothing"


def test_sizes(cfg, tmp_path):
    same = run(pictures(20), pictures(20, seed=1), cfg)
    assert not warned(same, "the reference") and not warned(same, "centre cropped")
    other = run(pictures(20), pictures(20, seed=1, size=32), cfg)
    assert warned(other, "samples are 16 px, the reference 32 px")
    fitted = run(pictures(20), pictures(20, seed=1, size=32), EvaluateConfig(cache=cfg.cache, image_size=16))
    assert not warned(fitted, "the reference 32") and "16 px" in fitted["reference"]["resized"]
    wide = run(pictures(20), pictures(20, seed=1, size=32)[:, :, :24], cfg)
    assert warned(wide, "reference images are 32x24") and wide["reference"]["image_size"] == SIZE
    mixed = save_folder(tmp_path / "m", pictures(10))
    Image.new("RGB", (30, 20)).save(mixed / "odd.png")
    assert warned(run(pictures(20), mixed, cfg), "reference images come in 2 sizes, most often 16x16")


def test_published_figures_need_the_size_the_reference_and_the_numbers_of_their_protocol(cfg, tmp_path):
    def against(reference, images, **changes):
        return run(images, reference, replace(cfg, **changes), network=FakeNetwork(name="inception"))

    small, large = pictures(6), pictures(6, size=256)
    assert "validation" in against(large, large)["protocol"]["about"]
    assert warned(against(small, small), "samples are 16 px, those of protocol released 256 px")
    assert not warned(against(large, large), " px")
    assert warned(against(large, large), "6 samples, 50,000 in protocol released")
    assert warned(against(large, large), "6 reference images, 50,000 in protocol released")
    statistics_npz(large, tmp_path / "s.npz", cfg, network=FakeNetwork(name="inception"))
    assert warned(against(tmp_path / "s.npz", large), "the reference is statistics, that of protocol released is valid")
    assert not warned(against(tmp_path / "s.npz", large, protocol="adm"), "the reference is")
    assert warned(against(large, large, protocol="adm"), "the reference is images, that of protocol adm is statistics")
    assert not warned(against(small, small, protocol="clean"), "published")
    assert not warned(run(small, small, cfg), "published"), "no protocol publishes metrics of this network"


def test_repeats_and_copies(cfg):
    images, reference = pictures(20), pictures(20, seed=1)
    assert not warned(run(images, reference, cfg), "pixel by pixel")
    assert warned(run(torch.cat([images, images[:3]]), reference, cfg), "3 of 23 samples repeat")
    assert warned(run(images, torch.cat([reference, images[:2]]), cfg), "2 of 20 samples are reference images")
    assert warned(run(images, torch.cat([reference, reference[:1]]), cfg), "1 of 21 reference images repeat")


def test_repeats_are_told_across_formats(cfg, tmp_path):
    images = pictures(20)
    folder = save_folder(tmp_path / "s", images, ".bmp")
    assert warned(run(folder, images, cfg), "20 of 20 samples are reference images")


def test_grey_and_16_bit(cfg, tmp_path):
    grey = pictures(20)[:, :1].expand(-1, 3, -1, -1)
    assert warned(run(grey, pictures(20, seed=1), cfg), "100% of the samples are greyscale")
    few = torch.cat([grey[:5], pictures(15, seed=2)])
    assert not warned(run(few, pictures(20, seed=1), cfg), "greyscale")
    folder = tmp_path / "deep"
    folder.mkdir()
    for i, image in enumerate(pictures(4)):
        Image.fromarray(image[0].numpy().astype(np.uint16) * 257).save(folder / f"{i}.png")
    assert warned(run(folder, pictures(20, seed=1), cfg), "4 of 4 samples have 16 bits")


def test_our_sample_folders_lose_their_grid_and_bring_their_labels(cfg, tmp_path):
    images = pictures(20)
    even = sample_folder(tmp_path / "even", images, [0, 1] * 10)
    assert (even / "grid.png").exists() and len(open_images(even)) == 20
    assert open_images(even).class_names == ["cat", "dog"] * 10
    result = run(even, pictures(20, seed=1), cfg)
    assert not warned(result, "labels") and not warned(result, "sizes")
    odd = sample_folder(tmp_path / "odd", images, [0] * 19 + [1])
    assert warned(run(odd, pictures(20, seed=1), cfg), "unbalanced against equal shares: 1 of class dog, 19 of")
    unlabelled = sample_folder(tmp_path / "none", images, [-1] * 20)
    assert open_images(unlabelled).class_names is None


def test_rounding_is_known_from_samples_json(cfg, tmp_path):
    folder, network = sample_folder(tmp_path / "s", pictures(6), [0, 1] * 3), FakeNetwork(name="inception")
    about = json.loads((folder / "samples.json").read_text())
    assert about.pop("rounding") == "nearest"
    (folder / "samples.json").write_text(json.dumps(about))  # as an older version wrote it
    assert not warned(run(folder, pictures(6), cfg, network=network), "uint8")
    for rounding in ("nearest", "truncate"):
        (folder / "samples.json").write_text(json.dumps(about | {"rounding": rounding}))
        result = run(folder, pictures(6), cfg, network=network)
        assert result["samples"]["rounding"] == rounding
        assert bool(warned(result, "rounded to uint8 by nearest")) == (rounding == "nearest")


def test_labels_against_those_of_the_reference(cfg, tmp_path):
    reference = tmp_path / "real"
    save_folder(reference / "cat", pictures(30, seed=1))
    save_folder(reference / "dog", pictures(10, seed=2))
    like = sample_folder(tmp_path / "like", pictures(40), [0] * 30 + [1] * 10)
    assert not warned(run(like, reference, cfg), "labels of the samples")
    even = sample_folder(tmp_path / "even", pictures(40), [0, 1] * 20)
    assert warned(run(even, reference, cfg), "labels of the samples are unbalanced against the shares of the reference")
    only = sample_folder(tmp_path / "only", pictures(40), [0] * 40)
    assert warned(run(only, reference, cfg), "0 of class dog")
    sampled = np.random.default_rng(0).permutation([0] * 26 + [1] * 14).tolist()
    assert not warned(
        run(sample_folder(tmp_path / "d", pictures(40), sampled), reference, cfg), "labels of the samples"
    )


def test_an_unfinished_sample_folder_is_refused(tmp_path):
    folder = sample_folder(tmp_path / "s", pictures(6), [0, 1] * 3)
    (folder / "journal.json").write_text("{}")
    with pytest.raises(DigitError, match="is not finished: run the same `digit sample` again"):
        open_images(folder)

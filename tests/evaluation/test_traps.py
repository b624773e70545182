"""`digit evaluate`: every warning, raised and not raised, and the content of samples.json and class folders."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from toy_measure import SIZE, FakeNetwork, pictures, run, sample_folder, save_folder, warned

from digit.errors import DigitError
from digit.evaluation.image_set import open_images
from digit.evaluation.samples import EvaluateConfig, statistics_npz
from digit.metrics import frechet


@pytest.fixture
def cfg(tmp_path):
    return EvaluateConfig(cache=str(tmp_path / "cache"), kernel_subset_size=20, kernel_subsets=5)


def test_a_clean_comparison_warns_of_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(frechet, "FEW", 30)
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
    for place in (folder, tmp_path):  # itself, or as one of several
        with pytest.raises(DigitError, match="s is not finished: run the same `digit sample` again"):
            open_images(place)


# -------------------------------------------------------------------- what a cache or saved statistics could hide


def deep_folder(folder):
    """20 images of 16 bits a pixel."""
    folder.mkdir(parents=True)
    for i, image in enumerate(pictures(20, seed=1)):
        Image.fromarray(image[0].numpy().astype(np.uint16) * 257).save(folder / f"{i}.png")
    return folder


def mixed_folder(folder):
    """20 images of 16 x 16 and one of 30 x 20."""
    save_folder(folder, pictures(20, seed=1))
    Image.new("RGB", (30, 20)).save(folder / "odd.png")
    return folder


def classes_folder(folder):
    """30 cats and 10 dogs."""
    save_folder(folder / "cat", pictures(30, seed=1))
    save_folder(folder / "dog", pictures(10, seed=2))
    return folder


def converted_folder(folder, mode):
    """20 PNGs (TIFF for CMYK) of another pixel type."""
    folder.mkdir(parents=True)
    for i, image in enumerate(pictures(20, seed=1)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).convert(mode)
        picture.save(folder / f"{i}.{'tif' if mode == 'CMYK' else 'png'}")
    return folder


REFERENCES = {
    "few": (lambda folder: save_folder(folder, pictures(10, seed=1)), "10 reference images for 12 features"),
    "other size": (lambda folder: save_folder(folder, pictures(20, seed=1, size=32)), "the reference 32 px"),
    "jpeg": (lambda folder: save_folder(folder, pictures(20, seed=1), ".jpg"), "20 reference images are JPEG"),
    "webp": (lambda folder: save_folder(folder, pictures(20, seed=1), ".webp"), "20 reference images are WEBP"),
    "grey": (lambda folder: converted_folder(folder, "L"), "100% of the reference images are greyscale"),
    "16 bits": (deep_folder, "20 of 20 reference images have 16 bits"),
    "alpha": (lambda folder: converted_folder(folder, "RGBA"), "20 of 20 reference images have an alpha channel"),
    "palette": (lambda folder: converted_folder(folder, "P"), "20 of 20 reference images have a palette"),
    "cmyk": (lambda folder: converted_folder(folder, "CMYK"), "20 of 20 reference images have CMYK"),
    "mixed sizes": (mixed_folder, "reference images come in 2 sizes, most often 16x16"),
    "wide": (lambda folder: save_folder(folder, pictures(20, seed=1)[:, :, :12]), "reference images are 16x12"),
    "repeats": (
        lambda folder: save_folder(folder, pictures(1).repeat(20, 1, 1, 1)),
        "19 of 20 reference images repeat",
    ),
    "copies": (lambda folder: save_folder(folder, pictures(40)[:20]), "20 of 40 samples are reference images"),
    "classes": (classes_folder, "labels of the samples are unbalanced against the shares of the reference"),
}


@pytest.mark.parametrize(("make", "text"), REFERENCES.values(), ids=REFERENCES)
def test_saved_statistics_warn_as_their_images_do(cfg, tmp_path, make, text):
    reference = make(tmp_path / "reference")
    samples = sample_folder(tmp_path / "samples", pictures(40), [0, 1] * 20)
    shown = run(samples, reference, cfg)
    fitting = None if "sizes" not in text and "16x12" not in text else SIZE
    saved = replace(cfg, image_size=fitting)  # images of mixed sizes are resized to the samples' size
    statistics_npz(reference, tmp_path / "s.npz", saved, network=FakeNetwork())
    hidden = run(samples, tmp_path / "s.npz", cfg)
    assert warned(shown, text) and hidden["warnings"] == shown["warnings"]
    assert run(samples, tmp_path / "s.npz", cfg)["warnings"] == shown["warnings"], "from cached features too"


def test_statistics_that_do_not_tell_say_so_in_one_line(cfg, tmp_path):
    statistics_npz(pictures(40, seed=1, size=32), tmp_path / "new.npz", cfg, network=FakeNetwork())
    whole = dict(np.load(tmp_path / "new.npz"))
    older = {name: whole[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "num", "network")}
    np.savez(tmp_path / "older.npz", **older)
    np.savez(tmp_path / "foreign.npz", mu=whole["mu"], sigma=whole["sigma"])
    assert not warned(run(pictures(20), tmp_path / "new.npz", cfg), "do not tell")
    result = run(pictures(20), tmp_path / "older.npz", cfg)
    assert warned(result, "do not tell sizes, formats, colours, classes and repeats of their images")
    assert warned(result, "40 reference images: below 10,000") and warned(
        result, "20 samples against 40 reference images"
    )
    result = run(pictures(20), tmp_path / "foreign.npz", cfg)
    assert len(warned(result, "do not tell the number, sizes, formats")) == 1
    assert not warned(result, "has rank")


def test_too_few_images_behind_foreign_statistics_are_seen_by_their_rank(cfg, tmp_path):
    few = FakeNetwork().judge(pictures(8, seed=1)).pooled.double()
    np.savez(tmp_path / "s.npz", mu=few.mean(0).numpy(), sigma=few.T.cov().numpy())
    result = run(pictures(20), tmp_path / "s.npz", cfg)
    assert warned(result, "has rank 7 of 12, as that of 8 images has: it is singular")


@pytest.mark.parametrize(
    "changes",
    [
        {"traits": "{"},
        {"traits": '{"num": 40}'},
        {"traits": "[1]"},
        {"digests": np.zeros((39, 32), np.uint8)},
        {"digests": np.zeros((40, 32), np.int64)},
        {"num": -3},
        {"num": 12},
    ],
    ids=str,
)
def test_damaged_traits_are_one_line(cfg, tmp_path, changes):
    statistics_npz(pictures(40, seed=1), tmp_path / "s.npz", cfg, network=FakeNetwork())
    np.savez(tmp_path / "s.npz", **dict(np.load(tmp_path / "s.npz")) | changes)
    with pytest.raises(DigitError, match="s.npz"):
        run(pictures(20), tmp_path / "s.npz", cfg)


# -------------------------------------------------------------------- warnings that agree


def test_both_sets_are_to_have_the_smaller_size(cfg):
    """Enlarging a reference would silence the warning and keep the fault."""
    for own, other in ((64, 32), (32, 64)):
        images, reference = pictures(20, size=own), pictures(20, seed=1, size=other)
        assert warned(run(images, reference, cfg), "resize both sets to 32 px (--image_size)")
        assert not warned(run(images, reference, replace(cfg, image_size=32)), "a lack of detail")
        enlarged = run(images, reference, replace(cfg, image_size=64))
        noun = "reference images" if own == 64 else "samples"
        assert warned(enlarged, f"{noun} were enlarged to 64 px, the smallest from 32 px")
        assert len(warned(enlarged, "a lack of detail")) == 1


def test_numbers_are_compared_in_one_way(cfg):
    result = run(pictures(20), pictures(40, seed=1), cfg)
    assert not warned(result, "equal numbers") and len(warned(result, "the same two numbers only")) == 1
    assert not warned(run(pictures(12), pictures(12, seed=1), cfg), "two numbers"), (
        "a singular one compares with nothing"
    )


def test_the_remedy_for_labels_is_the_share_that_they_are_compared_with(cfg, tmp_path):
    reference = classes_folder(tmp_path / "real")
    result = run(sample_folder(tmp_path / "s", pictures(40), [0, 1] * 20), reference, cfg)
    assert warned(result, "sample the classes in the shares of the reference") and not warned(result, "in turn")
    assert not warned(result, "labels of the reference")
    unlabelled = run(pictures(40), reference, cfg)
    assert warned(unlabelled, "labels of the reference images are unbalanced: 10 of class dog, 30 of class cat")
    assert warned(run(reference, pictures(40), cfg), "sample every class in turn")


def test_classes_that_the_reference_lacks_are_named(cfg, tmp_path):
    reference = classes_folder(tmp_path / "real")
    for i, names in enumerate((("cat", "owl"), ("owl", "cow"), ("Cat", "dog"), ("0", "1"), ("cat ", "dog"))):
        foreign = [name for name in names if name not in ("cat", "dog")]
        samples = sample_folder(tmp_path / f"s{i}", pictures(40), [0, 1] * 20, names)
        text = f"{len(foreign)} of 2 classes of the samples are none of the reference, such as {foreign[0]}:"
        assert warned(run(samples, reference, cfg), text)


# -------------------------------------------------------------------- odd sets


def test_fewer_images_than_asked_for_are_told(cfg):
    result = run(pictures(20), pictures(30, seed=1), replace(cfg, num=50, num_reference=40))
    assert warned(result, "50 images of tensor were asked for, and it holds 20")
    assert warned(result, "40 images of tensor were asked for, and it holds 30")


def test_our_folders_lose_their_grids_wherever_they_lie(cfg, tmp_path):
    for name in ("a", "b"):
        sample_folder(tmp_path / "runs" / name, pictures(10, seed=ord(name)), [0, 1] * 5)
    images = open_images(tmp_path / "runs")
    assert len(images) == 20 and images.class_names == ["a"] * 10 + ["b"] * 10
    own = save_folder(tmp_path / "photos", pictures(3))
    Image.new("RGB", (16, 16)).save(own / "grid.png")
    (own / "00000.png").rename(own / "street.png")
    assert len(open_images(own)) == 4, "a photo of a grid is a photo"


def test_a_sample_folder_that_lost_or_gained_images_says_so(cfg, tmp_path):
    folder = sample_folder(tmp_path / "s", pictures(20), [0, 1] * 10)
    (folder / "00003.png").unlink()
    assert warned(run(folder, pictures(20, seed=1), cfg), "lists 20 images, and the folder holds 19: their classes")
    save_folder(tmp_path / "more", pictures(3, seed=9))
    for i in range(3):
        (tmp_path / "more" / f"{i:05d}.png").rename(folder / f"9{i:04d}.png")
    assert warned(run(folder, pictures(20, seed=1), cfg), "lists 20 images, and the folder holds 22")


def test_an_npz_of_several_sets_is_refused(cfg, tmp_path):
    images = pictures(20).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "two.npz", images, images)
    with pytest.raises(DigitError, match="images in arr_0 and arr_1: save each set"):
        run(tmp_path / "two.npz", pictures(20, seed=1), cfg)
    np.savez(tmp_path / "labelled.npz", images, np.zeros(20, np.int64))  # as ADM's samplers save labels
    assert len(open_images(tmp_path / "labelled.npz")) == 20

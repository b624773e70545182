"""`digit inspect`: what was found, and the contact sheet."""

import json

import numpy as np
from PIL import Image, ImageDraw
from written_images import picture, write_folder

from digit.data.images import open_source
from digit.data.inspect import FRAME, THUMBNAIL, as_fitted, fit_caption, glance, inspect_source


def make(root):
    rng = np.random.default_rng(0)
    images = [("cat", (10, 20)), ("cat", (40, 30)), ("dog", (300, 200)), ("", (64, 64))]
    for number, (folder, size) in enumerate(images):
        (root / folder).mkdir(exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        picture.save(root / folder / f"{number}.jpg")
    Image.new("LA", (50, 50)).save(root / "dog" / "4.png")
    (root / "dog" / "5.png").write_bytes(b"broken")
    return open_source(root)


def test_report_counts_what_is_there(tmp_path):
    report = inspect_source(make(tmp_path))
    found = report.to_dict()
    assert found["num_images"] == 6 and found["num_good"] == 5 and found["num_unlabelled"] == 1
    assert found["classes"] == {"cat": 2, "dog": 3} and found["kinds"] == {"JPEG RGB": 4, "PNG LA": 1}
    assert found["width"] == {"min": 10, "median": 50.0, "max": 300}
    assert found["short_side"] == {"under 32 px": 2, "32..63 px": 1, "64..127 px": 1, "128..255 px": 1}
    assert [bad["key"].endswith("5.png") for bad in found["bad"]] == [True]
    json.dumps(found)


def test_text_names_classes_and_broken_files(tmp_path):
    text = inspect_source(make(tmp_path)).to_text()
    assert (
        "6, of which 1 broken (training leaves them out)" in text and "3  dog" in text and "5.png: not an image" in text
    )


def test_contact_sheet_is_a_picture(tmp_path):
    (tmp_path / "data").mkdir()
    inspect_source(make(tmp_path / "data")).save_contact_sheet(tmp_path / "out" / "sheet.png")
    sheet = Image.open(tmp_path / "out" / "sheet.png")
    assert sheet.mode == "RGB" and sheet.width == 3 * 100 + 4 and len(sheet.getcolors(10**6)) > 1000


def test_captions_that_are_cut_say_so(tmp_path):
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    assert fit_caption(canvas, "cat") == "cat"
    cut = fit_caption(canvas, "a-long-name-of-a-class-of-milk")
    assert cut.endswith("..") and canvas.textlength(cut) <= THUMBNAIL


def test_all_broken_still_makes_a_report(tmp_path):
    (tmp_path / "x.png").write_bytes(b"nothing")
    report = inspect_source(open_source(tmp_path))
    assert report.num_good == 0 and "1, of which 1 broken" in report.to_text()
    report.save_contact_sheet(tmp_path / "sheet.png")


def test_thumbnails_are_spread_over_many_classes(tmp_path):
    for number in range(80):
        (tmp_path / f"c{number:02d}").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / f"c{number:02d}" / "x.png")
    captions = [caption for caption, _ in inspect_source(open_source(tmp_path)).thumbnails]
    assert len(captions) == len(set(captions)) == 64


def test_rendered_sources_have_no_files():
    assert inspect_source(open_source("shapes:num=10,size=32")).kinds == {"rendered RGB": 10}


def test_processes_see_what_threads_see(tmp_path, monkeypatch):
    files = {f"{'ab'[number % 2]}/{number}.png": picture(number) for number in range(12)}
    source = open_source(write_folder(tmp_path, {**files, "a/broken.png": b"\x89PNG"}))
    reports = []
    for least in (2000, 1):
        monkeypatch.setattr("digit.data.inspect.MIN_IMAGES_FOR_PROCESSES", least)
        reports.append(inspect_source(source))
    assert reports[0].to_dict() == reports[1].to_dict() and len(reports[0].bad) == 1
    assert [entry[0] for entry in reports[0].thumbnails] == [entry[0] for entry in reports[1].thumbnails]


def portraits(root):
    """Ten pictures of 60 x 100 pixels and two squares."""
    root.mkdir()
    for number in range(12):
        Image.new("RGB", (100 if number < 2 else 60, 100), (number, 0, 0)).save(root / f"{number}.png")
    return open_source(root)


def test_what_a_crop_loses_is_said_with_the_option(tmp_path):
    report = inspect_source(portraits(tmp_path / "data"))
    said = report.advise_fit()
    assert said.startswith("10 of 12 images are portrait, 0 landscape: crop cuts 33% of their area away (at most 40%)")
    assert "--preprocess.fit pad keeps all" in said
    assert "33% of each square are bars" in report.advise_fit("pad") and "out of shape" in report.advise_fit("squeeze")
    assert inspect_source(open_source("shapes:num=4,size=32")).advise_fit() == ""


def test_the_contact_sheet_frames_what_training_sees(tmp_path):
    image = Image.new("RGB", (60, 100), (0, 0, 200))
    cropped = as_fitted(image, "crop")
    assert cropped.size == (THUMBNAIL, THUMBNAIL)
    colours = {cropped.getpixel((THUMBNAIL // 2, y)) for y in range(THUMBNAIL)}
    assert (0, 0, 200) in colours and (191, 191, 241) in colours and FRAME in colours  # kept, cut, the frame between
    for fit in ("pad", "squeeze"):
        square = as_fitted(image, fit)
        assert square.size == (THUMBNAIL, THUMBNAIL) and square.getpixel((0, 0)) == FRAME
        assert square.getpixel((3, THUMBNAIL // 2)) == (0, 0, 200)
    inspect_source(portraits(tmp_path / "data")).save_contact_sheet(tmp_path / "sheet.png", "pad")


def test_a_glance_reads_what_the_sheet_shows():
    report = glance(open_source("shapes:num=300,size=16"))
    assert report.num_images == 64 and len(report.thumbnails) == 64

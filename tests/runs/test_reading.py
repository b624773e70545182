"""A run that is continued reads its pictures as before, and the commands that it tells say how."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import SHAPES, tiny_recipe

from digit.cli.arguments import make_parser, parse
from digit.cli.runs import add_run_arguments, make_run, reading_there
from digit.data.images import open_source
from digit.errors import DigitError
from digit.runs.fit import Run
from digit.runs.reading import recorded_reading, with_reading
from digit.runs.recipe import with_settings
from digit.runs.status import describe_run
from digit.runtime import lock


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve pictures in two folders, one inside the other."""
    folder = tmp_path / "photos"
    (folder / "a" / "b").mkdir(parents=True)
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("a/b" if i % 2 else "a") / f"{i}.png")
    return folder


@pytest.fixture
def out(tmp_path, photos) -> Path:
    """A run of six of them, with a stage that other pictures would not fit."""
    small = with_settings(tiny_recipe(), {"kmeans.num_clusters": 4})
    source = open_source(str(photos), limit=6, labels_from="top", read_contents=False)
    run = Run(small, source, tmp_path / "run", reuse_unchanged=True)
    (run.out / "codebook").mkdir()
    (run.out / "codebook" / "begun").touch()
    lock.release_folder(run.out)
    return run.out


def typed(command: str, *argv: object) -> Run:
    """The run of a command line, as far as it begins work."""
    words = [str(word) for word in argv]
    lock.set_command(" ".join(["digit", command, *words]))
    parser = make_parser(command)
    if command == "train":
        parser.add_argument("model")
    base = add_run_arguments(parser, words, more=command == "fit")
    return make_run(parse(parser, words), words, base)


@pytest.mark.parametrize("command", [["fit"], ["tokenize"], ["train", "prior"]])
def test_a_run_is_continued_again_and_again_as_it_was_begun(photos, out, capsys, command):
    for data in (photos, f"{photos}/", photos):
        run = typed(*command, data, "--out", out)
        assert len(run.source) == 6 and run.source.classes == ["a"]
        said = f"--limit 6 --labels_from top --read_contents false as before: {out} was made so"
        assert said in capsys.readouterr().err
    assert recorded_reading(out) == {
        "path": str(photos), "limit": 6, "labels_from": "top", "read_contents": False,
    }  # fmt: skip


def test_options_may_stand_before_the_pictures_and_typed_ones_win(photos, out, tmp_path, capsys):
    assert len(typed("fit", "--out", out, photos).source) == 6
    settings = tmp_path / "settings.yaml"
    settings.write_text("labels_from: folders\n")
    for more in (["--limit", 5], ["--config", settings]):
        with pytest.raises(DigitError, match="made with other images, labels or class names"):
            typed("fit", photos, "--out", out, *more)
    assert reading_there(out, SHAPES) == {} == reading_there(tmp_path / "new", str(photos))


def test_the_commands_that_are_told_name_the_pictures_of_the_run(photos, out):
    """Also after a command that was refused, which stands in the folder's lock."""
    wanted = f"digit fit {photos} --out {out} --limit 6 --labels_from top --read_contents false"
    typed("fit", photos, "--out", out)
    assert wanted in describe_run(out)
    lock.release_folder(out)
    with pytest.raises(DigitError):
        typed("fit", photos, "--out", out, "--limit=5")
    assert wanted in describe_run(out)
    lock.release_folder(out)
    with pytest.raises(DigitError):
        typed("fit", SHAPES, "--out", out)
    assert wanted in describe_run(out)


def test_commands_of_every_launcher():
    reading = {"path": "my photos", "split": "train", "limit": 6}
    ranks = "torchrun --standalone --nproc-per-node=2 -m digit --"
    assert with_reading(f"{ranks} fit photos --split test --out r", reading) == (
        f"{ranks} fit 'my photos' --out r --split train --limit 6"
    )
    assert with_reading("digit train prior x --limit=3 --out r", {"path": "y"}) == "digit train prior y --out r"
    others = "digit sample --from r", "digit fit --out r x", "digit fit", "digit", "digit fit 'x", ""
    for other in (*others, "digit reproduce all --split train --out r"):
        assert with_reading(other, reading) == other
    assert with_reading("digit fit x --out r", {}) == "digit fit x --out r"


def test_a_folder_of_an_older_version_is_read_as_its_last_command_said(photos, out):
    config = json.loads((out / "config.json").read_text())
    del config["reading"]
    (out / "config.json").write_text(json.dumps(config))
    lock.set_command(f"digit fit {photos} --limit 6 --labels_from=top --read_contents false --out {out}")
    lock.lock_folder(out)
    assert reading_there(out, str(photos)) == {"limit": 6, "labels_from": "top"}
    assert reading_there(out, SHAPES) == {}


@pytest.mark.parametrize("change", [{"path": 3}, {"path": "a\nb"}, {"limit": "6"}, {"limit": True}, {"split": "\x1b"}])
def test_what_somebody_wrote_into_the_record_is_not_repeated(out, change):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"reading": config["reading"] | change}))
    assert not change.keys() & recorded_reading(out).keys()
    (out / "config.json").write_text("{")
    assert recorded_reading(out) == {}

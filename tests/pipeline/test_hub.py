"""Pipelines on a Hub that is a folder: uploaded with a card, fetched by name, and one line where that cannot be."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from toy_pipeline import toy_pipeline

from digit.cli import main
from digit.errors import DigitError
from digit.pipeline.hub import hub_name
from digit.pipeline.pipeline import DigitPipeline


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """A Hub that is a folder OWNER/NAME, a cache beside it, and what was asked of it; no test leaves this machine."""
    monkeypatch.chdir(tmp_path)
    for name in ("DIGIT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    root, cache, asked = tmp_path / "hub", tmp_path / "cache", []

    def metadata(url: str, timeout: float):
        asked.append(url)
        if not (root / url.removeprefix("https://huggingface.co/").replace("resolve/main/", "")).is_file():
            raise FileNotFoundError(url)

    def snapshot(name: str, *, local_files_only: bool = False, **_options):
        if not local_files_only:
            shutil.copytree(root / name, cache / name, dirs_exist_ok=True)
        if not (cache / name).is_dir():
            raise FileNotFoundError(name)
        return str(cache / name)

    def upload(_self, *, repo_id: str, folder_path: str, **_options):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def create(_self, name: str, **options):
        if name.startswith("somebody/"):
            raise PermissionError(name)
        asked.append(options)
        (root / name).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    return root, asked


@pytest.fixture(scope="module")
def pipe():
    pipe = toy_pipeline()
    pipe.info |= {"recipe": "toy", "data": "/home/me/my photos", "num_unlabelled": 0}
    return pipe


def test_what_is_pushed_comes_back(pipe, hub):
    assert pipe.push_to_hub("me/toys", private=True) == "https://huggingface.co/me/toys"
    assert hub[1] == [{"private": True, "exist_ok": True}]
    for name in ("me/toys", "hf:me/toys"):
        again = DigitPipeline.from_pretrained(name)
        assert torch.equal(again.generate(2, seed=1), pipe.generate(2, seed=1))


def test_the_card_says_what_a_reader_needs(pipe, hub):
    pipe.push_to_hub("me/toys", licence="cc-by-4.0", data="My photos (CC BY)")
    folder = hub[0] / "me" / "toys"
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0" and front["library_name"] == "digit"
    assert 'from_pretrained("me/toys")' in text and "Trained on: My photos (CC BY)" in text
    assert (
        "cat, dog, owl" in text and '"top_k"' in text and "samples.png" in text and (folder / "samples.png").is_file()
    )
    assert "/home" not in text


def test_a_card_without_a_licence_says_so(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "p")
    metrics = {"fd_efficientnet_lite2": 300.0, "fd_efficientnet_lite2_images": [500, 2000], "recognised": 0.5}
    text = pipe.write_card(folder, metrics=metrics, samples=pipe.generate(3)).read_text()
    assert "Licence of these weights: not stated" in text and "my photos" in text and "license:" not in text
    assert "300, 500 samples against 2000" in text and "50%" in text
    assert torch.equal(DigitPipeline.from_pretrained(folder).generate(1), pipe.generate(1)), "a card changes nothing"


def test_offline_a_copy_in_the_cache_is_read(pipe, hub, monkeypatch):
    pipe.push_to_hub("me/toys")
    DigitPipeline.from_pretrained("me/toys")
    shutil.rmtree(hub[0])
    assert DigitPipeline.from_pretrained("me/toys").classes == pipe.classes  # the network fails
    monkeypatch.setenv("DIGIT_OFFLINE", "1")
    assert DigitPipeline.from_pretrained("me/toys").classes == pipe.classes
    with pytest.raises(DigitError, match="me/other does not exist here, .*offline.*give a folder") as error:
        DigitPipeline.from_pretrained("me/other")
    assert "\n" not in str(error.value)
    with pytest.raises(DigitError, match="cannot be uploaded .offline.*: unset it; or write"):
        pipe.push_to_hub("me/toys")


def test_names_that_are_nobodys(pipe):
    with pytest.raises(DigitError, match="me/other does not exist here, and huggingface.co/me/other cannot be fetched"):
        DigitPipeline.from_pretrained("me/other")
    with pytest.raises(DigitError, match="names no repository"):
        pipe.push_to_hub("toys")
    with pytest.raises(DigitError, match="somebody/toys cannot be uploaded .PermissionError.: log in"):
        pipe.push_to_hub("somebody/toys")


def test_a_repository_that_is_no_pipeline(hub):
    (hub[0] / "me" / "other").mkdir(parents=True)
    (hub[0] / "me" / "other" / "pipeline.json").write_text("{}")
    with pytest.raises(DigitError, match="damaged"):
        DigitPipeline.from_pretrained("me/other")


def test_folders_come_first(tmp_path):
    (tmp_path / "runs").mkdir()
    assert hub_name("runs/demo") is None and hub_name(Path("a/b")) is None and hub_name("./a/b") is None
    assert hub_name("me/toys") == hub_name("hf:me/toys") == "me/toys"
    with pytest.raises(DigitError, match="runs/demo does not exist: give the --out folder"):
        DigitPipeline.from_pretrained("runs/demo")


def test_a_library_that_is_missing(pipe, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(DigitError, match="to upload me/toys, install the package huggingface-hub"):
        pipe.push_to_hub("me/toys")


def test_the_command_line_takes_names(pipe, tmp_path, capsys):
    pipe.push_to_hub("me/toys")
    assert main(["sample", "--from", "me/toys", "--num", "2", "--out", str(tmp_path / "s")]) == 0
    assert main(["sample", "--from", "me/none", "--num", "2", "--out", str(tmp_path / "s")]) == 2
    assert "--from: me/none does not exist here" in capsys.readouterr().err
    assert main(["sample", "--from", "me/toys", "--variant", "large", "--out", str(tmp_path / "t")]) == 2
    assert "leave --variant out" in capsys.readouterr().err

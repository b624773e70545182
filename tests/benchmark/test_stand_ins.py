"""The stand-ins of a rehearsal are read as the true data and weights are: bench/stand_in_imagenet.py, _weights.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from digit.convert.inception import load_inception
from digit.convert.vqgan import convert_vqgan
from digit.data.images import open_source
from digit.data.inspect import inspect_source
from digit.errors import DigitError
from digit.evaluation.splits import probe_splits
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, blank_net, load_encoder

CLASSES, PER_CLASS, VAL = 12, 2, 24


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / f"bench/{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


images, weights = script("stand_in_imagenet"), script("stand_in_weights")


def stand_in(out: Path, layout: str) -> Path:
    photographs = open_source("shapes:num=20,size=64")
    made = images.StandIn(photographs, images.read_synsets(None, CLASSES), seed=0)
    assert images.make(out, made, layout, PER_CLASS, VAL) == CLASSES * PER_CLASS + VAL + images.TEST_IMAGES
    return out


@pytest.mark.parametrize("layout", images.LAYOUTS)
def test_a_stand_in_is_opened_as_imagenet(tmp_path, layout):
    root = stand_in(tmp_path / "data", layout)
    train, test, where = probe_splits(str(root))
    assert (len(train), len(test)) == (CLASSES * PER_CLASS, VAL) and "its test split has no labels" in where
    assert len(train.classes) == CLASSES and all("stand-in" in name for name in train.classes), "with words"
    labels = test.with_classes(train.classes).labels()
    assert labels is not None and sorted(labels.tolist()) == sorted(list(range(CLASSES)) * 2)


def test_all_layouts_have_the_same_images_and_labels(tmp_path):
    of = {}
    for layout in images.LAYOUTS:
        source = open_source(stand_in(tmp_path / layout, layout), split="val")
        labels, raw = source.labels(), [source.raw(index) for index in range(len(source))]
        data = [item.read_bytes() if isinstance(item, Path) else item for item in raw]
        assert labels is not None
        of[layout] = sorted(zip(data, labels.tolist(), strict=True))
    assert of["folders"] == of["kaggle"] == of["hub"], "ILSVRC's ids, synsets and the Hub's numbers say the same"


def test_it_has_the_odd_files_of_the_true_set(tmp_path):
    report = inspect_source(open_source(stand_in(tmp_path / "data", "folders")))
    assert report.kinds["PNG RGB"] == report.kinds["JPEG CMYK"] == 1 and not report.bad
    assert min(report.widths.min(), report.heights.min()) >= 256 and len(set(report.widths.tolist())) > 10


def test_the_synsets_may_be_true_ones(tmp_path):
    (tmp_path / "words.txt").write_text("n01443537 goldfish, Carassius auratus\nn01440764 tench, Tinca tinca\n")
    assert images.read_synsets(str(tmp_path / "words.txt"), 2)[0] == ("n01440764", "tench, Tinca tinca")
    with pytest.raises(SystemExit, match="names 2 synsets, wanted 3"):
        images.read_synsets(str(tmp_path / "words.txt"), 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("weights")
    weights.write_encoders(out, 64, 4)
    weights.write_vqgan(out, 32)
    return out


@pytest.mark.parametrize("encoder", weights.ENCODERS, ids=lambda encoder: encoder.name)
def test_encoders_load_with_the_sizes_of_their_files(files, encoder, tmp_path):
    cfg = EncoderConfig(name=encoder.name, weights=str(files / encoder.file), sizes="file")
    loaded = load_encoder(cfg)
    assert (loaded.dim, loaded.layer, loaded.net.cfg.num_heads) == (64, 1, 1)
    assert loaded.describe()["sizes"] == "of the weights file, not of the name"
    assert blank_net(cfg).dim == 64
    features = loaded.features(torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8))
    assert features.shape == (1, loaded.grid[0] * loaded.grid[1], 64) and features.std() > 0.1
    loaded.save(tmp_path)
    assert FrozenEncoder.load(tmp_path).fingerprint == loaded.fingerprint
    with pytest.raises(DigitError, match="expected|shape|sizes"):
        load_encoder(EncoderConfig(name=encoder.name, weights=str(files / encoder.file)))


def test_sizes_of_a_file_need_a_file():
    with pytest.raises(DigitError, match="no weights file to take sizes from"):
        load_encoder(EncoderConfig(name="dinov2_vitb14_reg4", sizes="file"))
    with pytest.raises(DigitError, match="set its sizes to named"):
        load_encoder(EncoderConfig(name="efficientnet_lite0", sizes="file"))


def test_vqgan_and_inception_load(files, tmp_path):
    assert convert_vqgan(files / "vqgan_jax_strongaug.ckpt").cfg.channels == 32
    weights.write_inception(tmp_path)
    assert load_inception(tmp_path / "pt_inception-2015-12-05.pth") is not None


def test_odd_sizes_are_refused(tmp_path):
    for call in (lambda: weights.write_encoders(tmp_path, 100, 4), lambda: weights.write_vqgan(tmp_path, 40)):
        with pytest.raises(SystemExit, match="wanted a multiple of"):
            call()

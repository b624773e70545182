"""Probes of a study: stored tokens and images in batches, crops of one image together, Acc@OL of the class token."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from toy_images import NoiseSource
from toy_ranks import SumTokenizer

from digit.data.preprocess import PreprocessConfig
from digit.data.token_writer import write_tokens
from digit.errors import DigitError
from digit.metrics.probe import ProbeConfig
from digit.models.sequence import SequenceConfig, SequenceModel
from digit.models.vit import ViT, ViTConfig
from digit.reproduce import probes
from digit.reproduce.probes import crops_used, probe_itself, probed
from digit.runtime.files import read_json
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_encoder

SMALL = PreprocessConfig(image_size=8, encoder_size=8)
CPU = torch.device("cpu")
IN_MEMORY = ProbeConfig(solver="sgd", num_epochs=3, batch_size=16)
IN_FILES = replace(IN_MEMORY, memory_budget_bytes=0)


class TwoShades(NoiseSource):
    """Dark pictures of class a, bright ones of class b, in noise."""

    def read(self, index):
        image, label = super().read(index)
        return Image.fromarray((np.asarray(image) // 2 + 90 * label).astype(np.uint8)), label


def study_of(tmp_path, cfg, crops=3, train=None):
    """(study, run) as far as `probed` looks at them."""
    torch.manual_seed(0)
    model = SequenceModel(SequenceConfig(depth=2, embed_dim=16, num_heads=2, vocab_size=1000, target_len=4))
    train, test, both = train or TwoShades(40), TwoShades(30), (SumTokenizer(), SumTokenizer())
    stores = [
        write_tokens(tmp_path / name, source, SMALL, *both, crops_per_image=count)
        for name, source, count in (("train", train, crops), ("test", test, 1))
    ]
    scale = SimpleNamespace(probe=cfg)
    study = SimpleNamespace(train=train, test=test, scale=scale, device=CPU, test_tokens=lambda run: stores[1])
    recipe = SimpleNamespace(crops_per_image=crops)
    run = SimpleNamespace(train_model=lambda name: model, write_tokens=lambda: stores[0], recipe=recipe)
    return study, run


def test_tokens_are_probed_alike_from_memory_and_from_files(tmp_path):
    found = {}
    for name, cfg in (("memory", IN_MEMORY), ("files", IN_FILES)):
        study, run = study_of(tmp_path / name, cfg)
        found[name] = probed(study, run, "prior", tmp_path / name / "probe")
        assert {path.name for path in (tmp_path / name / "probe").iterdir()} == {"probe.json", "probe.png", ".digit"}
    protocol = found["files"]["protocol"]
    assert (protocol["num_train"], protocol["train_rows"], protocol["num_test"]) == (40, 120, 30)
    assert protocol["features"] == "float16, in files" and protocol["crops"].startswith("3 at random")
    assert "mean over 4 of 5 positions" in found["files"]["notes"][0]
    for layer, other in zip(found["memory"]["layers"], found["files"]["layers"], strict=True):
        assert abs(layer["top1"]["value"] - other["top1"]["value"]) < 0.1


def test_of_many_images_one_crop_each_is_probed(tmp_path, monkeypatch):
    assert [crops_used(*count) for count in ((1_281_167, 1), (1_281_167, 100), (50_000, 100), (10, 3))] == [1, 1, 40, 3]
    monkeypatch.setattr(probes, "MAX_ROWS", 90)
    study, run = study_of(tmp_path, IN_FILES)
    protocol = probed(study, run, "prior", tmp_path / "probe")["protocol"]
    assert (protocol["num_train"], protocol["train_rows"]) == (40, 80) and "2 at random" in protocol["crops"]
    assert protocol["crops"].endswith("3 are stored")


def test_images_without_a_class_are_refused(tmp_path):
    class Unlabelled(NoiseSource):
        def read(self, index):
            return super().read(index)[0], -1

    study, run = study_of(tmp_path, IN_MEMORY, train=Unlabelled(20))
    with pytest.raises(DigitError, match="have no class"):
        probed(study, run, "prior", tmp_path / "probe")


@pytest.mark.parametrize("cfg", [IN_MEMORY, IN_FILES], ids=["memory", "files"])
def test_acc_at_ol_is_of_the_class_token_behind_the_last_block(tmp_path, cfg):
    torch.manual_seed(0)
    shape = ViTConfig(embed_dim=16, depth=4, num_heads=2, patch_size=4, table_side=2, layer_scale=False)
    numbers = dict(mean=(0.5,) * 3, std=(0.2,) * 3, about={})
    FrozenEncoder(ViT(shape), name="toy", layer="pooled", input_size=8, **numbers).save(tmp_path / "encoder")
    encoder = EncoderConfig(name=f"folder:{tmp_path / 'encoder'}", input_size=8)
    recipe = SimpleNamespace(encoder=encoder, preprocess=SMALL)
    run = SimpleNamespace(encoder=load_encoder(encoder), recipe=recipe, device=CPU)
    scale = SimpleNamespace(probe=cfg)
    study = SimpleNamespace(train=TwoShades(40), test=TwoShades(30), scale=scale, device=CPU)
    found = probe_itself(study, run, tmp_path / "probe")
    assert found["best"]["name"] == "last layer" and "class token behind the last block" in found["notes"][0]
    assert found["patches"]["best"]["name"] == "patches" and found["patches"]["best"]["top1"]["value"] > 0.8
    result = read_json(tmp_path / "probe" / "probe.json")
    assert list(result["probes"]) == ["pooled", "patches"] and result["protocol"]["num_train"] == 40
    whole = probes.whole_encoder(run)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert run.encoder.layer == 1 and torch.equal(whole.pooled(images), whole.net.tokens(whole.prepare(images))[:, 0])

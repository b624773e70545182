"""The authors' files through `digit convert`, and what the converted pipeline answers (shared/golden)."""

import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from digit.cli import main
from digit.convert.fairseq import read_fairseq
from digit.errors import DigitError
from digit.models.vit import SIZES, ViT
from digit.pipeline.pipeline import DigitPipeline
from digit.released.convert import ORDER, ReleasedFiles, convert_release

TOLERANCE = dict(rtol=0, atol=1e-4)
HEADS = 3  # the golden encoder's; released ones have 64 channels a head


@pytest.fixture(scope="module")
def expected(golden):
    return load_file(golden / "expected.safetensors")


def convert(golden: Path, out: Path, **options) -> DigitPipeline:
    """Convert golden files by name; other options as they are."""
    files = {name: str(golden / value) for name, value in options.items() if name in ORDER}
    convert_release(ReleasedFiles(**({"encoder_heads": HEADS} | options | files)), out)
    return DigitPipeline.from_pretrained(out)


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory) -> Path:
    """All five files, through the command line."""
    out = tmp_path_factory.mktemp("converted")
    files = {
        "encoder": "dinov2_reg4.pth",
        "codebook": "kmeans_centroids.npy",
        "vqgan": "vqgan.ckpt",
        "prior": "stage1.pt",
        "renderer": "stage2_ar.pt",
    }
    options = [word for name, file in files.items() for word in (f"--{name}", str(golden / file))]
    assert main(["convert", *options, "--encoder_heads", str(HEADS), "--renderer_kind", "ar", "--out", str(out)]) == 0
    return out


def test_tokens_logits_and_pixels_are_the_released_ones(folder, expected):
    pipe = DigitPipeline.from_pretrained(folder)
    images = expected["images_uint8"]
    assert torch.equal(pipe.tokenizer.encode(images), expected["tokens"])
    assert torch.equal(pipe.vq.encode(images), expected["vqgan_indices"])
    prior = pipe.prior(expected["tokens"])
    torch.testing.assert_close(prior, expected["stage1_logits"][:, :256, 5:], **TOLERANCE)
    rendered = pipe.renderer(expected["vqgan_indices"], prefix=expected["tokens"])
    torch.testing.assert_close(rendered, expected["stage2_ar_logits"][:, :256, 5:], **TOLERANCE)
    released = (expected["vqgan_reconstruction"].clamp(0, 1) * 255).to(torch.uint8)
    assert (pipe.vq.decode(expected["vqgan_indices"]).int() - released.int()).abs().max() <= 1
    assert pipe.vq.rounding == "truncate"
    assert (pipe.sampling.prior.top_k, pipe.sampling.renderer.top_p) == (200, 0.8)


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    for name in ("a", "b"):
        assert main(["sample", "--from", str(folder), "--num", "2", "--seed", "3", "--out", str(tmp_path / name)]) == 0
    for png in ("00000.png", "00001.png", "grid.png"):
        assert (tmp_path / "a" / png).read_bytes() == (tmp_path / "b" / png).read_bytes()


def test_parts_are_taken_from_where_they_are_carried(golden, folder, expected, tmp_path):
    pipe = convert(golden, tmp_path, prior="stage1.pt", renderer="stage2_ar.pt")
    whole = DigitPipeline.from_pretrained(folder)
    assert pipe.tokenizer.fingerprint == whole.tokenizer.fingerprint
    assert pipe.vq.fingerprint == whole.vq.fingerprint
    assert torch.equal(pipe.tokenizer.encode(expected["images_uint8"]), expected["tokens"])


def test_masked_renderer_and_classes(golden, expected, tmp_path):
    pipe = convert(
        golden, tmp_path, prior="stage1_cond.pt", renderer="stage2_nar.pt", vqgan="vqgan.ckpt", renderer_kind="masked"
    )
    assert pipe.renderer.cfg.masked and pipe.prior.cfg.num_classes == 1000 and pipe.sampling.prior.top_k == 300
    assert pipe.sampling.renderer.top_p == 1  # the released MaskGIT decoding filters nothing
    target = expected["vqgan_indices"].masked_fill(expected["stage2_nar_mask"], pipe.renderer.cfg.mask_token)
    logits = pipe.renderer(target, prefix=expected["tokens"])
    torch.testing.assert_close(logits, expected["stage2_nar_logits"][:, 1:, 5:], **TOLERANCE)
    assert pipe.generate(labels=[7, 999]).shape == (2, 3, 256, 256)


def test_vq_only_baseline(golden, expected, tmp_path):
    pipe = convert(golden, tmp_path, renderer="vq_ar.pt", vqgan="vqgan.ckpt")
    torch.testing.assert_close(
        pipe.renderer(expected["vqgan_indices"]), expected["vq_ar_logits"][:, :256, 5:], **TOLERANCE
    )
    assert pipe.generate(num=1).shape == (1, 3, 256, 256)


def test_any_subset_and_the_rest_later(golden, tmp_path, capsys):
    pipe = convert(golden, tmp_path, prior="stage1.pt")
    assert pipe.vq is None and pipe.renderer is None and pipe.tokenizer.vocab_size == 32
    assert main(["sample", "--from", str(tmp_path), "--out", str(tmp_path / "s")]) == 2
    assert "needs vq and renderer, and the pipeline holds tokenizer, prior alone" in capsys.readouterr().err
    pipe = convert(golden, tmp_path, renderer="stage2_ar.pt", renderer_kind="ar")
    assert pipe.generate(num=1).shape == (1, 3, 256, 256)
    assert main(["info", str(tmp_path)]) == 0


@pytest.mark.parametrize(("name", "family"), [("ibot_vit16.pth", "ibot"), ("mae_vit16.pth", "mae")])
def test_other_encoders_say_what_they_are(golden, expected, tmp_path, name, family):
    from digit.tokenizers.encoders import FrozenEncoder

    convert(golden, tmp_path, encoder=name)
    encoder = FrozenEncoder.load(tmp_path / "encoder")
    assert encoder.name == f"{family}_custom"
    features = encoder.features(expected["images_uint8"])
    torch.testing.assert_close(features, expected[f"{family}_features_third_to_last"], **TOLERANCE)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"prior": "stage2_ar.pt"}, "is a renderer"),
        ({"prior": "vq_ar.pt"}, "is a VQ-only baseline: give it as --renderer"),
        ({"renderer": "stage1.pt"}, "is a prior"),
        ({"renderer": "vq_ar.pt", "prior": "stage1.pt"}, "omit --prior"),
        ({"prior": "vqgan.ckpt"}, "is not a fairseq checkpoint"),
        ({"vqgan": "dinov2_reg4.pth"}, "holds no VQGAN in MAGE's layout"),
        ({"encoder": "vqgan.ckpt"}, "holds no ViT encoder, no tensor patch_embed.proj.weight"),
        ({"encoder": "mae_vit16.pth", "encoder_family": "dinov2"}, "holds mae weights, --encoder_family says dinov2"),
        ({"encoder": "dinov2_reg4.pth", "encoder_heads": 5}, "48 channels, 5 heads"),
        (
            {"encoder": "dinov2_reg4.pth", "encoder_heads": None},
            "none of the released sizes: give its number of attention heads, --encoder_heads",
        ),
        ({"encoder": "dinov2_reg4.pth", "encoder_layer": 9}, "has no layer 9"),
        ({"vqgan": "vqgan.ckpt", "image_size": 9999}, "9999"),
        ({"codebook": "stage1.pt"}, "holds an archive, wanted floats"),
        ({"encoder": "nothing.pth"}, "no such weights file"),
        ({}, "nothing to convert"),
    ],
)
def test_wrong_files_are_refused_in_words(golden, tmp_path, names, message):
    with pytest.raises(DigitError, match=message):
        convert(golden, tmp_path / "out", **names)
    assert not (tmp_path / "out" / "pipeline.json").exists()


def changed(golden: Path, name: str, out: Path, change) -> Path:
    """A copy of a golden checkpoint with its model's tensors changed."""
    loaded = torch.load(golden / name, weights_only=True)
    change(loaded.get("model") or loaded.get("state_dict") or loaded)
    torch.save(loaded, out)
    return out


@pytest.mark.parametrize(
    ("carrier", "tensor", "part"),
    [
        ("stage1.pt", "centroids", "codebook"),
        ("stage1.pt", "pretrained_encoder.norm.bias", "encoder"),
        ("stage2_ar.pt", "vqgan.decoder.conv_in.bias", "VQGAN"),
    ],
)
def test_parts_that_disagree_are_refused_with_both_hashes(golden, tmp_path, carrier, tensor, part):
    def change(state):
        state[tensor] = state[tensor] + 1

    path = changed(golden, carrier, tmp_path / carrier, change)
    files = dict(
        encoder=str(golden / "dinov2_reg4.pth"),
        codebook=str(golden / "kmeans_centroids.npy"),
        vqgan=str(golden / "vqgan.ckpt"),
        prior=str(golden / "stage1.pt"),
        renderer=str(golden / "stage2_ar.pt"),
    ) | {("prior" if carrier == "stage1.pt" else "renderer"): str(path)}
    with pytest.raises(DigitError, match=rf"the {part} in .* \([0-9a-f]{{12}}\) differs from that in .* \("):
        convert_release(ReleasedFiles(encoder_heads=HEADS, **files), tmp_path / "out")


def test_every_tensor_is_accounted_for(golden, tmp_path):
    for change, message in (
        (lambda state: state.pop("decoder.layers.1.fc2.bias"), "decoder.layers.1.fc2.bias is missing"),
        (lambda state: state.update({"decoder.extra": torch.zeros(1)}), "unexpected tensors: decoder.extra"),
        (lambda state: state.update({"other.extra": torch.zeros(1)}), "unknown parts: other.extra"),
    ):
        path = changed(golden, "stage1.pt", tmp_path / "stage1.pt", change)
        with pytest.raises(DigitError, match=message):
            convert_release(ReleasedFiles(prior=str(path), encoder_heads=HEADS), tmp_path / "out")


def test_half_precision_files_become_float32(golden, tmp_path):
    def halve(state):
        state.update({n: t.half() for n, t in state.items() if t.dtype == torch.float32})

    path = changed(golden, "stage1.pt", tmp_path / "stage1.pt", halve)
    convert_release(
        ReleasedFiles(prior=str(path), encoder=str(golden / "dinov2_reg4.pth"), encoder_heads=HEADS), tmp_path / "out"
    )
    prior = DigitPipeline.from_pretrained(tmp_path / "out").prior
    assert {p.dtype for p in prior.parameters()} == {torch.float32}


def test_a_file_that_says_its_kind_is_believed(golden, tmp_path):
    for name, masked in (("image_gen_stage2_nar", True), ("image_gen_stage2_ar", False)):
        loaded = torch.load(golden / "stage2_nar.pt", weights_only=True)
        loaded["cfg"]["model"]["_name"] = name
        torch.save(loaded, tmp_path / "r.pt")
        notes = convert_release(
            ReleasedFiles(renderer=str(tmp_path / "r.pt"), encoder_heads=HEADS), tmp_path / f"out{masked}"
        )
        assert not any("does not tell" in note for note in notes)
        assert json.loads((tmp_path / f"out{masked}" / "renderer.json").read_text())["masked"] == masked


def test_the_hub_names_need_no_network_offline(golden, tmp_path, monkeypatch, capsys):
    import socket

    calls = []

    def refuse(*args, **_kwargs):
        calls.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("DIGIT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
        options = ["--from", "DAMO-NLP-SG/DiGIT", "--variant", "large", "--out", str(tmp_path / "s")]
        assert main(["sample", *options]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "large_16k_stage2/checkpoints/checkpoint_last.pt (about 4.35 GB)" in lines[0]
        assert "digit convert --prior PRIOR.pt --renderer RENDERER.pt --out FOLDER" in lines[0]
        monkeypatch.delenv(name)
    assert not calls
    assert main(["sample", "--from", "DAMO-NLP-SG/DiGIT", "--out", str(tmp_path / "s")]) == 2  # no network, not offline
    lines = capsys.readouterr().err.strip().splitlines()
    assert calls and len(lines) == 1 and "base_8k_stage1_400epoch" in lines[0]


def test_the_hub_files_are_verified_and_converted_once(golden, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    from digit.released import hub
    from digit.runtime.files import sha256_file

    downloaded = []

    def download(_repository, path, **_options):
        downloaded.append(path)
        return shutil.copy(golden / ("stage1.pt" if "stage1" in path else "stage2_ar.pt"), tmp_path)

    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, path: None)
    monkeypatch.setattr(
        hub, "convert_release", lambda files, out: convert_release(replace(files, encoder_heads=HEADS), out)
    )
    sample = ["sample", "--from", hub.REPOSITORY, "--num", "1", "--out", str(tmp_path / "s")]
    assert main(sample) == 2  # the golden files are not the released ones
    assert "has SHA-256" in capsys.readouterr().err
    names = {"prior": "stage1.pt", "renderer": "stage2_ar.pt"}
    real = {n: replace(file, sha256=sha256_file(golden / names[n])) for n, file in hub.VARIANTS["base"].items()}
    monkeypatch.setitem(hub.VARIANTS, "base", real)
    downloaded.clear()
    assert main(sample) == 0 and main(sample) == 0
    assert len(downloaded) == 2  # the second call downloads nothing
    assert main([*sample[:2], "nobody/nothing", *sample[3:]]) == 2
    assert main([*sample, "--variant", "huge"]) == 2


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "mae_vit16.pth"}, "codebook was fitted on dinov2_custom"),
        ({"encoder": "dinov2_reg4.pth", "encoder_layer": 9}, "no layer"),
        ({"prior": "stage1.pt", "encoder": "ibot_vit16.pth"}, "differs from|does not fit|expected"),
        ({"vqgan": "vqgan.ckpt", "image_size": 128}, "renderer length"),
    ],
)
def test_a_refused_conversion_leaves_the_folder_as_it_was(golden, folder, tmp_path, options, message):
    out = shutil.copytree(folder, tmp_path / "out")
    before = contents(out)
    with pytest.raises(DigitError, match=message):
        convert(golden, out, **options)
    assert contents(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_later_parts_keep_what_was_settled(golden, tmp_path):
    convert(golden, tmp_path / "out", prior="stage1_cond.pt", codebook="kmeans_centroids.npy")
    manifest = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    (tmp_path / "out" / "pipeline.json").write_text(json.dumps(manifest | {"classes": ["a"] * 1000}))
    pipe = convert(golden, tmp_path / "out", renderer="stage2_ar.pt", renderer_kind="ar")
    assert pipe.sampling.prior.top_k == 300 and len(pipe.classes) == 1000
    assert set(pipe.info["files"]) == {"prior", "codebook", "renderer"}

    def change(state):
        state["centroids"] = state["centroids"] + 1

    other = changed(golden, "stage1.pt", tmp_path / "other.pt", change)
    with pytest.raises(DigitError, match="codebook in .* differs from"):
        convert_release(ReleasedFiles(prior=str(other), encoder_heads=HEADS), tmp_path / "out")


def test_the_folder_of_a_run_is_not_touched(golden, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DigitError, match="is the folder of a `digit fit` run"):
        convert(golden, tmp_path, prior="stage1.pt")
    (tmp_path / "config.json").unlink()
    for damaged in ("[]", "null", '{"parts": 5}', '{"parts": [["a"]]}'):
        (tmp_path / "pipeline.json").write_text(damaged)
        with pytest.raises(DigitError, match="is damaged"):
            convert(golden, tmp_path, prior="stage1.pt")


def odd(state: dict, name: str, tensor: torch.Tensor) -> None:
    state[name] = tensor


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("decoder.embed_tokens.weight", torch.tensor(1.0), "does not fit"),
        ("decoder.embed_tokens.weight", torch.ones(37), "does not fit"),
        ("decoder.embed_positions.weight", torch.tensor(1.0), "does not fit"),
        ("decoder.output_projection.weight", torch.ones(99, 64), "does not fit|missing"),
        ("decoder.layers.0.self_attn.k_proj.weight", torch.ones(64, 32), "differ in shape"),
        ("decoder.layers.0.fc1.bias", torch.tensor(1.0), "does not fit"),
        ("decoder.layers.0.fc1.bias", torch.ones(128, dtype=torch.int64), "should be floating-point"),
        ("decoder.layers.0.fc1.bias", torch.full((128,), float("nan")), "NaN or Inf"),
        ("centroids", torch.ones(3), "does not fit"),
        ("centroids_extra", torch.ones(3), "unknown parts"),
        ("centroid_norm", torch.ones(3), "centroid_norm is"),
        ("pretrained_encoder.pos_embed", torch.ones(5), "does not fit|no ViT"),
        (5, torch.ones(5), "should be names of tensors"),
    ],
)
def test_odd_tensors_are_refused_in_one_line(golden, tmp_path, capsys, name, tensor, message):
    path = changed(golden, "stage1.pt", tmp_path / "odd.pt", lambda state: odd(state, name, tensor))
    options = ["--prior", str(path), "--encoder_heads", str(HEADS), "--out", str(tmp_path / "out")]
    assert main(["convert", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]) and "odd.pt" in lines[0], lines


def test_compressed_and_old_archives_are_read_right(golden, tmp_path):
    with (
        zipfile.ZipFile(golden / "stage1.pt") as old,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    loaded = torch.load(golden / "stage1.pt", weights_only=True)
    loaded["extra_state"]["best"] = np.float64(3)  # fairseq's meters hold such numbers
    torch.save(loaded, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    wanted = read_fairseq(golden / "stage1.pt").model.state_dict()
    for name in ("z.pt", "legacy.pt"):
        found = read_fairseq(tmp_path / name).model.state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_no_code_in_a_file_runs(golden, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for kind in (True, False):
        torch.save({"model": Trap()}, tmp_path / "trap.pt", _use_new_zipfile_serialization=kind)
        with pytest.raises(DigitError, match="runs no code from a file"):
            convert_release(ReleasedFiles(prior=str(tmp_path / "trap.pt")), tmp_path / "out")
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    with pytest.raises(DigitError, match="not a readable PyTorch file"):
        convert_release(ReleasedFiles(prior=str(tmp_path / "page.pt")), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_moco_small_has_twelve_heads(tmp_path):
    shape = replace(SIZES["mocov3_vits16"], depth=12)
    state = {f"module.base_encoder.{n}": t for n, t in ViT(shape).state_dict().items()}
    state |= {"module.base_encoder.head.0.weight": torch.ones(2, 2), "module.predictor.0.weight": torch.ones(2, 2)}
    torch.save({"state_dict": state, "epoch": 300}, tmp_path / "moco.pth.tar")
    convert_release(ReleasedFiles(encoder=str(tmp_path / "moco.pth.tar")), tmp_path / "out")
    about = json.loads((tmp_path / "out" / "encoder" / "encoder.json").read_text())
    assert about["name"] == "mocov3_vits16" and about["config"]["num_heads"] == 12

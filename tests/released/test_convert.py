"""`digit convert` on files as people have them: wrapped, of several sets, in the other format, under another name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_vit import under, vit_state

from digit.cli import main
from digit.convert.fairseq import load_fairseq
from digit.errors import DigitError

OPTIONS = ["--encoder_family", "dino", "--encoder_heads", "3"]


def converted(source: str | Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    """The encoder's tensors in the pipeline folder that `digit convert --encoder` makes."""
    assert main(["convert", "--encoder", str(source), "--out", str(out), *options]) == 0
    return load_file(out / "encoder" / "encoder.safetensors")


@pytest.mark.parametrize(("place", "scale"), [("", 1), ("#teacher", 1), ("#student", 2), ("#student.backbone", 2)])
def test_a_set_of_weights_is_chosen(tmp_path, caplog, place, scale):
    sets = {"student": under("module.backbone.", vit_state(2)), "teacher": under("backbone.", vit_state())}
    torch.save(sets, tmp_path / "w.pth")
    found = converted(f"{tmp_path / 'w.pth'}{place}", tmp_path / "out", *OPTIONS)
    torch.testing.assert_close(found["norm.bias"], scale * vit_state()["norm.bias"])
    assert ("took teacher.backbone" in caplog.text) == (not place)
    assert json.loads((tmp_path / "out" / "pipeline.json").read_text())["info"]["files"]["encoder"] == f"w.pth{place}"


@pytest.mark.parametrize("name", ["w.pth", "w.ckpt", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod."])
def test_formats_and_prefixes(tmp_path, name, prefix):
    for save in (torch.save, save_file):
        save(under(prefix, vit_state()), tmp_path / name)
        found = converted(tmp_path / name, tmp_path / save.__name__, *OPTIONS)
        assert torch.equal(found["norm.bias"], vit_state()["norm.bias"])


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("--encoder", b"<html>404</html>", "is a web page"),
        ("--vqgan", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("--prior", b"", "it is empty"),
        ("--renderer", b"\x1f\x8b\x08", "packed with gzip"),
        ("--encoder", b"\x08\x07\x12\x07pytorch\x1a\x052.7.0", "an ONNX file"),
    ],
)
def test_other_files_are_one_line(tmp_path, capsys, option, content, said):
    (tmp_path / "w.pth").write_bytes(content)
    assert main(["convert", option, str(tmp_path / "w.pth"), "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert said in text and text.startswith("digit: ") and text.count("\n") == 1 and not (tmp_path / "out").exists()


def test_networks_that_are_no_vit(tmp_path, capsys):
    torch.save({"model": {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}}, tmp_path / "resnet.pth")
    assert main(["convert", "--encoder", str(tmp_path / "resnet.pth"), "--out", str(tmp_path / "out")]) == 2
    said = "holds no ViT encoder, no tensor patch_embed.proj.weight, but conv1.weight, fc.bias: give the authors'"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod."])
def test_fairseq_checkpoints_of_wrapped_models(golden, tmp_path, prefix):
    loaded = torch.load(golden / "stage1.pt", weights_only=True)
    wanted = load_fairseq(golden / "stage1.pt")
    torch.save(loaded | {"model": under(prefix, loaded["model"])}, tmp_path / "w.pt")
    found = load_fairseq(tmp_path / "w.pt")
    for part in ("decoder", "vqgan", "encoder"):
        first, second = getattr(found, part), getattr(wanted, part)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert found.heads == wanted.heads


def test_fairseq_takes_its_model_and_names_the_average(golden, tmp_path, caplog):
    loaded = torch.load(golden / "stage1.pt", weights_only=True)
    average = {name: 2 * tensor for name, tensor in loaded["model"].items()}
    torch.save(loaded | {"extra_state": {"ema": average}}, tmp_path / "w.pt")
    name = next(name for name in load_fairseq(tmp_path / "w.pt").decoder if name.endswith("fc1.weight"))
    assert "took model; to take another, give" in caplog.text
    first, second = (load_fairseq(f"{tmp_path / 'w.pt'}{place}").decoder[name] for place in ("", "#extra_state.ema"))
    assert torch.equal(2 * first, second)


def test_settings_that_are_no_plain_dict_are_named(golden, tmp_path):
    loaded = torch.load(golden / "stage1.pt", weights_only=True)
    bare = {key: value for key, value in loaded.items() if key not in ("args", "cfg")}
    torch.save(bare, tmp_path / "w.pt")
    with pytest.raises(
        DigitError, match="save it again with args .* as a plain dict that names decoder_attention_heads"
    ):
        load_fairseq(tmp_path / "w.pt").interpret()
    heads = load_fairseq(golden / "stage1.pt").heads
    torch.save(bare | {"args": {"decoder_attention_heads": heads}}, tmp_path / "w.pt")  # the advice
    assert load_fairseq(tmp_path / "w.pt").interpret().cfg.num_heads == heads

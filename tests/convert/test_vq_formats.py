"""Files of other projects' VQ tokenizers: recognised, converted tensor by tensor, or refused in one line."""

import json

import foreign_vq
import pytest
import torch
from foreign_vq import FORMATS, small, stand_ins, write, write_state
from safetensors.torch import save_file

from digit.convert.vqgan import convert_vqgan, read_vq, recognise
from digit.errors import DigitError

COUNTED = {  # tensors and values of the published files, without what only training needs
    "llamagen_vq16": (344, 71_948_939),
    "llamagen_vq8": (300, 70_175_371),
    "taming_f16_1024": (343, 72_141_699),
    "taming_f16_16384": (343, 76_073_859),
    "taming_gumbel_f8": (301, 68_995_971),
    "maskgit_f16": (168, 54_515_587),
    "amused_256": (277, 146_244_675),
    "ibq_16384": (543, 110_982_019),
    "open_magvit2_256": (339, 115_127_829),
}


@pytest.mark.parametrize("name", COUNTED)
def test_published_sizes(name):
    stand_in = stand_ins.STAND_INS[name]
    with torch.device("meta"):
        state = stand_ins.foreign_state(stand_in.format, stand_ins.VQGAN(stand_in.cfg, stand_in.layout))
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == COUNTED[name]
    assert recognise(state, name, averaged=stand_in.format == "ibq").format == stand_in.format


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_recognised_and_read_tensor_by_tensor(form, tmp_path):
    vqgan = small(form)
    converted = convert_vqgan(write(form, tmp_path, vqgan), 16)
    assert (converted.cfg, converted.layout) == (vqgan.cfg, vqgan.layout)
    found, wanted = converted.state_dict(), vqgan.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert read_vq(tmp_path / f"{form}.ckpt").format == form and not converted.training


@pytest.mark.parametrize("form", FORMATS)
def test_every_tensor_is_accounted_for(form, tmp_path):
    state = stand_ins.foreign_state(form, small(form))
    path = write_state(form, tmp_path, state | {"encoder.extra.weight": torch.zeros(2)})
    with pytest.raises(DigitError, match=r"unexpected encoder\.extra\.weight"):
        convert_vqgan(path, 16)
    lacking = {name: tensor for name, tensor in state.items() if name != "decoder.conv_out.bias"}
    with pytest.raises(DigitError, match=r"missing decoder\.conv_out\.bias"):
        convert_vqgan(write_state(form, tmp_path, lacking), 16)
    misshapen = state | {"decoder.conv_out.bias": torch.zeros(4)}
    with pytest.raises(DigitError, match=r"shapes decoder\.conv_out\.bias \(4,\) instead of \(3,\)"):
        convert_vqgan(write_state(form, tmp_path, misshapen), 16)
    broken = state | {"decoder.conv_out.bias": torch.full((3,), float("nan"))}
    with pytest.raises(DigitError, match=r"NaN or Inf in decoder\.conv_out\.bias"):
        convert_vqgan(write_state(form, tmp_path, broken), 16)


@pytest.mark.parametrize("form", FORMATS)
def test_empty_and_odd_tensors_make_one_line(form, tmp_path):
    """Whatever a tensor that sizes are read from has become, the error is DigitError's and names the file."""
    state = stand_ins.foreign_state(form, small(form))
    stems = [name for name in state if name.endswith(("conv_in.weight", "conv_out.weight", "conv2.weight"))]
    stems = stems[:4] + [name for name in state if "quant" in name and "used" not in name][:2]
    for name in stems:
        for odd in (torch.tensor(1.0), torch.zeros(0), torch.zeros(3, 0, 1, 1), torch.zeros(2, 2).long()):
            with pytest.raises(DigitError, match=rf"{form}\.ckpt"):  # which the error names
                convert_vqgan(write_state(form, tmp_path, state | {name: odd}), 16)


def test_bare_names_in_safetensors_and_training_files(tmp_path, caplog):
    """LlamaGen's mixin file has bare names; a training checkpoint holds an average, optimizer and discriminator."""
    vqgan = small("llamagen")
    state = stand_ins.foreign_state("llamagen", vqgan)
    (tmp_path / "hub").mkdir()
    save_file(state, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text('{"codebook_size": 16}')
    assert convert_vqgan(tmp_path / "hub", 16).layout == vqgan.layout  # the folder's only weights
    averaged = {name: tensor * 2 for name, tensor in state.items()}
    rest = {"optimizer": {"state": {}}, "discriminator": {"main.weight": torch.zeros(2)}, "steps": 7}
    torch.save({"model": state, "ema": averaged} | rest, tmp_path / "training.pt")
    doubled = convert_vqgan(tmp_path / "training.pt", 16).quantize.embedding.weight
    assert torch.equal(doubled, 2 * vqgan.quantize.embedding.weight) and "took ema" in caplog.text
    plain = convert_vqgan(f"{tmp_path / 'training.pt'}#model", 16).quantize.embedding.weight
    assert torch.equal(plain, vqgan.quantize.embedding.weight)


def test_a_tokenizer_inside_a_larger_model(tmp_path):
    state = stand_ins.foreign_state("taming", small("taming"))
    state |= {"loss.logvar": torch.zeros(1)}
    inside = {f"first_stage_model.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": inside | {"model.diffusion_model.out.weight": torch.zeros(3)}}, tmp_path / "ldm.ckpt")
    assert convert_vqgan(tmp_path / "ldm.ckpt", 16).layout.quantizer == "nearest"


def test_names_that_two_formats_have(tmp_path):
    """Weights saved alone: taming-transformers' and IBQ's have the same names, and are read as the former's."""
    state = stand_ins.foreign_state("taming", small("taming"))
    torch.save(state, tmp_path / "bare.pt")
    weights = read_vq(tmp_path / "bare.pt")
    assert weights.format == "taming" and "else give --vqgan_format ibq" in weights.notes[0]
    assert read_vq(tmp_path / "bare.pt", "ibq").build(16).layout.quantizer == "dot"
    assert not read_vq(tmp_path / "bare.pt", "taming").notes
    assert not read_vq(write("taming", tmp_path, small("taming"))).notes, "the loss beside it tells"


def test_an_average_of_no_weight_is_refused(tmp_path):
    content = stand_ins.file_content("ibq", stand_ins.foreign_state("ibq", small("ibq")))
    content["state_dict"]["model_ema.encodernothing"] = torch.zeros(1)
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(DigitError, match=r"model_ema\.encodernothing are averages of no weight"):
        convert_vqgan(tmp_path / "w.ckpt", 16)


def diffusers_folder(folder, vqgan, **changes):
    folder.mkdir()
    save_file(stand_ins.foreign_state("diffusers", vqgan), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(stand_ins.diffusers_config(vqgan) | changes))
    return folder


def test_diffusers_config_tells_the_groups(tmp_path):
    vqgan = small("diffusers", num_groups=8)
    folder = diffusers_folder(tmp_path / "vqvae", vqgan)
    for given in (tmp_path, folder, folder / "diffusion_pytorch_model.safetensors"):
        assert convert_vqgan(given, 16).cfg == vqgan.cfg
    (folder / "config.json").unlink()
    assert "no config.json beside it: assumed 32 groups" in read_vq(folder).notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "spatial"}, 'norm_type is "spatial", and DiGIT reads group only'),
        ({"act_fn": "gelu"}, 'act_fn is "gelu", and DiGIT reads silu or swish only'),
        ({"_class_name": "AutoencoderKL"}, '_class_name is "AutoencoderKL", and DiGIT reads VQModel only'),
        ({"in_channels": 4}, "in_channels is 4"),
        ({"norm_num_groups": 0}, "norm_num_groups is 0"),
        ({"norm_num_groups": "x"}, 'norm_num_groups is "x"'),
        ({"norm_num_groups": 7}, "num_groups 7"),
    ],
)
def test_other_diffusers_networks_are_refused(tmp_path, changes, message):
    folder = diffusers_folder(tmp_path / "vqvae", small("diffusers"), **changes)
    with pytest.raises(DigitError, match=message):
        convert_vqgan(folder, 16)


def test_a_damaged_config_and_other_folders(tmp_path):
    folder = diffusers_folder(tmp_path / "vqvae", small("diffusers"))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(DigitError, match="expected a JSON object"):
        convert_vqgan(folder, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DigitError, match="empty holds none of diffusion_pytorch_model.safetensors"):
        convert_vqgan(tmp_path / "empty", 16)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "vqgan.json").write_text("{}")
    with pytest.raises(DigitError, match="in DiGIT's own format already"):
        convert_vqgan(tmp_path / "ours", 16)


def test_other_weights_are_no_tokenizer(tmp_path):
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, tmp_path / "w.ckpt")
    with pytest.raises(DigitError, match="no VQGAN in MAGE's layout, it lacks encoder.conv_in.weight; nor is it in"):
        convert_vqgan(tmp_path / "w.ckpt")
    assert foreign_vq.FORMATS

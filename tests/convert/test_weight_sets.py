"""Prefixes and containers around a network's tensors, and files with several sets of weights."""

import logging

import pytest
import torch
from toy_vit import CFG, scale_read, under, vit_state

from digit.convert.efficientnet import find_weights, read_efficientnet
from digit.convert.inception import STEM as INCEPTION_STEM
from digit.convert.reading import read_weights
from digit.convert.vit_checkpoints import read_vit
from digit.convert.vqgan import convert_vqgan
from digit.convert.weight_sets import choose_set
from digit.errors import DigitError
from digit.models.efficientnet import SIZES
from digit.models.vqgan import VQGAN, VQGANConfig


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / ("long-" * 30)  # an error must not shorten a name that it says to type
    folder.mkdir()
    return folder / "w.pth"


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",  # DDP
        "_orig_mod.",  # torch.compile
        "model.",  # Lightning
        "_fsdp_wrapped_module.",
        "_forward_module.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model._orig_mod.backbone.module.",
        "ema_model.module.",  # ema_pytorch
        "ema.",
        "teacher.backbone.",
        "student_backbone.vit.",
        "backbone.",
        "encoder.",
        "net.net.",
        "pretrained_encoder.",
    ],
)
@pytest.mark.parametrize("containers", [(), ("state_dict",), ("checkpoint", "model")])
def test_prefixes_and_containers_in_any_nesting(path, prefix, containers):
    content = under(prefix, vit_state())
    for key in reversed(containers):
        content = {key: content, "epoch": 3}
    torch.save(content, path)
    assert scale_read(path) == 1


@pytest.mark.parametrize(
    "containers",
    [
        ("model",),
        ("teacher",),
        ("student",),
        ("state_dict_ema",),
        ("model_state_dict",),
        ("ema", "shadow"),
        ("params",),
    ],
)
def test_containers(path, containers):
    content = vit_state()
    for key in reversed(containers):
        content = {key: content}
    torch.save(content, path)
    assert scale_read(path) == 1


def test_wrappers_inside_the_names(path):
    """Activation checkpointing and FSDP wrap single blocks, torch.compile may be called on one."""
    names = {"blocks.0": "blocks.0._checkpoint_wrapped_module", "blocks.1": "blocks.1._orig_mod"}
    state = vit_state()
    for plain, wrapped in names.items():
        state = {name.replace(plain, f"_fsdp_wrapped_module.{wrapped}"): tensor for name, tensor in state.items()}
    torch.save(state, path)
    assert scale_read(path) == 1


@pytest.mark.parametrize(
    ("content", "taken", "other"),
    [
        (lambda a, b: {"student": b, "teacher": a}, "teacher", "student"),
        (lambda a, b: {"state_dict": b, "state_dict_ema": a}, "state_dict_ema", "state_dict"),
        (lambda a, b: under("model.", b) | under("model_ema.", a), "model_ema", "model"),
        (
            lambda a, b: {"state_dict": under("student.backbone.", b) | under("teacher.backbone.", a)},
            "teacher",
            "student",
        ),
        (lambda a, b: under("ema_model.", a) | under("online_model.", b), "ema_model", "online_model"),
        (lambda a, b: b | under("ema.", a), "ema", ""),
        (lambda a, b: {"encoder": b, "target_encoder": under("module.", a)}, "target_encoder", "encoder"),
    ],
)
def test_of_two_sets_the_average_is_taken_and_the_other_can_be_chosen(path, caplog, content, taken, other):
    torch.save(content(vit_state(1), vit_state(2)), path)
    with caplog.at_level(logging.WARNING):
        assert scale_read(path) == 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert "holds 2 sets of weights that fit: took " in said and taken in said
    choice = said.rpartition("give ")[2]  # the advice, as it is written
    assert choice.startswith(f"{path}#") and other in choice
    assert scale_read(choice) == 2


@pytest.mark.parametrize("content", [lambda a, b: {"a": a, "b": b}, lambda a, b: under("a.", a) | under("b.", b)])
def test_sets_without_a_preferred_one_are_refused_by_name(path, content):
    torch.save(content(vit_state(1), vit_state(2)), path)
    with pytest.raises(DigitError, match=r"2 sets of weights that fit: choose one by giving .*w.pth#a, .*w.pth#b"):
        scale_read(path)
    assert scale_read(f"{path}#a") == 1 and scale_read(f"{path}#b") == 2
    with pytest.raises(DigitError, match=r"no sets of weights under 'c': choose .*w.pth#a, .*w.pth#b"):
        scale_read(f"{path}#c")


def test_a_set_of_another_size_does_not_count(path, caplog):
    large = {name: torch.zeros((2 * tensor.shape[0], *tensor.shape[1:])) for name, tensor in vit_state().items()}
    torch.save({"teacher": large, "student": vit_state()}, path)
    assert scale_read(path) == 1 and not caplog.records


def test_a_hash_in_a_name_is_no_choice(tmp_path):
    torch.save(vit_state(), tmp_path / "w#1.pth")
    assert scale_read(tmp_path / "w#1.pth") == 1


def test_tensors_of_other_parts_are_named(path, caplog):
    state = under("model.", vit_state()) | {"criterion.center": torch.zeros(2), "model.head.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}}, path)
    assert scale_read(path) == 1
    assert "took the weights under state_dict.model; left out, not of it: criterion.center" in caplog.text
    assert "head.weight" not in caplog.text  # each release drops its own heads
    torch.save(under("model.", vit_state() | {"surprise.weight": torch.zeros(1)}), path)
    with pytest.raises(DigitError, match="unexpected surprise.weight"):
        scale_read(path)


def test_optimizers_and_counters_are_no_weights(path, caplog):
    averaged = under("module.", vit_state()) | {"n_averaged": torch.tensor(3)}  # torch.optim.swa_utils.AveragedModel
    torch.save({"model": averaged, "optimizer": {"exp_avg": vit_state(2), "state": {0: {"step": torch.ones(1)}}}}, path)
    assert scale_read(path) == 1 and not caplog.records


def test_two_tensors_of_one_name_are_refused(path):
    torch.save(vit_state() | {"_orig_mod.norm.bias": torch.zeros(24)}, path)
    with pytest.raises(DigitError, match="holds norm.bias twice, the second time as _orig_mod.norm.bias"):
        scale_read(path)


def test_moco_takes_its_base_encoder(path, caplog):
    state = under("module.base_encoder.", vit_state()) | under("module.momentum_encoder.", vit_state(2))
    torch.save({"state_dict": state | {"module.predictor.0.weight": torch.zeros(1)}}, path)
    assert scale_read(path, "mocov3") == 1 and "took state_dict.base_encoder" in caplog.text
    assert scale_read(f"{path}#momentum_encoder", "mocov3") == 2


def test_names_of_the_transformers_library_are_recognised(path):
    names = (
        "embeddings.cls_token",
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.output.dense.bias",
    )
    for prefix in ("", "vit.", "dinov2."):
        torch.save({prefix + name: torch.zeros(1) for name in names}, path)
        with pytest.raises(DigitError, match="as the transformers library does: .* encoder hf:FOLDER"):
            scale_read(path)


def test_weights_of_another_size_name_the_encoder(path):
    from digit.models.vit import SIZES as VITS
    from digit.models.vit import ViT

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ViT(VITS["dino_vits8"]).state_dict().items()}
    torch.save({name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, path)
    with pytest.raises(DigitError, match="these are the sizes of dino_vits8, choose that name"):
        read_vit(path, "dino", VITS["dino_vits16"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.module."])
def test_the_other_networks_too(tmp_path, path, prefix):
    cfg, whole = SIZES["efficientnet_lite0"], read_weights(find_weights("efficientnet_lite0"))
    torch.save({"state_dict": under(prefix, whole)}, path)
    wanted, found = read_efficientnet(find_weights("efficientnet_lite0"), cfg), read_efficientnet(path, cfg)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    vqgan = VQGAN(
        VQGANConfig(resolution=16, channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=8, vocab_size=4)
    )
    torch.save({"state_dict": under(prefix, vqgan.state_dict())}, path)
    read = convert_vqgan(path, 16).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in vqgan.state_dict().items())
    inception = {INCEPTION_STEM: torch.ones(1), "fc.bias": torch.ones(1)}
    assert choose_set({"net": under(prefix, inception)}, INCEPTION_STEM, "f.pth").keys() == inception.keys()


def test_the_tiny_vit_is_what_it_says():
    assert vit_state()["patch_embed.proj.weight"].shape == (CFG.embed_dim, 3, CFG.patch_size, CFG.patch_size)

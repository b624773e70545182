"""Own encoders: views, the four methods' losses and masks, exact resume, and the folder as an encoder everywhere."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy_images import NoiseSource

from digit.errors import DigitError, MismatchError
from digit.models.vit import ViT
from digit.runs.pretrain import PretrainConfig, pretrain
from digit.runtime.files import load_tensors
from digit.tokenizers.encoders import EncoderConfig, FrozenEncoder, load_encoder
from digit.training.checkpoint import list_checkpoints, load
from digit.training.ssl.dino import DINOConfig, used
from digit.training.ssl.ibot import IBOTConfig, random_masked
from digit.training.ssl.mae import MAEConfig, normalised_patches, random_hidden
from digit.training.ssl.method import embed, encode, follow, momentum_at, sine_positions, twin
from digit.training.ssl.moco import MoCoConfig, contrast
from digit.training.ssl.train import METHODS, SSLConfig, SSLUpdate, build_method
from digit.training.ssl.views import ViewConfig, random_crops, random_views, turn_hue

HEAD = dict(num_prototypes=32, hidden_dim=32, bottleneck_dim=16)
QUICK = SSLConfig(
    num_steps=6, batch_size=4, learning_rate=3e-3, warmup_steps=2, precision="fp32", log_every=1, save_every=3,
    tensorboard=False,
)  # fmt: skip
TINY = PretrainConfig(
    method="ibot", image_size=16, source_size=20, patch_size=4, depth=4, embed_dim=24, num_heads=3, training=QUICK,
    mae=MAEConfig(decoder_depth=1, decoder_dim=12), moco=MoCoConfig(hidden_dim=32, output_dim=16),
    dino=DINOConfig(**HEAD, num_local_views=1), ibot=IBOTConfig(**HEAD, num_local_views=1),
)  # fmt: skip
NORMAL = ((0.5,) * 3, (0.25,) * 3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(num, side=20, seed=0):
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=seeded(seed))


def tiny_method(name, **settings):
    cfg = replace(TINY, method=name)
    return build_method(name, ViT(cfg.vit), replace(cfg.settings, **settings), seed=0).train()


# ---------------------------------------------------------------- views


def test_views_are_a_function_of_seed_and_image_alone():
    images, cfg = pictures(5), ViewConfig()
    views = random_views(images, 16, cfg, seeded(1))
    assert views.shape == (5, 3, 16, 16) and views.min() >= 0 and views.max() <= 1
    assert torch.equal(views, random_views(images, 16, cfg, seeded(1)))
    assert not torch.equal(views, random_views(images, 16, cfg, seeded(2)))
    others = torch.cat([images[:2], 255 - images[2:4]])  # neither the rest of the batch nor its size
    assert torch.equal(random_views(others, 16, cfg, seeded(1))[:2], views[:2])


def test_crops_lie_where_the_draws_say():
    images, cfg = torch.rand(1, 3, 16, 16), ViewConfig(scale=(0.25, 1.0))
    whole, square, left, right = 1.0, 0.5, 0.0, 1.0  # draws: area, aspect, x, y, flip (below 0.5)
    draws = torch.tensor([[whole, square, 0.3, 0.3, 0.9], [whole, square, 0.3, 0.3, 0.1]])
    views = random_crops(images.expand(2, -1, -1, -1), draws, 16, cfg)
    torch.testing.assert_close(views, torch.cat([images, images.flip(-1)]), atol=1e-5, rtol=0)
    corner = random_crops(images, torch.tensor([[0.0, square, right, left, 0.9]]), 8, cfg)  # a quarter of the area
    torch.testing.assert_close(corner, images[..., :8, 8:], atol=1e-5, rtol=0)
    mirrored = random_crops(images, draws[1:], 16, replace(cfg, flip=False))
    torch.testing.assert_close(mirrored, images, atol=1e-5, rtol=0)


def test_grey_views_have_one_value_per_pixel_and_hue_keeps_it():
    views = random_views(pictures(3), 16, ViewConfig(grey=1.0), seeded())
    torch.testing.assert_close(views[:, 0], views[:, 2])
    turn = turn_hue(torch.full((1, 1, 1), 1 / 3))[0]  # a third of a turn: red to green to blue
    torch.testing.assert_close(turn @ torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(turn @ torch.ones(3), torch.ones(3))


def test_blur_keeps_flat_pictures_and_lowers_variance():
    cfg = ViewConfig(scale=(1.0, 1.0), jitter=0, grey=0, blur=1.0)
    flat = torch.full((2, 3, 16, 16), 51, dtype=torch.uint8)
    torch.testing.assert_close(random_views(flat, 16, cfg, seeded()), torch.full((2, 3, 16, 16), 0.2))
    sharp, soft = (random_views(pictures(8, 16), 16, c, seeded()) for c in (replace(cfg, blur=0), cfg))
    assert (soft.var((1, 2, 3)) < sharp.var((1, 2, 3))).all()


def test_impossible_crops_are_refused():
    with pytest.raises(DigitError, match="two areas"):
        ViewConfig(scale=(0.5, 0.2))


# ---------------------------------------------------------------- parts


def test_the_vit_taken_apart_is_the_vit():
    vit, images = ViT(TINY.vit), torch.rand(2, 3, 16, 16)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    first, patches = encode(vit, embed(vit, images))
    torch.testing.assert_close(torch.cat((first[:, None], patches), 1), vit.tokens(images))


def test_sine_positions_by_definition():
    table = sine_positions(3, 8)[0, 1:].view(3, 3, 8)  # row, column, channel
    for row in range(3):
        for column in range(3):
            wanted = [f(p * s) for p in (row, column) for f in (math.sin, math.cos) for s in (1.0, 0.01)]
            torch.testing.assert_close(table[row, column], torch.tensor(wanted))


def test_momentum_rises_to_one_and_the_twin_follows_exactly():
    assert momentum_at(0.0, 0.9) == pytest.approx(0.9) and momentum_at(1.0, 0.9) == 1
    assert momentum_at(0.5, 0.9) == pytest.approx(0.95)
    source = torch.nn.Linear(2, 2)
    target = twin(source)
    with torch.no_grad():
        source.weight.add_(1.0)
    before = target.weight.clone()
    follow(target, source, 0.75)
    torch.testing.assert_close(target.weight, 0.75 * before + 0.25 * source.weight)
    assert not target.weight.requires_grad


@pytest.mark.parametrize(("name", "pairs"), [
    ("moco", {"twin_vit": "vit", "twin_projector": "projector"}),
    ("dino", {"teacher": "vit", "teacher_head": "head"}),
    ("ibot", {"teacher": "vit", "teacher_head": "head"}),
])  # fmt: skip
def test_a_step_moves_the_twins_by_the_moving_average_alone(name, pairs):
    method = tiny_method(name, momentum=0.9)
    before = {t: twin(getattr(method, t)) for t in pairs}
    for target, source in pairs.items():
        assert all(
            torch.equal(a, b) for a, b in zip(*(getattr(method, x).parameters() for x in (target, source)), strict=True)
        )
    SSLUpdate(method, lambda step: pictures(4), replace(QUICK, warmup_steps=0), NORMAL)(0)
    for target, source in pairs.items():
        for old, new, student in zip(
            *(m.parameters() for m in (before[target], *map(method.get_submodule, (target, source)))), strict=True
        ):
            torch.testing.assert_close(new, torch.lerp(old, student.detach(), 0.1))


# ---------------------------------------------------------------- MAE


@pytest.mark.parametrize(
    ("num_patches", "ratio", "num_visible"), [(16, 0.75, 4), (64, 0.75, 16), (9, 0.5, 4), (4, 0.9, 1)]
)
def test_visible_and_hidden_are_all_patches_once(num_patches, ratio, num_visible):
    visible, hidden = random_hidden(3, num_patches, ratio, seeded())
    assert visible.shape == (3, num_visible)
    assert torch.equal(torch.cat((visible, hidden), 1).sort(1).values, torch.arange(num_patches).expand(3, -1))
    assert not torch.equal(visible[0].sort().values, visible[1].sort().values) or num_patches < 9


def test_mae_sees_no_hidden_pixel():
    mae, images = tiny_method("mae"), torch.rand(2, 3, 16, 16, requires_grad=True)
    visible, hidden = random_hidden(2, 16, 0.75, seeded())
    painted = mae.decode(mae.encode_visible(images, visible), visible, hidden)
    assert painted.shape == (2, 12, 48)
    painted.square().sum().backward()
    seen = F.unfold(images.grad.abs(), 4, stride=4).sum(1) > 0  # (2, 16)
    assert torch.equal(seen, torch.zeros(2, 16, dtype=torch.bool).scatter(1, visible, True))


def test_mae_loss_is_that_of_the_hidden_patches():
    mae, images = tiny_method("mae"), torch.rand(2, 3, 16, 16)
    loss, _ = mae.loss([images], seeded(3), 0.0)
    visible, hidden = random_hidden(2, 16, 0.75, seeded(3))
    painted = mae.decode(mae.encode_visible(images, visible), visible, hidden)
    errors = []
    for b in range(2):
        for i, patch in enumerate(hidden[b].tolist()):
            row, column = divmod(patch, 4)
            pixels = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
            errors.append(((pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt() - painted[b, i]).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    assert normalised_patches(images, 4).var(-1).allclose(torch.ones(2, 16), atol=1e-3)


# ---------------------------------------------------------------- MoCo v3


def test_info_nce_against_a_naive_one():
    q, k, tau = torch.randn(5, 8), torch.randn(5, 8), 0.2
    total = 0.0
    for i in range(5):
        scores = [math.exp(float(F.cosine_similarity(q[i], k[j], dim=0)) / tau) for j in range(5)]
        total += -2 * tau * math.log(scores[i] / sum(scores)) / 5
    loss, accuracy = contrast(q, k, tau)
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert contrast(k, k, tau)[1] == 1 and 0 <= accuracy <= 1


def test_moco_freezes_the_patch_projection_unless_told():
    assert not tiny_method("moco").vit.patch_embed.proj.weight.requires_grad
    assert tiny_method("moco", freeze_patch_embed=False).vit.patch_embed.proj.weight.requires_grad


# ---------------------------------------------------------------- DINO and iBOT


def test_targets_are_centred_sharpened_and_move_the_centre():
    dino, outputs = tiny_method("dino"), torch.randn(6, 32)
    centre = torch.randn(32)
    before = centre.clone()
    targets = dino.sharpen(outputs, centre)
    torch.testing.assert_close(targets, ((outputs - before) / 0.04).softmax(-1))
    torch.testing.assert_close(centre, 0.9 * before + 0.1 * outputs.mean(0))
    start = torch.zeros(32)
    dino.sharpen(outputs, start)
    torch.testing.assert_close(start, outputs.mean(0))
    assert used(torch.full((3, 8), 1 / 8)) == pytest.approx(8) and used(torch.eye(8)[:1]) == pytest.approx(1)


def test_sinkhorn_shares_the_prototypes_out_and_moves_no_centre():
    dino, centre = tiny_method("dino", balance="sinkhorn"), torch.zeros(32)
    outputs = 0.2 * torch.randn(96, 32, generator=seeded())
    outputs[:, 0] += 1  # one that would win everywhere
    targets = dino.sharpen(outputs, centre)
    torch.testing.assert_close(targets.sum(1), torch.ones(96))
    assert used(targets) > 30 and not centre.any()
    naive = (outputs / 0.04).double().softmax(dim=0)  # columns, then rows, in turn
    for _ in range(3):
        naive = naive / naive.sum(0)
        naive = naive / naive.sum(1, keepdim=True)
    torch.testing.assert_close(targets, naive.float(), atol=1e-4, rtol=1e-3)
    plain = tiny_method("dino").sharpen(outputs, torch.full((32,), 1e-9))
    assert used(plain) < 2


def test_dino_pairs_every_teacher_view_with_every_other_view():
    dino = tiny_method("dino")
    targets, students = [torch.rand(4, 32).softmax(-1) for _ in range(2)], [torch.randn(4, 32) for _ in range(3)]
    naive = [
        -(targets[t] * (students[s] / 0.1).log_softmax(-1)).sum(-1).mean() for t, s in ((0, 1), (0, 2), (1, 0), (1, 2))
    ]
    torch.testing.assert_close(dino.distil(targets, students), sum(naive) / 4)


def test_small_views_are_half_as_large():
    assert [v.shape[-1] for v in tiny_method("dino").views(pictures(2), seeded())] == [16, 16, 8]


def test_masks_have_exactly_the_drawn_number():
    cfg = IBOTConfig(mask_ratio=(0.25, 0.25), masked_views=0.5)
    masked = random_masked(10, 8, cfg, seeded())
    assert sorted(masked.sum(1).tolist()) == [0] * 5 + [16] * 5
    counts = random_masked(200, 8, IBOTConfig(masked_views=1.0), seeded()).sum(1)
    assert counts.min() >= 6 and counts.max() <= 32 and len(counts.unique()) > 15  # 0.1 to 0.5 of 64
    assert random_masked(1, 2, IBOTConfig(mask_ratio=(0.1, 0.1)), seeded()).sum() == 1  # never none at all


def test_ibot_student_sees_no_masked_patch_and_each_image_counts_the_same():
    ibot, images = tiny_method("ibot"), torch.rand(2, 3, 16, 16, requires_grad=True)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[0, :3] = masked[1, 5] = True
    first, patches = encode(ibot.vit, embed(ibot.vit, images, masked, ibot.mask_token))
    (first.square().sum() + patches.square().sum()).backward()
    assert torch.equal(F.unfold(images.grad.abs(), 4, stride=4).sum(1) > 0, ~masked)
    targets, outputs = torch.rand(4, 32).softmax(-1), torch.randn(4, 32)
    each = ibot.cross_entropy(targets, outputs)
    torch.testing.assert_close(
        ibot.patch_loss(targets, outputs, masked, masked.flatten().nonzero()[:, 0]), (each[:3].mean() + each[3]) / 2
    )


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls(name):
    method = tiny_method(name, **({} if name == "mae" else {"momentum": 0.999}))  # a teacher that stays, to be learnt
    smooth = F.interpolate(torch.rand(16, 3, 3, 3, generator=seeded()), size=(20, 20), mode="bicubic")
    images = (255 * smooth.clamp(0, 1)).to(torch.uint8)
    update = SSLUpdate(method, lambda step: images, replace(QUICK, num_steps=40, batch_size=16), NORMAL)
    losses = [float(update(step)["loss"].detach()) for step in range(40)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


# ---------------------------------------------------------------- runs


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path, monkeypatch):
    cfg, source = replace(TINY, method=name), NoiseSource(12)
    pretrain(source, cfg, tmp_path / "whole", device="cpu")
    call = SSLUpdate.__call__

    def stop_at_four(self, step):
        if step == 4:
            raise Stopped
        return call(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(SSLUpdate, "__call__", stop_at_four)
        with pytest.raises(Stopped):
            pretrain(source, cfg, tmp_path / "halves", device="cpu")
    assert list_checkpoints(tmp_path / "halves" / "checkpoints")[-1][0] == 3
    pretrain(source, cfg, tmp_path / "halves", device="cpu")
    whole, halves = (load_tensors(tmp_path / run / "encoder" / "encoder.safetensors") for run in ("whole", "halves"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[k], halves[k]) for k in whole)
    states = [
        load(list_checkpoints(tmp_path / run / "checkpoints")[-1][1], {})["method"] for run in ("whole", "halves")
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return pretrain(NoiseSource(12), TINY, folder, device="cpu"), folder


def folder_config(folder, **fields):
    return EncoderConfig(**({"name": f"folder:{folder / 'encoder'}", "input_size": 16} | fields))


def test_the_folder_is_an_encoder_with_the_same_features(run):
    encoder, folder = run
    images = pictures(3, 16)
    whole = FrozenEncoder.load(folder / "encoder")
    assert encoder.layer == 1 and len(encoder.net.blocks) == 2 and encoder.grid == (4, 4)  # third-to-last of 4
    assert whole.layer == "pooled" and len(whole.net.blocks) == 4
    again = load_encoder(folder_config(folder))
    assert torch.equal(again.features(images), encoder.features(images)) and again.fingerprint == encoder.fingerprint
    x = whole.prepare(images)
    patches = embed(whole.net, x)
    first = whole.net.cls_token + whole.net.pos_embed[:, :1]
    tokens = torch.cat((first.expand(3, -1, -1), patches), 1)
    for block in whole.net.blocks[:2]:
        tokens = block(tokens)
    torch.testing.assert_close(encoder.features(images), whole.net.norm(tokens)[:, 1:])
    last = load_encoder(folder_config(folder, layer=-1))
    torch.testing.assert_close(last.features(images), whole.features(images))
    pooled = load_encoder(folder_config(folder, layer="pooled"))
    assert torch.equal(pooled.pooled(images), whole.pooled(images)) and pooled.fingerprint == whole.fingerprint


def test_the_report_is_there_and_a_finished_run_is_not_made_again(run, monkeypatch):
    encoder, folder = run
    assert {p.name for p in (folder / "report").iterdir()} == {"loss.png", "features.png"}
    monkeypatch.setattr("digit.runs.pretrain.CachedCrops", None)
    assert pretrain(NoiseSource(12), TINY, folder, device="cpu").fingerprint == encoder.fingerprint


def test_a_cut_encoder_keeps_its_layer_and_has_no_later_one(run, tmp_path):
    encoder, _ = run
    encoder.save(tmp_path / "encoder")
    assert load_encoder(folder_config(tmp_path)).fingerprint == encoder.fingerprint
    assert load_encoder(folder_config(tmp_path, layer=0)).layer == 0
    for layer in (2, -1, "pooled"):
        with pytest.raises(DigitError, match="holds 2 of 4 blocks"):
            load_encoder(folder_config(tmp_path, layer=layer))


@pytest.mark.parametrize(("fields", "message"), [
    ({"layer": 4}, "no layer 4: choose 0 to 3"),
    ({"layer": -5}, "no layer -5"),
    ({"input_size": 224}, "takes 16 px, input_size is 224: set"),
    ({"weights": "x.pth"}, "takes no weights file"),
])  # fmt: skip
def test_what_does_not_fit_the_folder_is_refused(run, fields, message):
    with pytest.raises(DigitError, match=message):
        load_encoder(folder_config(run[1], **fields))


def test_a_wrong_folder_says_which_is_right(run, tmp_path):
    with pytest.raises(DigitError, match=f"holds no encoder.json: give {run[1] / 'encoder'}"):
        load_encoder(EncoderConfig(name=f"folder:{run[1]}", input_size=16))
    with pytest.raises(DigitError, match="RUN/encoder"):
        load_encoder(EncoderConfig(name=f"folder:{tmp_path}", input_size=16))


def test_another_run_in_the_folder_is_refused(run):
    _, folder = run
    for other in (replace(TINY, method="dino"), replace(TINY, depth=3), replace(TINY, seed=1)):
        with pytest.raises(MismatchError, match="choose another --out"):
            pretrain(NoiseSource(12), other, folder, device="cpu")
    with pytest.raises(MismatchError, match="about.data ="):
        pretrain(NoiseSource(11), TINY, folder, device="cpu")


@pytest.mark.parametrize(("fields", "message"), [
    ({"method": "simclr"}, "choose one of mae, moco, dino, ibot"),
    ({"image_size": 18}, "no multiple of patch_size"),
    ({"embed_dim": 26}, "multiple of 4 and of num_heads"),
    ({"source_size": 12}, "24 for example"),
])  # fmt: skip
def test_impossible_encoders_are_refused(fields, message):
    with pytest.raises(DigitError, match=message):
        replace(TINY, **fields)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MAEConfig(mask_ratio=1.0), "mask_ratio of MAE is 1.0"),
    (lambda: MAEConfig(decoder_dim=100), "decoder_dim"),
    (lambda: MoCoConfig(temperature=0.0), "temperature of MoCo"),
    (lambda: IBOTConfig(mask_ratio=(0.5, 0.1)), "mask_ratio of IBOT"),
    (lambda: SSLConfig(batch_size=1), "at least 2"),
])  # fmt: skip
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(DigitError, match=message):
        make()


def test_one_image_is_too_few(tmp_path):
    with pytest.raises(DigitError, match="at least 2"):
        pretrain(NoiseSource(1), TINY, tmp_path, device="cpu")


@pytest.mark.parametrize(("changes", "setting"), [
    ({}, "mae.mask_ratio"),
    ({}, "moco.temperature"),
    ({"method": "mae"}, "ibot.views.hue"),
    ({"method": "dino"}, "dino.local_scale"),
    ({"ibot": IBOTConfig(balance="sinkhorn", centre_momentum=0.5)}, "ibot.centre_momentum"),
    ({}, "training.seed"),
    ({}, "training.keep_best"),
])  # fmt: skip
def test_a_setting_that_pretraining_would_ignore_is_refused(changes, setting, tmp_path):
    cfg = PretrainConfig(**{"method": "ibot", "seed": 3} | changes)
    with pytest.raises(DigitError, match=rf"{setting} is .*, which this run would not use: "):
        pretrain(NoiseSource(4), cfg, tmp_path / "run", device="cpu", chosen=[setting])
    assert not (tmp_path / "run").exists()

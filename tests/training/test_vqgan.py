"""VQGAN training: losses, the EMA codebook, exact resume, and that it learns."""

from dataclasses import replace

import pytest
import torch
from toy_vqgan import QUICK, TINY, batches, model, weights_after_three_steps
from two_ranks import save_weights

from digit.errors import DigitError, MismatchError
from digit.models.discriminator import PatchDiscriminator
from digit.models.vqgan import VQGAN
from digit.tokenizers.vq import with_levels
from digit.training.adversarial import adaptive_weight, hinge_loss, image_psnr, random_window
from digit.training.ema_codebook import EMACodebook, LevelCodebooks, random_rows
from digit.training.vqgan import GANConfig, VQGANTrainer, evaluate_vqgan, train_vqgan


def test_hinge_loss():
    assert hinge_loss(torch.tensor([2.0]), torch.tensor([-3.0])) == 0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1


def test_adaptive_weight_is_the_ratio_of_norms_and_is_capped():
    assert adaptive_weight(torch.full((4,), 3.0), torch.ones(4)).item() == pytest.approx(3, rel=1e-3)  # delta 1e-4
    assert adaptive_weight(torch.full((4,), 1e9), torch.zeros(4)) == 1e4


def test_adversarial_gradient_has_the_reconstruction_gradients_norm_at_the_last_layer():
    trainer = VQGANTrainer(model(), batches, replace(QUICK, adversarial_weight=1.0, codebook_start=0))
    images, generator = batches(0).float() / 255, torch.Generator().manual_seed(0)
    reconstruction, _, _ = trainer.reconstruct(images, 1, generator)
    output = reconstruction.detach().requires_grad_()
    gradient, _ = trainer.reconstruction_gradient(output, images, generator)
    extra, _ = trainer.adversarial_gradient(output, reconstruction, gradient, step=100)
    last = trainer.vqgan.decoder.conv_out.weight
    norms = [torch.autograd.grad(reconstruction, last, g, retain_graph=True)[0].norm() for g in (gradient, extra)]
    torch.testing.assert_close(*norms, rtol=0.02, atol=0)  # delta 1e-4 in the denominator
    direct = (reconstruction - images).abs().mean() + (reconstruction - images).square().mean()
    torch.testing.assert_close(torch.autograd.grad(direct, last)[0].norm(), norms[0])


def test_codebook_starts_on_the_clusters_and_follows_them():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2)
    table, generator = torch.randn(12, 2), torch.Generator().manual_seed(0)
    codebook = EMACodebook(table, decay=0.5, restart_below=0.05)
    codebook.collect(points)
    codebook.start(generator)
    assert torch.cdist(centres, codebook.weight).min(1)[0].max() < 0.5
    for _ in range(20):
        codebook.update(points + 1, torch.cdist(points + 1, codebook.weight).argmin(1))
    assert torch.cdist(centres + 1, codebook.weight).min(1)[0].max() < 0.5
    assert torch.equal(codebook.weight, table)  # in place


def test_dead_codes_return():
    table = torch.randn(8, 3)
    codebook = EMACodebook(table, decay=0.5, restart_below=0.05)
    features = torch.randn(64, 3) + 5
    for _ in range(10):
        codebook.update(features, torch.zeros(64, dtype=torch.int64))  # everything chooses code 0
    assert codebook.restart_dead(features, torch.Generator().manual_seed(0)) == 7
    assert (table[1:, None] == features).all(2).any(1).all()  # each is one of the features
    assert codebook.restart_dead(features, torch.Generator().manual_seed(0)) == 0


def test_levels_start_on_what_the_levels_before_leave():
    coarse = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    fine = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]])
    points = (coarse[:, None] + fine).flatten(0, 1).repeat(40, 1)
    table, generator = torch.zeros(24, 2), torch.Generator().manual_seed(0)
    table[:4] = coarse
    codebooks = LevelCodebooks(table, 2, decay=0.5, restart_below=0.05)
    first, second = codebooks.codebooks
    assert first.weight.shape == (12, 2)
    first.weight[4:] = 100.0  # never chosen
    codebooks.start_new(points, generator)
    assert torch.equal(table[:4], coarse)  # the level that has codes keeps them
    assert torch.cdist(fine, table[12:]).min(1)[0].max() < 0.01
    before = table.clone()
    codebooks.start_new(points + 5, generator)
    codebooks.start(generator)  # nothing was collected
    assert torch.equal(table, before)
    chosen = torch.stack([torch.cdist(points, coarse).argmin(1), torch.zeros(len(points)).long()], 1)
    codebooks.update(points, chosen)
    assert first.counts[:4].min() > first.counts[4:].max() and second.counts[0] == second.counts.max()
    assert codebooks.restart_dead(points, chosen, generator) == 8  # of the first level, never chosen
    for _ in range(12):
        codebooks.update(points, chosen)
    assert codebooks.restart_dead(points, chosen, generator) == 8 + 11  # now the second has one code in use
    state = codebooks.state_dict()
    other = LevelCodebooks(torch.zeros(24, 2), 2, decay=0.5, restart_below=0.05)
    other.load_state_dict(state)
    assert torch.equal(other.codebooks[1].sums, second.sums)


@pytest.mark.parametrize("started", [False, True])
def test_training_of_levels_learns_and_resumes(tmp_path, started):
    cfg = replace(QUICK, num_steps=60, codebook_start=10, learning_rate=5e-3, adversarial_start=50, ema_decay=0.9)
    cfg = replace(cfg, save_every=30, codebook_start=0 if started else 10)

    def of_two_levels():
        vqgan = VQGAN(TINY if started else replace(TINY, num_levels=2))
        if started:  # a codebook of one level, as a carried VQGAN has it
            vqgan.quantize.embedding.weight.data.normal_(std=0.1)
        return with_levels(vqgan, 2)

    torch.manual_seed(0)
    whole = of_two_levels()
    metrics = train_vqgan(whole, batches, cfg, tmp_path / "whole")
    assert metrics["psnr"] > 12 and metrics["usage"] * 32 + metrics["dead_codes"] == 32
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        train_vqgan(of_two_levels(), stop_after(45), cfg, tmp_path / "resumed")
    again = of_two_levels()
    assert train_vqgan(again, batches, cfg, tmp_path / "resumed") == metrics
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_random_rows_repeat_only_where_they_must():
    rows, generator = torch.arange(6.0)[:, None], torch.Generator().manual_seed(0)
    assert len(random_rows(rows, 6, generator).unique()) == 6
    assert random_rows(rows, 9, generator).shape == (9, 1)


def test_random_window():
    generator = torch.Generator().manual_seed(0)
    rows, columns = random_window(64, 32, generator)
    assert rows.stop - rows.start == columns.stop - columns.start == 32 and rows.stop <= 64
    assert random_window(16, 32, generator) == random_window(16, 0, generator) == (slice(0, 16), slice(0, 16))


def test_psnr():
    black = torch.zeros(1, 3, 4, 4)
    assert image_psnr(black + 0.1, black).item() == pytest.approx(20, abs=1e-4)
    assert image_psnr(black, black).item() == pytest.approx(100)


def test_training_learns(tmp_path):
    vqgan = model()
    cfg = replace(QUICK, num_steps=60, codebook_start=10, learning_rate=5e-3, adversarial_start=50, ema_decay=0.9)
    before = evaluate_vqgan(vqgan, [batches(1000)])["psnr"]
    metrics = train_vqgan(vqgan, batches, replace(cfg, save_every=60), tmp_path)
    assert not vqgan.training and metrics["psnr"] > before + 5
    assert metrics["usage"] * 16 + metrics["dead_codes"] == 16 and metrics["num_images"] == 32
    assert metrics == evaluate_vqgan(vqgan, [batches(60 + n) for n in range(8)])


def stop_after(step):
    """Batches that fail at `step`, as a killed process would."""

    def stopping(number):
        if number == step:
            raise KeyboardInterrupt
        return batches(number)

    return stopping


def test_resumed_equals_uninterrupted(tmp_path):
    whole, resumed = model(), model()
    train_vqgan(whole, batches, QUICK, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_vqgan(resumed, stop_after(6), QUICK, tmp_path / "resumed")
    again = model()
    train_vqgan(again, batches, QUICK, tmp_path / "resumed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_resume_before_the_codebook_starts(tmp_path):
    cfg = replace(QUICK, codebook_start=5, save_every=3, num_steps=6)
    whole, again = model(), model()
    train_vqgan(whole, batches, cfg, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_vqgan(model(), stop_after(4), cfg, tmp_path / "resumed")
    train_vqgan(again, batches, cfg, tmp_path / "resumed")
    assert torch.equal(whole.quantize.embedding.weight, again.quantize.embedding.weight)


def test_another_model_is_refused(tmp_path):
    cfg = replace(QUICK, num_steps=2, codebook_start=1, adversarial_start=1)
    train_vqgan(model(), batches, cfg, tmp_path)
    with pytest.raises(MismatchError, match="vocab_size"):
        train_vqgan(VQGAN(replace(TINY, vocab_size=17)), batches, cfg, tmp_path)


def test_fine_tuning_starts_from_the_codes_there_are(tmp_path):
    vqgan = model()
    vqgan.quantize.embedding.weight.data.normal_()
    codes = vqgan.quantize.embedding.weight.clone()
    cfg = replace(QUICK, num_steps=1, codebook_start=0, adversarial_start=0, learning_rate=1e-6, restart_below=0.0)
    train_vqgan(vqgan, batches, cfg, tmp_path)
    moved = (vqgan.quantize.embedding.weight - codes).norm(dim=1) / codes.norm(dim=1)
    assert moved.median() < 0.2


def test_bf16_trains(tmp_path):
    metrics = train_vqgan(model(), batches, replace(QUICK, precision="bf16"), tmp_path)
    assert metrics["psnr"] > 0


def test_perceptual_term(tmp_path):
    trainer = VQGANTrainer(model(), batches, replace(QUICK, perceptual="alex", perceptual_stages=1))
    if trainer.perceptual is None:
        pytest.skip("stlpips-pytorch is not installed (pip install --no-deps stlpips-pytorch)")
    assert trainer.update(0)["perceptual"] > 0


def test_config_errors(unchecked):
    with pytest.raises(DigitError, match="perceptual"):
        GANConfig(perceptual="resnet")
    with pytest.raises(DigitError, match="precision is 'fp16': it must be auto or fp32 or bf16"):
        GANConfig(precision="fp16")
    with pytest.raises(DigitError, match="perceptual_stages"):
        GANConfig(perceptual_stages=6)
    with pytest.raises(DigitError, match="codebook_decay"):
        GANConfig(codebook_decay=1.0)


def test_discriminator_scores_patches():
    assert PatchDiscriminator(channels=4)(torch.rand(2, 3, 64, 64)).shape == (2, 1, 7, 7)


def test_two_processes_do_what_one_does(tmp_path):
    torch.multiprocessing.spawn(save_weights, (str(tmp_path), weights_after_three_steps), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name, tensor in weights_after_three_steps().items():
        assert torch.equal(first[name], second[name]), name
        # Adam divides by the root of tiny squared gradients: a changed order of summation shows more than elsewhere
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def test_a_codebook_that_collapses_is_warned_of_once(caplog):
    caplog.set_level("WARNING")
    trainer = VQGANTrainer(model(), batches, replace(QUICK, restart_every=1, codebook_start=0))
    generator = torch.Generator().manual_seed(0)
    same = torch.zeros(64, TINY.z_channels)
    for step in range(60):
        trainer.codebook.codebooks[0].counts.zero_()[0] = 64.0  # one code takes all
        assert trainer.restart_dead(same, torch.zeros(64, 1).long(), step, generator) == TINY.vocab_size - 1
    assert [r.getMessage()[:48] for r in caplog.records] == ["step 21: 15 of 16 codes are dead in spite of res"]

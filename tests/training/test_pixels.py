"""Training straight to pixels: it learns, resumes to the bit, and is the same in two processes."""

from dataclasses import replace

import pytest
import torch
from toy_pixels import QUICK, Batches, model, weights_after_three_steps
from two_ranks import save_weights

from digit.errors import DigitError
from digit.training.pixels import PixelTrainer, evaluate_pixels, train_pixels


def test_it_learns_the_colours(tmp_path):
    renderer = model()
    before = evaluate_pixels(renderer, [Batches().part(100, 0, 8)])["psnr"]
    metrics = train_pixels(renderer, Batches(), QUICK, tmp_path)
    assert metrics["psnr"] > before + 5 and metrics["num_images"] == 64


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    cfg = replace(QUICK, num_steps=6, adversarial_start=2, save_every=3)
    whole, resumed = model(noise_channels=1), model(noise_channels=1)
    train_pixels(whole, Batches(), cfg, tmp_path / "whole")

    class Killed(Batches):
        def part(self, step, start, stop):
            if step == 4:
                raise KeyboardInterrupt
            return super().part(step, start, stop)

    with pytest.raises(KeyboardInterrupt):
        train_pixels(model(noise_channels=1), Killed(), cfg, tmp_path / "resumed")
    train_pixels(resumed, Batches(), cfg, tmp_path / "resumed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_two_processes_do_what_one_does(tmp_path):
    torch.multiprocessing.spawn(save_weights, (str(tmp_path), weights_after_three_steps), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name, tensor in weights_after_three_steps().items():
        assert torch.equal(first[name], second[name]), name
        # as for a VQGAN: Adam divides by the root of tiny squared gradients
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def test_the_average_is_validated_and_the_weights_go_on(tmp_path):
    seen = []

    def validate(renderer):
        assert not renderer.training
        seen.append(float(renderer.decoder.conv_out.weight.detach().sum()))
        return {"val_l1": 0.5}

    cfg = replace(QUICK, num_steps=4, adversarial_start=2, save_every=2)
    renderer, plain = model(), model()
    train_pixels(renderer, Batches(), cfg, tmp_path / "validated", validate=validate)
    train_pixels(plain, Batches(), cfg, tmp_path / "plain")
    assert len(seen) == 2 and seen[-1] == float(renderer.decoder.conv_out.weight.detach().sum())
    assert torch.equal(renderer.decoder.conv_out.weight, plain.decoder.conv_out.weight)


def test_a_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setattr("digit.runtime.distributed.world_size", lambda: 3)
    with pytest.raises(DigitError, match="batch_size 8 of the renderer straight to pixels cannot be split into 3"):
        PixelTrainer(model(), Batches(), QUICK)

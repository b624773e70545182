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


class Doubled(Batches):
    """The same quarters on 32 x 32 pixels."""

    def part(self, step, start, stop):
        batch = super().part(step, start, stop)
        return batch | {"target": batch["target"].repeat_interleave(2, 2).repeat_interleave(2, 3)}


@pytest.mark.parametrize("window", [0, 16])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, window):
    cfg = replace(QUICK, num_steps=6, adversarial_start=2, save_every=3, window=window, whole_from=0.8)
    whole, resumed = model(noise_channels=1, image_size=32), model(noise_channels=1, image_size=32)
    train_pixels(whole, Doubled(), cfg, tmp_path / "whole")

    class Killed(Doubled):
        def part(self, step, start, stop):
            if step == 4:
                raise KeyboardInterrupt
            return super().part(step, start, stop)

    with pytest.raises(KeyboardInterrupt):
        train_pixels(model(noise_channels=1, image_size=32), Killed(), cfg, tmp_path / "resumed")
    train_pixels(resumed, Doubled(), cfg, tmp_path / "resumed")
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


def test_windows_learn_the_colours_too(tmp_path):
    renderer = model(image_size=32)
    before = evaluate_pixels(renderer, [Doubled().part(100, 0, 8)])["psnr"]
    metrics = train_pixels(renderer, Doubled(), replace(QUICK, window=16), tmp_path)
    assert metrics["psnr"] > before + 3


def test_a_window_is_compared_with_the_same_place_of_the_images(monkeypatch):
    trainer = PixelTrainer(model(image_size=32), Doubled(), replace(QUICK, window=16, whole_from=0.5))
    plain, seen = trainer.reconstruct, {}

    def watched(images, step, generator, **given):
        output = plain(images, step, generator, **given)
        seen[step] = images, output[0], given.get("cells")
        return output

    monkeypatch.setattr(trainer, "reconstruct", watched)
    for step in (0, 1, 2, 3, 29, 30):
        trainer.update(step)
    places = set()
    for step, (images, output, cells) in seen.items():
        whole = Doubled().part(step, 0, 8)["target"].float() / 255
        if step == 30:  # whole_from of 60 updates
            assert cells is None and torch.equal(images, whole)
            continue
        rows, columns = (slice(4 * part.start, 4 * part.stop) for part in cells)
        assert output.shape == images.shape == (8, 3, 16, 16) and torch.equal(images, whole[..., rows, columns])
        places.add((rows.start, columns.start))
    assert len(places) > 1


def test_a_window_of_all_cells_is_the_image():
    renderer, prefix = model().eval(), Batches().part(0, 0, 2)["prefix"]
    whole = renderer.render(prefix)
    assert torch.equal(renderer.render(prefix, cells=(slice(0, 4), slice(0, 4))), whole)
    part = renderer.render(prefix, cells=(slice(1, 3), slice(0, 2)))
    assert torch.equal(part, renderer.decoder(renderer.latent(prefix)[..., 1:3, 0:2]))


def test_a_window_that_cuts_through_cells():
    with pytest.raises(DigitError, match="window is 18: it must be a multiple of 4, the pixels per token"):
        PixelTrainer(model(image_size=32), Doubled(), replace(QUICK, window=18))
    with pytest.raises(DigitError, match="window is 8: it must be 0 or at least the 16 px that the discriminator"):
        replace(QUICK, window=8)

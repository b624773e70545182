"""New crops in every epoch: a function of seed, step and row, whoever makes them; broken images are replaced."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from toy_images import NoiseSource

from digit.data.fresh import FreshCrops
from digit.data.preprocess import PreprocessConfig, crop_image
from digit.data.token_writer import write_tokens
from digit.errors import DigitError

SMALL = PreprocessConfig(image_size=8, encoder_size=8)


class PixelTokenizer:
    """Its tokens are the red values of the crop: they tell which crop it was."""

    grid, vocab_size, fingerprint = (8, 8), 256, "pixels"

    def encode(self, images):
        return images[:, 0].flatten(1).long()


def crops(source=None, **changes) -> FreshCrops:
    settings = dict(batch_size=5, seed=3, num_workers=0, max_bad_fraction=0.5) | changes
    return FreshCrops(source or NoiseSource(), SMALL, **settings)


def test_every_epoch_crops_every_image_once_and_anew():
    source, made = NoiseSource(), crops(batch_size=12)
    epochs = [made.part(step, 0, 12) for step in range(3)]
    for epoch, batch in enumerate(epochs):
        assert sorted(batch.indices.tolist()) == list(range(12)) and batch.crops.tolist() == [epoch] * 12
        assert batch.images.dtype == torch.uint8 and batch.ok.all()
        for row, index in enumerate(batch.indices.tolist()):
            picture, label = source.read(index)
            wanted = crop_image(picture, SMALL, seed=3, index=index, crop=epoch)
            assert np.array_equal(batch.images[row].permute(1, 2, 0), wanted) and batch.labels[row] == label
        assert np.array_equal(made.images(epoch), batch.indices)
    assert epochs[0].indices.tolist() != epochs[1].indices.tolist()


def test_epoch_e_has_the_stored_crops_e_in_the_order_of_the_store(tmp_path):
    """With one crop an image stored, the first epoch is the same on both paths; later ones go on to new crops."""
    made, tokenizer = crops(), PixelTokenizer()
    one = write_tokens(tmp_path / "one", NoiseSource(), SMALL, tokenizer, None, seed=3).batches(5, seed=3)
    two = write_tokens(tmp_path / "two", NoiseSource(), SMALL, tokenizer, None, seed=3, crops_per_image=2)
    for step in range(5):  # two epochs of 12 and a row more
        batch = made.part(step, 0, 5)
        tokens, stored = tokenizer.encode(batch.images), one(step)
        assert torch.equal(batch.labels, stored["labels"])
        first = batch.crops == 0
        assert torch.equal(tokens[first], stored["discriminative"][first])
        for row in np.flatnonzero(batch.crops < 2):
            index, crop = int(batch.indices[row]), int(batch.crops[row])
            assert np.array_equal(tokens[row], two.discriminative[2 * index + crop])


def test_parts_of_a_batch_and_any_start_give_the_same_rows():
    whole = [crops().part(step, 0, 5) for step in range(6)]
    parts = [crops(), crops()]
    for step in (4, 5, 0, 1, 2, 3):
        images = torch.cat([parts[0].part(step, 0, 2).images, parts[1].part(step, 2, 5).images])
        assert torch.equal(images, whole[step].images)


def test_worker_processes_give_the_same_rows():
    made, wanted = crops(num_workers=2), crops()
    before = torch.get_rng_state()
    for step in (0, 1, 2, 7, 8, 1):  # a resumed run begins anywhere
        assert torch.equal(made.part(step, 1, 4).images, wanted.part(step, 1, 4).images)
    assert torch.equal(torch.get_rng_state(), before)
    made.close()
    assert torch.equal(made.part(3, 0, 5).images, wanted.part(3, 0, 5).images)
    made.close()


def test_only_the_images_asked_for():
    made = crops(images=[3, 8, 9])
    seen = {int(i) for step in range(9) for i in made.part(step, 0, 5).indices}
    assert seen == {3, 8, 9}
    with pytest.raises(DigitError, match="at least 1"):
        crops(images=[])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_image_replaces_a_broken_one(workers):
    made = crops(NoiseSource(broken=(1, 2, 11)), batch_size=12, num_workers=workers)
    batch = made.part(0, 0, 12)
    wanted = [{1: 3, 2: 3, 11: 0}.get(index, index) for index in made.images(0).tolist()]
    assert batch.indices.tolist() == wanted and batch.ok.all()
    assert sorted(key for key, _ in made.bad) == ["noise/1.png", "noise/11.png", "noise/2.png"]
    made.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_end_the_run(workers):
    made = crops(NoiseSource(broken=(1, 2)), batch_size=12, max_bad_fraction=0.1, num_workers=workers)
    with pytest.raises(DigitError, match="2 of 12 images unreadable"):
        made.part(0, 0, 12)
    made.close()
    none = crops(NoiseSource(3, broken=(0, 1, 2)), max_bad_fraction=1.0)
    with pytest.raises(DigitError, match="none of the 3 images"):
        none.part(0, 0, 5)


def test_workers_do_not_outlive_a_program_that_forgets_them():
    """They heed no SIGTERM, so that a signal to the whole job leaves the decision to the training process."""
    program = (
        "from data.test_fresh import crops\n"
        "if __name__ == '__main__':\n"
        "    made = crops(num_workers=2)\n"
        "    made.part(0, 0, 5)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=env, timeout=60).returncode == 0
